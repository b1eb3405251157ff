//! A machine found again by an agent that was away, or did not see it.

use std::path::PathBuf;

use qemu::{Look, Presence, Process, Qmp, Spec};

use crate::linked::LinkedHost;
use crate::source::disks::Uncleared;
use crate::source::{capabilities, resume};
use destination::network;
use finding::{Finding, chain};
use host::handed_in;
use host::handed_over;
use host::images;
use host::lifecycle::{self, Ran, RunError, forget_decided, raise_taps};
use host::{Record, Vm};
use ownership::{self, Effect, Event, OnRecord as _, Qemu as Found};
use ownership::{Ownership, VmName};

/// What became of a machine while the agent was away.
#[derive(Debug)]
pub enum Recovered {
    /// It is this host's, and QEMU is there.
    Running(Box<Vm>),
    /// It has ended, or was a copy that was never complete: nothing is left of it.
    Gone(VmName),
    /// It was given away, or is a complete copy that may not run yet: the source, the destination or a person decides.
    Uncertain(Record),
    /// Its QEMU is there but does not answer, or it cannot be told whether it is there.
    Silent(Record, String),
    /// The name is by now that of another machine, or of a copy on its way here.
    Replaced(VmName),
}

/// When somebody looks what became of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The agent starts: nobody else knows anything of the machine yet.
    Start,
    /// It was lost sight of.
    Later,
}

/// Finds out what became of a machine while the agent was away, or did not see it, and puts right what a crash has left half-done.
///
/// A machine that is this host's and that its own switch-over had paused runs again: the destination was never told to
/// run it, because that is only done after the journal says so.
pub async fn recover(host: &LinkedHost, record: Record, when: When) -> Recovered {
    // The caller's may be older than what was put on record since: that its memory has become complete, among others.
    let was_incomplete = is_incomplete(&record);
    let record = match host.journal.get(&record.name) {
        Some(now) if now.claim() == record.claim() => now,
        // It may be on its way back here, as a copy, when who knew it as it was looks for it.
        Some(_) => return Recovered::Replaced(record.name),
        None => return Recovered::Gone(record.name),
    };
    if when == When::Later && is_incomplete(&record) && !was_incomplete {
        return Recovered::Replaced(record.name);
    }
    // What cannot be told to have ended counts as running here: nothing of it is thrown away.
    let look = record.process.as_ref().map_or(Look::Gone, Process::look);
    if !look.is_gone()
        && let Err(why) = destination::post_copy::recover(host, &record).await
    {
        return Recovered::Silent(record, why);
    }
    let mut kept = None;
    let presence = match (&record.ownership, &record.process) {
        (Ownership::HandedOver { .. }, _) => {
            let found = if look.is_gone() { Found::Gone } else { Found::Switched };
            let effects = ownership::on(Some(&record.standing()), Event::Found(found)).effects;
            if when == When::Start && effects.contains(&Effect::Abandon) {
                crate::source::abandon_all(host, &record);
            }
            return Recovered::Uncertain(record);
        }
        (Ownership::Incoming { ready, .. }, _) => match look {
            Look::Runs if *ready => Found::There,
            Look::Runs => match lifecycle::has_run(&record, None).await {
                Ran::Never | Ran::Idle(_) => Found::There,
                Ran::Has(status) => {
                    kept = Some(lifecycle::runs_here(&record, &status));
                    Found::Ran
                }
                Ran::Unheard(why) => {
                    return keep(host, record.clone(), lifecycle::may_run_here(&record, &why));
                }
            },
            Look::Gone => Found::Gone,
            Look::CannotTell(_) if *ready => Found::Unclear,
            Look::CannotTell(e) => {
                let why = format!("it cannot be told whether it runs: {}", chain(&e));
                return Recovered::Silent(record, why);
            }
        },
        (Ownership::Owner, None) => Found::Gone,
        (Ownership::Owner, Some(process)) => match qemu::find(process).await {
            Presence::Gone => Found::Gone,
            Presence::Silent(e) => return Recovered::Silent(record, chain(&e)),
            Presence::CannotTell(e) => {
                let why = format!("it cannot be told whether it runs: {}", chain(&e));
                return Recovered::Silent(record, why);
            }
            Presence::Alive => {
                // It may be let run: who decides meanwhile that it is not to be waits.
                let _deciding = host.journal.decide(&record.name).await;
                let Some(record) = host.journal.get(&record.name).filter(|now| now.claim() == record.claim())
                else {
                    return Recovered::Replaced(record.name);
                };
                return match reconnect(host, record.clone()).await {
                    Ok(vm) => {
                        host.guest_addresses.listen(&vm.record, &vm.spec);
                        Recovered::Running(Box::new(vm))
                    }
                    Err(e) => Recovered::Silent(record, chain(&e)),
                };
            }
        },
    };
    let _deciding = host.journal.decide(&record.name).await;
    let Some(record) = host.journal.get(&record.name).filter(|now| now.claim() == record.claim()) else {
        return Recovered::Replaced(record.name);
    };
    match ownership::on(Some(&record.standing()), Event::Found(presence)).effects.first() {
        Some(Effect::Discard(mark)) => match forget_decided(host, &record, None, *mark).await {
            Ok(()) => Recovered::Gone(record.name),
            Err(lingers) => Recovered::Silent(record, lingers.message),
        },
        Some(Effect::Doubt) => match kept {
            Some(why) => keep(host, record, why),
            None => {
                Recovered::Silent(record, "QEMU has ended, and the VM was not seen to run here".to_owned())
            }
        },
        _ => Recovered::Uncertain(record),
    }
}

