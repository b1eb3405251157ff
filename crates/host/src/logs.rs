//! What the QEMUs of this host write, and guests on consoles that are QEMU's: a file for each, of bounded length, that is kept for a
//! while after the machine has gone.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ownership::VmName;

/// How long, and of how many machines that have gone, logs are kept.
const KEPT: (Duration, usize) = (Duration::from_secs(30 * 86_400), 100);
/// How long a log may become unless configured otherwise, in bytes.
pub const DEFAULT_MOST: u64 = 16 << 20;
/// The least bound: a QEMU's last words have to fit.
pub const LEAST_MOST: u64 = 64 << 10;

/// What the log of a machine that is here ends with, what was cut from it, and what that of one that has gone ends with.
const LIVE: &str = "log";
const EARLIER: &str = "1";
const ENDED: &str = "log-ended";

/// The logs of a host's machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logs {
    directory: PathBuf,
    most: u64,
}

impl Logs {
    /// In a directory; each, with what was cut from it, is at most about so many bytes.
    #[must_use]
    pub fn new(directory: &Path, most: u64) -> Logs {
        Logs { directory: directory.to_owned(), most }
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The log of a machine that is here.
    #[must_use]
    pub fn of(&self, name: &VmName) -> PathBuf {
        self.directory.join(format!("{name}.{LIVE}"))
    }

    /// That of the last machine of this name that has gone.
    #[must_use]
    pub fn of_ended(&self, name: &VmName) -> PathBuf {
        self.directory.join(format!("{name}.{ENDED}"))
    }

    /// Whether a file of that name is the log of a machine that is here.
    #[must_use]
    pub fn is_live(file: &OsStr) -> bool {
        Path::new(file).extension() == Some(OsStr::new(LIVE))
    }

    /// Cuts a log that has become too long. It need not be in this directory: earlier versions had it among the sockets.
    pub fn bound(&self, log: &Path) {
        let Some(name) = log.file_name() else { return };
        let earlier = self.directory.join(name).with_added_extension(EARLIER);
        match qemu::cut_log(log, &earlier, self.most) {
            Ok(true) => tracing::debug!(log = %log.display(), "cut"),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(log = %log.display(), %error, "cannot be cut, and grows"),
        }
    }

    /// Cuts all logs in a directory that have become too long.
    pub fn bound_all(&self, directory: &Path) {
        for file in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if Logs::is_live(&file.file_name()) {
                self.bound(&file.path());
            }
        }
    }

    /// The last that the QEMU of a machine has said, here or before it went; none where it said nothing.
    pub fn last_words(&self, name: &VmName) -> Option<String> {
        let live = self.of(name);
        let log = if live.exists() { live } else { self.of_ended(name) };
        qemu::last_words(&log)
    }

    /// A machine has gone: its log becomes that of the last one of its name. Of one that was only tried, nothing is kept.
    pub(crate) fn ended(&self, name: &VmName, tried: bool) {
        let (live, ended) = (self.of(name), self.of_ended(name));
        let earlier = |log: &Path| log.with_added_extension(EARLIER);
        let said = |log: &Path| std::fs::metadata(log).is_ok_and(|log| log.len() > 0);
        if tried || !said(&live) && !said(&earlier(&live)) {
            remove(&live);
            remove(&earlier(&live));
            return;
        }
        // What is older first: whoever does this again after a crash in between finds it done.
        match std::fs::rename(earlier(&live), earlier(&ended)) {
            Ok(()) => {}
            Err(_) => remove(&earlier(&ended)),
        }
        if let Err(error) = std::fs::rename(&live, &ended) {
            tracing::error!(log = %live.display(), %error, "cannot be kept");
        }
        self.expire();
    }

    /// Removes logs of machines that have gone long ago, or of too many.
    pub fn expire(&self) {
        let ended = |file: &Path| file.extension() == Some(OsStr::new(ENDED));
        let files = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let modified = |file: &Path| std::fs::metadata(file).and_then(|file| file.modified()).ok();
        let files = files.map(|file| file.path()).filter(|file| ended(file));
        let mut files: Vec<(SystemTime, PathBuf)> =
            files.filter_map(|file| Some((modified(&file)?, file))).collect();
        files.sort_by(|a, b| b.cmp(a));
        let (age, number) = KEPT;
        for (place, (at, file)) in files.iter().enumerate() {
            if place >= number || at.elapsed().is_ok_and(|elapsed| elapsed > age) {
                remove(file);
                remove(&file.with_added_extension(EARLIER));
            }
        }
    }
}

