//! What a person decides about a machine in doubt, carried out.

use crate::linked::LinkedHost;
use crate::recover::reconnect;
use crate::source::Settled;
use finding::Finding;
use host::lifecycle::{self, Ran, RunError, ended, forget_decided, has_own_disks, own_disks};
use host::{Record, Vm};
use ownership::{Asked, Effect, Event, Why};
use ownership::{Outgoing, Ownership, VmName};

/// What a person decided about a machine in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// It runs here; the person has made sure that it runs nowhere else.
    RunHere,
    /// It does not run here any more; what is here of it is thrown away.
    GiveUp,
}

/// Why what a person decided about a machine in doubt was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// It was in doubt when it was looked at, and is not any more.
    #[error("VM {0} has settled its hand-over in the meantime")]
    Settled(VmName),
    /// It was handed over and runs at its destination.
    #[error("VM {name} runs on {to}")]
    RunsThere {
        /// The machine.
        name: VmName,
        /// Name of the destination agent.
        to: String,
    },
    /// The agent that it was handed over to answers, and knows nothing of it.
    #[error(
        "{to} knows nothing of VM {name}: its state directory may have been lost, and the VM may run there"
    )]
    UnknownThere {
        /// The machine.
        name: VmName,
        /// Name of the destination agent.
        to: String,
    },
    /// The agent that it comes from says that it is its own.
    #[error("{from} says that VM {name} is its own: what is here is a copy that is worth nothing")]
    OwnedThere {
        /// The machine.
        name: VmName,
        /// Name of the source agent.
        from: String,
    },
    /// The other agent of its hand-over could not be asked.
    #[error("{peer} cannot be asked what it has of VM {name}")]
    Unheard {
        /// The machine.
        name: VmName,
        /// Name of that agent.
        peer: String,
    },
    /// It never ran at its destination, and never will: it is this host's again.
    #[error("{to} has no copy of VM {name} and never ran it: the VM is this host's again, and runs on here")]
    CopyLost {
        /// The machine.
        name: VmName,
        /// Name of the destination agent.
        to: String,
    },
    /// The journal may say either that it is this host's or that it was handed over.
    #[error("what becomes of VM {name} cannot be put on record: {why}")]
    Unsettled {
        /// The machine.
        name: VmName,
        /// What the journal says.
        why: String,
    },
    /// It was not seen to run here, and does.
    #[error("VM {0} runs here")]
    RunsHere(VmName),
    /// It was not seen to run here, and its QEMU cannot be asked.
    #[error("VM {name} may run here: {why}")]
    MayRunHere {
        /// The machine.
        name: VmName,
        /// Why it cannot be told.
        why: String,
    },
    /// Its destination lacks memory that is only here.
    #[error("VM {0} runs at its destination and lacks memory that is only here")]
    Supplies(VmName),
    /// A process of it does not end, or nobody can tell whether it has.
    #[error("{}", .0.message)]
    Lingers(Finding),
    /// It cannot be run here, or that cannot be put on record.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Carries out what a person decided about a machine in doubt. Who can be asked is asked first; with `force` the machine is run here
/// even where the other agent cannot be asked, says that it is its own, or knows nothing of it, but not where it has run it.
///
/// # Errors
/// [`ResolveError`] when QEMU is not there to be resumed, or something else than what the person saw is true by now.
pub async fn resolve(
    host: &LinkedHost,
    record: Record,
    resolution: Resolution,
    force: bool,
) -> Result<Option<Vm>, ResolveError> {
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
        return Err(ResolveError::Settled(record.name));
    }
    // The person has decided about what they saw; the machine may have settled its fate in the meantime.
    let deciding = host.journal.decide(&record.name).await;
    let Some(mut record) = host.journal.get(&record.name).filter(|now| now.claim() == record.claim()) else {
        return Err(ResolveError::Settled(record.name));
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
    });
    let effects = effects.map_err(RunError::from)?;
    match effects.first() {
        Some(Effect::Refuse(why)) => Err(refused(&record, before, *why)),
        Some(Effect::Discard(mark)) => {
            let ended = forget_decided(host, &record, None, *mark).await;
            drop(deciding);
            ended.map(|()| None).map_err(ResolveError::Lingers)
        }
        _ => {
            own_disks(host, &images);
            if let Ownership::HandedOver { session, .. } = before {
                host.forwards.undo(session).await;
            }
            Ok(Some(reconnect(host, record).await?))
        }
    }
}