/// Nothing of it is touched, and who asks for it is told why.
fn keep(host: &LinkedHost, record: Record, why: Finding) -> Recovered {
    let message = why.message.clone();
    host.lingering.note(&record.name, &Err(why));
    Recovered::Silent(record, message)
}

fn is_incomplete(record: &Record) -> bool {
    matches!(record.ownership, Ownership::Incoming { ready: false, .. })
}

/// Connects to the QEMU of a machine of this host, has it run if that is what it was about, and takes out of it what an agent has left
/// there that was killed.
pub(crate) async fn reconnect(host: &LinkedHost, mut record: Record) -> Result<Vm, RunError> {
    let spec = Spec::parse(&record.argv)?;
    let mut handed_in = record.handed_in.clone();
    if let Some(process) = record.process.as_ref().filter(|_| handed_in.is_empty()) {
        // Not on record of an agent that did not look for them.
        handed_in = handed_in::to(process, &spec).await;
    }
    let qmp = Qmp::connect(&record.qmp_socket).await?;
    if let Some(session) = record.arrived_by {
        host.post_copies.monitor(session, qmp.clone());
    }
    let status = qmp.status().await?.status;
    let alone = record.saves_devices_alone();
    let found = match status.as_str() {
        "finish-migrate" | "postmigrate" if alone => return Err(RunError::MigratedByOthers(record.name)),
        "finish-migrate" | "postmigrate" => Found::Switched,
        // As one that has migrated, though QEMU does not say so.
        "paused" | "prelaunch" if alone && !record.switching && handed_over::is_marked(&qmp).await? => {
            Found::Switched
        }
        // A guest that has reset itself in the moment in which it was stopped is as before its launch.
        "paused" | "prelaunch" if record.pauses => Found::Held,
        _ => Found::There,
    };
    let switching = record.switching;
    let effects = ownership::on(Some(&record.standing()), Event::Found(found)).effects;
    if effects.contains(&Effect::Doubt) {
        return Err(if alone {
            RunError::Leaving(record.name)
        } else {
            RunError::MigratedByOthers(record.name)
        });
    }
    if effects.contains(&Effect::Resume) {
        tracing::warn!(vm = %record.name, status, "resuming a VM that was paused when the agent ended");
        raise_taps(&record).await;
        // QEMU locks its images itself when it is told to run, and finds them free.
        host.fence.hand_to(&record.name, || resume::resume_here(&qmp, alone)).await?;
        network::turn(host, &record, &qmp);
    } else if switching && !alone {
        // A stream of ours that was under way has lost its reader; QEMU ends it by itself, or is told to.
        let _ = qmp.migrate_cancel().await;
    }
    // It has its images, whatever was kept of an earlier stay.
    host.fence.taken(images::written(&spec).iter().map(PathBuf::as_path));
    host.fence.take_again(&record.name).await;
    if crate::source::disks::has_jobs(&qmp).await {
        // It is stopped while they are given up.
        host.journal.amend(&mut record, |now| now.pauses = true)?;
    }
    host::places::give(host, &record);
    match crate::source::disks::clear_after(host, &record.name, &qmp).await {
        Ok(()) => {}
        // It is on record that it is to be resumed.
        Err(Uncleared::Stopped(e)) => return Err(e.into()),
        Err(Uncleared::There(e)) => {
            tracing::error!(vm = %record.name, error = chain(&e), "QEMU keeps a copy job of ours");
        }
    }
    match &record.settings {
        Some(before) => before.restore(&qmp).await,
        // Of an agent that did not put on record what QEMU was set to.
        None if switching && !alone => capabilities::reset(&qmp).await,
        None => {}
    }
    if alone {
        resume::unmark(&qmp).await;
    }
    let as_it_is = |now: &mut Record| {
        now.pauses = false;
        now.settings = None;
        now.handed_in = handed_in;
    };
    host.journal.on(&mut record, Event::Resumed, as_it_is)?;
    if effects.contains(&Effect::Abandon) {
        crate::source::abandon_all(host, &record);
    }
    Ok(Vm { record, spec, qmp })
}