fn remove(file: &Path) {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::error!(file = %file.display(), %error, "cannot be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> VmName {
        name.parse().unwrap()
    }

    #[test]
    fn the_log_of_a_machine_that_has_gone_is_kept_and_of_one_that_said_nothing_or_was_only_tried_is_not() {
        let place = tempfile::tempdir().unwrap();
        let logs = Logs::new(place.path(), LEAST_MOST);
        let vm = name("web.log");
        let read = |file: &Path| std::fs::read_to_string(file).ok();
        assert_eq!(logs.last_words(&vm), None);
        std::fs::write(logs.of(&vm), "it crashed\n").unwrap();
        assert_eq!(logs.last_words(&vm).unwrap(), "it crashed");
        logs.ended(&vm, false);
        assert_eq!(
            (read(&logs.of(&vm)), read(&logs.of_ended(&vm)).unwrap()),
            (None, "it crashed\n".to_owned())
        );
        assert_eq!(logs.last_words(&vm).unwrap(), "it crashed");
        // Done again, as after a crash in between, and after machines of which there is nothing to tell.
        logs.ended(&vm, false);
        std::fs::write(logs.of(&vm), "").unwrap();
        logs.ended(&vm, false);
        std::fs::write(logs.of(&vm), "only tried").unwrap();
        logs.ended(&vm, true);
        assert_eq!(read(&logs.of_ended(&vm)).unwrap(), "it crashed\n");
        assert!(!logs.of(&vm).exists());
        assert!(
            Logs::is_live(logs.of(&vm).file_name().unwrap())
                && !Logs::is_live(logs.of_ended(&vm).file_name().unwrap())
        );
    }

    #[test]
    fn what_was_cut_goes_with_its_log_and_is_bounded_with_it() {
        let place = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let logs = Logs::new(place.path(), LEAST_MOST);
        let vm = name("web1");
        let whole = |vm: &VmName| {
            let parts = [logs.of(vm).with_added_extension(EARLIER), logs.of(vm)];
            parts.iter().map(|part| std::fs::metadata(part).map_or(0, |part| part.len())).sum::<u64>()
        };
        std::fs::write(logs.of(&vm), vec![b'x'; 10 * LEAST_MOST as usize]).unwrap();
        logs.bound_all(place.path());
        assert_eq!(whole(&vm), LEAST_MOST / 8 * 3);
        // One among the sockets, where an earlier version had it.
        let old = other.path().join("web2.log");
        std::fs::write(&old, vec![b'x'; LEAST_MOST as usize]).unwrap();
        std::fs::write(other.path().join("web2.qmp"), vec![b'x'; LEAST_MOST as usize]).unwrap();
        logs.bound_all(other.path());
        assert_eq!((old.metadata().unwrap().len(), whole(&name("web2"))), (0, LEAST_MOST / 8 * 3));
        assert_eq!(other.path().join("web2.qmp").metadata().unwrap().len(), LEAST_MOST);

        logs.ended(&vm, false);
        assert_eq!(whole(&vm), 0);
        let earlier = logs.of_ended(&vm).with_added_extension(EARLIER);
        assert_eq!(earlier.metadata().unwrap().len(), LEAST_MOST / 8 * 3);
        std::fs::write(logs.of(&vm), "another one").unwrap();
        logs.ended(&vm, false);
        assert!(!earlier.exists(), "of the machine before");
    }

    #[test]
    fn logs_of_long_ago_and_of_too_many_are_removed() {
        let place = tempfile::tempdir().unwrap();
        let logs = Logs::new(place.path(), LEAST_MOST);
        let made: Vec<VmName> = (0..KEPT.1 + 3).map(|number| name(&format!("vm{number:03}"))).collect();
        let now = SystemTime::now();
        for (number, vm) in made.iter().enumerate() {
            let file = std::fs::File::create(logs.of_ended(vm)).unwrap();
            file.set_modified(now - Duration::from_secs(1000) + Duration::from_secs(number as u64)).unwrap();
        }
        let old = std::fs::File::open(logs.of_ended(&made[50])).unwrap();
        old.set_modified(now - KEPT.0 - Duration::from_secs(1)).unwrap();
        logs.expire();
        let there: Vec<bool> = made.iter().map(|vm| logs.of_ended(vm).exists()).collect();
        assert_eq!(there.iter().filter(|there| **there).count(), KEPT.1);
        assert!(!there[0] && !there[1] && !there[50] && there[3] && there[KEPT.1 + 2], "{there:?}");
    }
}
