//! Why a machine could not be started, taken in, stopped or resumed, with what to do about it.

use finding::Finding;
use host::guest_ram;
use host::lifecycle::RunError;
use migration::ResolveError;
use ownership::{JournalError, VmName};
use qemu::{AdoptError, LaunchError, QmpError};

use crate::error::chain;

/// What a failed start, adoption or resumption comes to.
pub(crate) fn of_run(error: &RunError) -> Finding {
    let (kind, hint) = match error {
        RunError::Journal(JournalError::NameTaken(_)) => {
            ("name-taken", "choose another name, or stop that VM first")
        }
        RunError::Journal(_) => {
            ("journal-unusable", "see the agent's log; the disk of state_dir may be full or damaged")
        }
        RunError::Parse(_) => ("command-line", "correct the QEMU command line"),
        RunError::NotMirrorable(_) => ("not-mirrorable", "start the VM without that"),
        RunError::NameTooLong(_) => ("name-too-long", "choose a shorter name, or a shorter run_dir"),
        RunError::Size(_) => ("memory-size", "correct -m"),
        RunError::RamFile(error) => ("ram-file", guest_ram::hint(error)),
        RunError::Launch(error) => return of_launch(error),
        RunError::Adopt(error) => return of_adopt(error),
        RunError::AlreadyHere { .. } => ("already-here", "use the name that it has here"),
        RunError::Qmp(error) => return of_qmp(error),
        RunError::NoRoom(short) => ("no-room", short.hint()),
        RunError::Forwarded { .. } => {
            ("name-forwarded", "choose another name, or end that with `vmirror release`")
        }
        RunError::MigratedByOthers(_) => (
            "migrated-by-others",
            "see where it runs; what is here of it is ended with `vmirror stop --force`",
        ),
        RunError::Leaving(_) => (
            "in-use",
            "find out where it runs. If that is nowhere else, take the object vmirror-left-by-… out of its QEMU (QMP `object-del`), and start \
             the agent again; if it runs elsewhere, what is here of it is ended with `vmirror stop --force`",
        ),
        RunError::Kept { .. } => (
            "disk-kept",
            "run the VM where it moved to. Only if it runs nowhere and never will, or this is to be another VM, say --stale-disks, or free \
             the image with `vmirror forget-images`",
        ),
        RunError::Stale { .. } => (
            "disk-stale",
            "run the VM where it moved to; to go on from this image all the same, say --stale-disks",
        ),
        _ => ("run-failed", "see the agent's log"),
    };
    Finding::new(kind, chain(error), hint)
}

/// What a person's decision comes to that was not carried out.
pub(crate) fn of_resolution(error: &ResolveError) -> Finding {
    let (kind, hint) = match error {
        ResolveError::Settled(_) => ("settled", "see `vmirror list` for what it is now"),
        ResolveError::RunsThere { .. } => ("runs-there", "nothing is to be done: it runs there"),
        ResolveError::UnknownThere { .. } => {
            ("unknown-there", "look for its QEMU there; once you are certain, say the same with --force")
        }
        ResolveError::Unheard { .. } => (
            "unheard",
            "bring it back so that it can be asked; only if that host is lost for good, or you are certain of what the VM does there, \
             say the same with --force",
        ),
        ResolveError::OwnedThere { .. } => (
            "owned-there",
            "say --give-up here; only if that agent is wrong, and the VM runs nowhere, --run-here --force",
        ),
        ResolveError::CopyLost { .. } => ("copy-lost", "nothing is to be done: see `vmirror list`"),
        ResolveError::RunsHere(_) => ("runs-here", "nothing is to be given up; `vmirror stop` ends it"),
        ResolveError::MayRunHere { .. } => (
            "may-run-here",
            "see what its QEMU does, and end it if it does not answer; only if it is certain never to have run here, say --force",
        ),
        ResolveError::Unsettled { .. } => {
            ("journal-unusable", "see to the disk of state_dir, and say it again")
        }
        ResolveError::Supplies(name) => return supplies(name),
        ResolveError::Lingers(why) => return why.clone(),
        ResolveError::Run(error) => return of_run(error),
    };
    Finding::new(kind, chain(error), hint)
}

/// A machine whose journal cannot be written.
pub(crate) fn unsettled(name: &VmName, error: Option<&JournalError>) -> Finding {
    let why = error.map(|error| format!(": {}", chain(error))).unwrap_or_default();
    Finding::new(
        "journal-unusable",
        format!("whose VM {name} is cannot be put on record{why}"),
        "see to the disk of state_dir: the VM runs on as soon as that can be written",
    )
}

fn of_launch(error: &LaunchError) -> Finding {
    let (kind, hint) = match error {
        LaunchError::Run { .. } => ("qemu-missing", "install QEMU, or give its path"),
        LaunchError::Ended { .. } => ("qemu-ended", "correct what QEMU complains of"),
        LaunchError::Silent { .. } => ("qemu-silent", "see whether the host is overloaded"),
        _ => ("qemu-start", "see the agent's log"),
    };
    Finding::new(kind, chain(error), hint)
}

