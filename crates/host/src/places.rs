//! The names by which a machine's users know its sockets, given to them when the machine is this host's.
//!
//! A QEMU that waits for a machine has its sockets in a directory of the agent's own: the QEMU at the source may see the same paths, and
//! still has them. When the machine runs here, each gets its name back by a link. Nothing is ever put over anything that is there, but
//! over a link of an agent's own that leads nowhere; so what is in the way is waited for: where both hosts see the path, the source's
//! QEMU takes its socket away when it ends.

use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use qemu::spec::render::{Place, Way};

use crate::host::Host;
use crate::paths::Paths;
use crate::vm::Record;
use ownership::{Ownership, VmName};

/// Between two looks at what was in the way, at first and at last.
const SOON: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_secs(5);
/// For how long is looked whether what is in the way has gone.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Gives a machine's sockets their names, now or as soon as nothing is in the way.
pub fn give(host: &Host, record: &Record) {
    let mut left = record.made.places.clone();
    left.retain(|place| !is_given(host, record, place));
    if left.is_empty() {
        return;
    }
    let (host, name, session) = (host.clone(), record.name.clone(), record.arrived_by);
    tokio::spawn(async move {
        let (mut pause, mut waited) = (SOON, Duration::ZERO);
        while waited < PATIENCE {
            tokio::time::sleep(pause).await;
            waited += pause;
            pause = (pause * 2).min(LATER);
            // One that has left by now has no names here any more.
            let _deciding = host.journal.decide(&name).await;
            let ours = |record: &Record| record.ownership == Ownership::Owner && record.arrived_by == session;
            let Some(record) = host.journal.get(&name).filter(ours) else { return };
            left.retain(|place| !is_given(&host, &record, place));
            if left.is_empty() {
                return;
            }
        }
        for place in left {
            tracing::warn!(
                vm = %name,
                wanted = %place.wanted.display(),
                place = %place.own.display(),
                "something else is where a socket of the VM's was; it stays where it is"
            );
        }
    });
}

/// Takes the names back of a machine that is not here any more.
pub(crate) fn take_back(record: &Record) {
    for place in record.made.places.iter().filter(|place| place.way == Way::Offered) {
        if std::fs::read_link(&place.wanted).is_ok_and(|leads| leads == place.own) {
            let _ = std::fs::remove_file(&place.wanted);
        }
    }
}

/// A machine's command line as its users know it, for another host: with the names of its sockets instead of where they are here, and
/// without the pid file that only this agent wanted.
pub fn by_their_names(host: &Host, record: &Record, argv: Vec<String>) -> Vec<String> {
    let own_pid_file = Paths::of(host, &record.name).pid;
    // A name may be the beginning of another one.
    let mut places: Vec<&Place> = record.made.places.iter().collect();
    places.sort_by_key(|place| std::cmp::Reverse(place.own.as_os_str().len()));
    let mut told = Vec::with_capacity(argv.len());
    let mut arguments = argv.into_iter().peekable();
    while let Some(argument) = arguments.next() {
        let is_own = |value: &String| Path::new(value) == own_pid_file;
        if argument == "-pidfile" && arguments.peek().is_some_and(is_own) {
            arguments.next();
            continue;
        }
        told.push(places.iter().fold(argument, |argument, place| {
            argument.replace(&*place.own.to_string_lossy(), &place.wanted.to_string_lossy())
        }));
    }
    told
}

/// Whether a place has its name, or is not to have one.
fn is_given(host: &Host, record: &Record, place: &Place) -> bool {
    let permissions = host.allow.permissions();
    if !permissions.may_place(place) {
        tracing::info!(
            vm = %record.name,
            wanted = %place.wanted.display(),
            place = %place.own.display(),
            "a socket of the VM's is where [allow] socket_dirs lets it be"
        );
        return true;
    }
    let (link, target) = match place.way {
        Way::Offered => (&place.wanted, &place.own),
        Way::Sought => (&place.own, &place.wanted),
    };
    match link_to(target, link, &host.run_dir) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => {
            named_not(&record.name, link, &error);
            true
        }
    }
}

fn named_not(vm: &VmName, link: &Path, error: &io::Error) {
    tracing::warn!(%vm, wanted = %link.display(), %error, "a socket of the VM's cannot be given its name");
}

/// Makes a link, over nothing but one of an agent's that leads nowhere.
fn link_to(target: &Path, link: &Path, run_dir: &Path) -> io::Result<()> {
    match symlink(target, link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match std::fs::read_link(link) {
            Ok(leads) if leads == target => Ok(()),
            Ok(leads) if leads.starts_with(run_dir) && std::fs::symlink_metadata(&leads).is_err() => {
                std::fs::remove_file(link)?;
                symlink(target, link)
            }
            _ => Err(error),
        },
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_put_over_what_is_there_but_over_a_dead_link_of_ours() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let run_dir = at("run");
        std::fs::create_dir(&run_dir).unwrap();
        let (target, other, elsewhere) =
            (run_dir.join("b/socket1"), run_dir.join("a/socket1"), at("elsewhere"));
        link_to(&target, &at("free"), &run_dir).unwrap();
        link_to(&target, &at("free"), &run_dir).unwrap();
        symlink(&other, at("dead")).unwrap();
        link_to(&target, &at("dead"), &run_dir).unwrap();
        assert_eq!(std::fs::read_link(at("dead")).unwrap(), target);
        symlink(&elsewhere, at("theirs")).unwrap();
        std::fs::write(at("file"), "x").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::create_dir(run_dir.join("a")).unwrap();
        std::fs::write(&other, "").unwrap();
        symlink(&other, at("lives")).unwrap();
        for name in ["theirs", "file", "socket", "lives"] {
            let error = link_to(&target, &at(name), &run_dir).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{name}");
        }
    }
}