/// Whether a machine that a person does not want here may go: who can be asked is asked. A destination is told once more that the machine
/// is its own; a QEMU that may run it has the last word.
async fn may_be_given_up(host: &LinkedHost, record: &mut Record, force: bool) -> Result<(), ResolveError> {
    let name = record.name.clone();
    match record.ownership.clone() {
        Ownership::Incoming { .. } => Ok(()),
        Ownership::HandedOver { to, .. } => match crate::source::settle(host, record).await {
            Ok(Settled::RunsThere) => Ok(()),
            Ok(Settled::RunsHere) => Err(ResolveError::CopyLost { name, to }),
            Ok(Settled::Unknown | Settled::UnknownThere | Settled::OtherKeeper) if force => Ok(()),
            Ok(Settled::UnknownThere | Settled::OtherKeeper) => Err(ResolveError::UnknownThere { name, to }),
            Ok(Settled::Unknown) => Err(ResolveError::Unheard { name, peer: to }),
            Err(failure) => Err(ResolveError::Unsettled { name, why: failure.finding.message }),
        },
        Ownership::Owner => {
            // A guest that somebody has paused has run all the same, which its vCPUs tell.
            match lifecycle::has_run(record, None).await {
                Ran::Never => Ok(()),
                Ran::Has(status) if status == "running" => Err(ResolveError::RunsHere(name)),
                Ran::Has(_) | Ran::Idle(_) | Ran::Unheard(_) if force => Ok(()),
                Ran::Has(status) => {
                    let why = format!("QEMU says {status}, and its guest has run");
                    Err(ResolveError::MayRunHere { name, why })
                }
                // It was told to run: one that has hardly worked may have written to its disks.
                Ran::Idle(why) | Ran::Unheard(why) => Err(ResolveError::MayRunHere { name, why }),
            }
        }
    }
}

fn refused(record: &Record, before: Ownership, why: Why) -> ResolveError {
    let name = record.name.clone();
    let peer = match before {
        Ownership::HandedOver { to, .. } => to,
        Ownership::Incoming { from, .. } => from,
        Ownership::Owner => String::new(),
    };
    match why {
        Why::RunsThere => ResolveError::RunsThere { name, to: peer },
        Why::UnknownThere => ResolveError::UnknownThere { name, to: peer },
        Why::OwnedThere => ResolveError::OwnedThere { name, from: peer },
        Why::Unheard => ResolveError::Unheard { name, peer },
        Why::Supplies => ResolveError::Supplies(name),
        Why::Changed | Why::NameTaken | Why::CopyWaits | Why::CopiesLeft | Why::NotInDoubt => {
            ResolveError::Settled(name)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use qemu::Process;
    use serde_json::{Value, json};

    use super::*;
    use host::Origin;
    use ownership::Standing;
    use testing::{Hosts, Says, qemu};

    /// What comes of it when a machine is given up that was not seen to run, and whose QEMU says this.
    async fn given_up(says: Says, force: bool) -> Result<(), ResolveError> {
        let hosts = Hosts::new().await;
        let qmp_socket = hosts.directory.path().join("qmp");
        qemu(&qmp_socket, says);
        let standing = Standing { resuming: true, has_run: false, ..Standing::own() };
        let mut record = Record {
            process: Some(Process::of_pid(std::process::id(), &qmp_socket).unwrap()),
            qmp_socket,
            ..Record::new("web1".parse().unwrap(), standing, Origin::Arrived)
        };
        may_be_given_up(&LinkedHost::of(hosts.b.clone()), &mut record, force).await
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
        assert!(matches!(refused, Err(ResolveError::MayRunHere { .. })), "{refused:?}");
        assert!(given_up(has_run, true).await.is_ok(), "a person's word");
        let silent: Says = |_| Vec::new();
        let refused = given_up(silent, false).await;
        assert!(matches!(refused, Err(ResolveError::MayRunHere { .. })), "{refused:?}");
    }
}
