//! What a person decides about a machine in doubt, carried out.

use crate::linked::LinkedHost;
use crate::recover::reconnect;
use crate::source::Settled;
use host::lifecycle::{self, Ran, RunError, ended, forget_decided, has_own_disks, own_disks};
use host::{Record, Vm};
use ownership::{Asked, Effect, Event, Why};
use ownership::{Outgoing, Ownership};

/// What a person decided about a machine in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// It runs here; the person has made sure that it runs nowhere else.
    RunHere,
    /// It does not run here any more; what is here of it is thrown away.
    GiveUp,
}

/// Carries out what a person decided about a machine in doubt. Who can be asked is asked first; with `force` the machine is run here
/// even where the other agent cannot be asked, says that it is its own, or knows nothing of it, but not where it has run it.
///
/// # Errors
/// [`RunError`] when QEMU is not there to be resumed, or something else than what the person saw is true by now.
pub async fn resolve(
    host: &LinkedHost,
    record: Record,
    resolution: Resolution,
    force: bool,
) -> Result<Option<Vm>, RunError> {
    // Before anybody is kept waiting: that agent may be asking here at the same time.
    let source = match (&record.ownership, resolution) {
        (Ownership::Incoming { .. }, Resolution::RunHere) => Some(crate::source::whose(host, &record).await),
        _ => None,
    };
    if resolution == Resolution::RunHere
        && matches!(record.ownership, Ownership::Incoming { .. })
        && ended(host, &record).await
    {
        // There is no copy any more that could run, and the source hears so when it asks.
        return Err(RunError::Settled(record.name));
    }
    // The person has decided about what they saw; the machine may have settled its fate in the meantime.
    let deciding = host.journal.decide(&record.name).await;
    let Some(mut record) = host.journal.get(&record.name).filter(|now| now.claim() == record.claim()) else {
        return Err(RunError::Settled(record.name));
    };
    if resolution == Resolution::GiveUp {
        may_be_given_up(host, &mut record, force).await?;
    }
    let event = match (resolution, source, record.ownership.clone()) {
        (Resolution::GiveUp, ..) => Event::GiveUp,
        (Resolution::RunHere, Some(says), _) => Event::RunHere { asked: Asked::Source(says), force },
        (Resolution::RunHere, None, Ownership::HandedOver { session, to, address, .. }) => {
            // The person may have looked before the last word from here arrived there. A destination that can be
            // asked gives its copy up first; one that cannot is told as soon as it can.
            let outgoing = Outgoing { session, to: Some(to), address };
            let withdrawal = crate::source::withdraw(host, &record, &outgoing).await;
            Event::RunHere { asked: Asked::Destination(withdrawal), force }
        }
        (Resolution::RunHere, ..) => Event::RunHere { asked: Asked::Nobody, force },
    };
    let (before, images) = (record.ownership.clone(), record.clone());
    let effects = host.journal.on(&mut record, event, |now| {
        if now.ownership == Ownership::Owner {
            has_own_disks(now);
        }
    })?;
    match effects.first() {
        Some(Effect::Refuse(why)) => Err(refused(&record, before, *why)),
        Some(Effect::Discard(mark)) => {
            let ended = forget_decided(host, &record, None, *mark).await;
            drop(deciding);
            ended.map(|()| None).map_err(RunError::Lingers)
        }
        _ => {
            own_disks(host, &images);
            if let Ownership::HandedOver { session, .. } = before {
                host.forwards.undo(session).await;
            }
            reconnect(host, record).await.map(Some)
        }
    }
}