fn of_adopt(error: &AdoptError) -> Finding {
    let (kind, hint) = match error {
        AdoptError::Qmp(error) => return of_qmp(error),
        AdoptError::NotMirrorable(_) => ("not-mirrorable", "start the VM without that"),
        AdoptError::NotOnCommandLine { .. } => {
            ("not-its-socket", "name a QMP socket of QEMU itself, not of a proxy")
        }
        AdoptError::UnknownDirectory { .. } => {
            ("relative-path", "nothing was changed; the VM runs on as it is")
        }
        AdoptError::NotInUse { .. } => ("not-in-use", "adopt it once it runs or is paused"),
        AdoptError::HotPlugged { .. } => ("hot-plugged", "unplug it, or start the VM with it"),
        AdoptError::Parse(_) => ("command-line", "nothing was changed; the VM runs on as it is"),
        _ => ("adopt-failed", "nothing was changed; see that the agent may look at that process"),
    };
    Finding::new(kind, chain(error), hint)
}

/// What a QEMU that does not do as told comes to.
pub(crate) fn of_qmp(error: &QmpError) -> Finding {
    let (kind, hint) = match error {
        QmpError::Connect { .. } => ("qmp-unreachable", "name the QMP socket of a QEMU that runs"),
        QmpError::Taken { .. } => ("qmp-taken", "nothing was changed"),
        QmpError::NotQmp { .. } => {
            ("not-qmp", "name the QMP socket, not the human monitor's or the serial line's")
        }
        QmpError::Gone { .. } => ("qemu-gone", "see `vmirror list`"),
        QmpError::Deadline { .. } => ("qemu-silent", "see whether the host is overloaded"),
        _ => ("qemu-refused", "see the agent's log"),
    };
    Finding::new(kind, chain(error), hint)
}

/// A guest that was asked to power off and did not.
pub(crate) fn still_runs(name: &ownership::VmName) -> Finding {
    Finding::new(
        "still-runs",
        format!("the guest of {name} was asked to power off and has not"),
        format!("wait for it, or end it with `vmirror stop {name} --force`"),
    )
}

/// A machine whose QEMU does not answer.
pub(crate) fn silent(name: &ownership::VmName, why: &str) -> Finding {
    Finding::new(
        "qemu-silent",
        format!("the QEMU of {name} does not answer: {why}"),
        format!("it is asked again from time to time; `vmirror stop {name} --force` ends it"),
    )
}

/// A machine whose record cannot be read.
pub(crate) fn unreadable(name: &ownership::VmName, error: &JournalError) -> Finding {
    Finding::new(
        "record-unreadable",
        format!("the record of {name} cannot be read: {}", chain(error)),
        format!(
            "nothing is done to the VM or its files. Find out where it runs: ask the agents that it may have moved to or come from, and \
             look for its QEMU here. If the agent that wrote the record was a later version, start that. Otherwise end the QEMU here if \
             it runs elsewhere, move {name}.journal out of state_dir/vms, restart the agent, and `vmirror adopt` the VM if it runs here"
        ),
    )
}

/// What stands against an act that only a person can answer for.
pub(crate) fn unless_forced(why: &Finding) -> Finding {
    Finding { hint: format!("{}; or say --force, if you know all that", why.hint), ..why.clone() }
}

/// Something may start a machine from the images that it has left.
pub(crate) fn started_by(name: &ownership::VmName, found: &Finding) -> Finding {
    Finding::new(
        &found.kind,
        format!("{}: a second copy of {name} would run from the images that are locked here", found.message),
        format!("{}. When nothing starts it here any more, say --force", found.hint),
    )
}

/// A machine that was handed over before its memory was complete.
pub(crate) fn supplies(name: &ownership::VmName) -> Finding {
    Finding::new(
        "post-copy",
        format!("{name} runs at its destination and still lacks memory that only this host has"),
        "see to the link; when it has everything, this host lets go by itself".to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_says_what_to_do() {
        let name: ownership::VmName = "web1".parse().unwrap();
        let socket = std::path::PathBuf::from("/run/web1.qmp");
        let taken = RunError::Qmp(QmpError::Taken { socket });
        let name_taken = RunError::Journal(JournalError::NameTaken(name.clone()));
        for (finding, kind) in [
            (of_run(&taken), "qmp-taken"),
            (of_run(&name_taken), "name-taken"),
            (of_run(&RunError::AlreadyHere { pid: 7, name: name.clone() }), "already-here"),
            (of_run(&RunError::Launch(LaunchError::NoQmp)), "qemu-start"),
            (still_runs(&name), "still-runs"),
            (silent(&name, "no"), "qemu-silent"),
        ] {
            assert_eq!(finding.kind, kind);
            assert!(!finding.hint.is_empty() && !finding.message.is_empty(), "{finding:?}");
        }
        assert!(of_run(&taken).message.contains("/run/web1.qmp"));
    }
}