/// Whether a machine that a person does not want here may go: who can be asked is asked. A destination is told once more that the machine
/// is its own; a QEMU that may run it has the last word.
async fn may_be_given_up(host: &LinkedHost, record: &mut Record, force: bool) -> Result<(), RunError> {
    let name = record.name.clone();
    match record.ownership.clone() {
        Ownership::Incoming { .. } => Ok(()),
        Ownership::HandedOver { to, .. } => match crate::source::settle(host, record).await {
            Ok(Settled::RunsThere) => Ok(()),
            Ok(Settled::RunsHere) => Err(RunError::CopyLost { name, to }),
            Ok(Settled::Unknown | Settled::UnknownThere | Settled::OtherKeeper) if force => Ok(()),
            Ok(Settled::UnknownThere | Settled::OtherKeeper) => Err(RunError::UnknownThere { name, to }),
            Ok(Settled::Unknown) => Err(RunError::Unheard { name, peer: to }),
            Err(failure) => Err(RunError::Unsettled { name, why: failure.finding.message }),
        },
        Ownership::Owner => {
            // A guest that somebody has paused has run all the same, which its vCPUs tell.
            match lifecycle::has_run(record, None).await {
                Ran::Never => Ok(()),
                Ran::Has(status) if status == "running" => Err(RunError::RunsHere(name)),
                Ran::Has(_) | Ran::Idle(_) | Ran::Unheard(_) if force => Ok(()),
                Ran::Has(status) => {
                    let why = format!("QEMU says {status}, and its guest has run");
                    Err(RunError::MayRunHere { name, why })
                }
                // It was told to run: one that has hardly worked may have written to its disks.
                Ran::Idle(why) | Ran::Unheard(why) => Err(RunError::MayRunHere { name, why }),
            }
        }
    }
}

fn refused(record: &Record, before: Ownership, why: Why) -> RunError {
    let name = record.name.clone();
    let peer = match before {
        Ownership::HandedOver { to, .. } => to,
        Ownership::Incoming { from, .. } => from,
        Ownership::Owner => String::new(),
    };
    match why {
        Why::RunsThere => RunError::RunsThere { name, to: peer },
        Why::UnknownThere => RunError::UnknownThere { name, to: peer },
        Why::OwnedThere => RunError::OwnedThere { name, from: peer },
        Why::Unheard => RunError::Unheard { name, peer },
        Why::Supplies => RunError::Supplies(name),
        Why::Changed | Why::NameTaken | Why::CopyWaits | Why::CopiesLeft | Why::NotInDoubt => {
            RunError::Settled(name)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use qemu::Process;
    use serde_json::{Value, json};

    use super::*;
    use crate::linked::testing::{Hosts, Says, qemu};
    use host::Origin;
    use ownership::Standing;

    /// What comes of it when a machine is given up that was not seen to run, and whose QEMU says this.
    async fn given_up(says: Says, force: bool) -> Result<(), RunError> {
        let hosts = Hosts::new().await;
        let qmp_socket = hosts.directory.path().join("qmp");
        qemu(&qmp_socket, says);
        let standing = Standing { resuming: true, has_run: false, ..Standing::own() };
        let mut record = Record {
            process: Some(Process::of_pid(std::process::id(), &qmp_socket).unwrap()),
            qmp_socket,
            ..Record::new("web1".parse().unwrap(), standing, Origin::Arrived)
        };
        may_be_given_up(&hosts.b, &mut record, force).await
    }

    fn paused() -> Value {
        json!({"return": {"status": "paused", "running": false}})
    }

    fn vcpu(thread: u32) -> Value {
        json!({"return": [{"cpu-index": 0, "thread-id": thread}]})
    }

    #[tokio::test]
    async fn a_machine_whose_guest_has_run_is_not_given_up_because_somebody_has_paused_it() {
        let idle: Says = |command| match command {
            "query-status" => vec![paused()],
            _ => vec![json!({"return": []})],
        };
        assert!(given_up(idle, false).await.is_ok());
        // This very thread, as if it were a vCPU's.
        let begin = Instant::now();
        let itself = Process::of_pid(std::process::id(), std::path::Path::new("")).unwrap();
        let worked = || qemu::vcpu_cpu_time(&itself, rustix::thread::gettid().as_raw_pid() as u32).unwrap();
        while worked() < Duration::from_millis(600) && begin.elapsed() < Duration::from_secs(60) {}
        let has_run: Says = |command| match command {
            "query-status" => vec![paused()],
            _ => vec![vcpu(rustix::thread::gettid().as_raw_pid() as u32)],
        };
        let refused = given_up(has_run, false).await;
        assert!(matches!(refused, Err(RunError::MayRunHere { .. })), "{refused:?}");
        assert!(given_up(has_run, true).await.is_ok(), "a person's word");
        let silent: Says = |_| Vec::new();
        let refused = given_up(silent, false).await;
        assert!(matches!(refused, Err(RunError::MayRunHere { .. })), "{refused:?}");
    }
}
