//! What a QEMU writes, and its guest on a console that is QEMU's: a file that is kept short while it is written.
//!
//! QEMU outlives its starter, so there is no pipe between the two. It appends to a file; whoever keeps that short copies
//! its end aside and empties it, and QEMU goes on at the beginning.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// How much of the output is looked at, and how many lines of it an error repeats.
const LAST_BYTES: u64 = 8192;
const LAST_LINES: usize = 6;

/// Opens a log for a program that is about to start: to be appended to, and nobody else's.
///
/// # Errors
/// What the system says.
pub(crate) fn open(log: &Path) -> io::Result<File> {
    let mut open = OpenOptions::new();
    open.create(true).append(true).read(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(log)
}

/// Keeps a log and what was cut from it before, together, at about `most` bytes: one that is longer than half of that is copied to
/// `earlier`, in the place of what was there, as far as that has room, and emptied. Of what is written at that very moment a few
/// kilobytes may be lost. Returns whether it was cut.
///
/// # Errors
/// What the system says. The log is as it was then.
pub fn cut(log: &Path, earlier: &Path, most: u64) -> io::Result<bool> {
    // Of the half for what was cut, the last quarter is for what is written meanwhile.
    let (half, more) = (most / 2, most / 8);
    if std::fs::symlink_metadata(log)?.len() <= half {
        return Ok(false);
    }
    let mut from = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(log)?;
    let begin = from.metadata()?.len().saturating_sub(half - more);
    from.seek(SeekFrom::Start(begin))?;
    let new = earlier.with_added_extension("new");
    let mut open = OpenOptions::new();
    let mut to =
        open.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&new)?;
    io::copy(&mut (&mut from).take(half - more), &mut to)?;
    std::fs::rename(&new, earlier)?;
    // What was written meanwhile, so that as little as can be is lost between the last look and the end; but no more than there is
    // room for, of what is written faster than it is copied.
    let mut meanwhile = (&mut from).take(more);
    while io::copy(&mut meanwhile, &mut to)? > 0 {}
    from.set_len(0)?;
    Ok(true)
}

/// The last lines of a log, in one: what a program that has ended has said. None where there is nothing to read.
#[must_use]
pub fn last_words(log: &Path) -> Option<String> {
    File::open(log).and_then(|mut log| tail(&mut log, 0)).ok().and_then(|text| last_lines(&text))
}

/// The same of what was written from `begin` on, for a message.
pub(crate) fn last_words_since(log: &Path, begin: u64) -> String {
    match File::open(log).and_then(|mut log| tail(&mut log, begin)) {
        Ok(text) => last_lines(&text).unwrap_or_else(|| "it wrote nothing".to_owned()),
        Err(_) => "its output cannot be read".to_owned(),
    }
}

fn tail(log: &mut File, begin: u64) -> io::Result<String> {
    let size = log.metadata()?.len();
    // One that was cut meanwhile begins anew.
    let begin = if begin > size { 0 } else { begin };
    log.seek(SeekFrom::Start(begin.max(size.saturating_sub(LAST_BYTES))))?;
    let mut bytes = Vec::new();
    log.take(LAST_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn last_lines(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    (!lines.is_empty()).then(|| lines[lines.len().saturating_sub(LAST_LINES)..].join("; "))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const MOST: u64 = 64 << 10;

    #[test]
    fn a_log_is_cut_at_its_bound_and_keeps_its_end_in_order() {
        let place = tempfile::tempdir().unwrap();
        let (log, earlier) = (place.path().join("a.log"), place.path().join("a.log.1"));
        let mut writer = open(&log).unwrap();
        assert_eq!(log.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!cut(&log, &earlier, MOST).unwrap() && !earlier.exists());
        let mut number = 0;
        let mut write = |bytes: u64| {
            let mut left = bytes;
            while left > 0 {
                writeln!(writer, "{number:015}").unwrap();
                (number, left) = (number + 1, left.saturating_sub(16));
            }
            number
        };
        for round in 0..10 {
            let last = write(MOST * 3);
            assert!(cut(&log, &earlier, MOST).unwrap(), "{round}");
            assert_eq!((log.metadata().unwrap().len(), earlier.metadata().unwrap().len()), (0, MOST / 8 * 3));
            assert!(std::fs::read_to_string(&earlier).unwrap().ends_with(&format!("{:015}\n", last - 1)));
            assert_eq!(earlier.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        // It goes on at the beginning, and one after the other they are what was written last.
        let last = write(MOST / 4);
        assert!(!cut(&log, &earlier, MOST).unwrap());
        let kept = std::fs::read_to_string(&earlier).unwrap() + &std::fs::read_to_string(&log).unwrap();
        let numbers: Vec<u64> = kept.lines().map(|line| line.parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|two| two[1] == two[0] + 1), "{:?}", &numbers[..3]);
        assert_eq!(numbers.last(), Some(&(last - 1)));
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn a_log_that_is_written_all_the_time_is_cut_all_the_same() {
        let place = tempfile::tempdir().unwrap();
        let (log, earlier) = (place.path().join("a.log"), place.path().join("a.log.1"));
        let mut writer = open(&log).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let writing = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                writer.write_all(&[b'x'; 4096]).unwrap();
            }
            writer.write_all(b"\nthe last line\n").unwrap();
        });
        for _ in 0..50 {
            cut(&log, &earlier, MOST).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        ended.store(true, Ordering::Relaxed);
        writing.join().unwrap();
        cut(&log, &earlier, MOST).unwrap();
        assert!(log.metadata().unwrap().len() <= MOST / 2);
        let kept = std::fs::read_to_string(&earlier).unwrap() + &std::fs::read_to_string(&log).unwrap();
        assert!(kept.ends_with("\nthe last line\n"));
    }

    #[test]
    fn last_words_are_of_this_run_and_survive_a_cut() {
        let place = tempfile::tempdir().unwrap();
        let log = place.path().join("a.log");
        std::fs::write(&log, "of an earlier run\n").unwrap();
        let begin = log.metadata().unwrap().len();
        assert_eq!(last_words_since(&log, begin), "it wrote nothing");
        let mut file = OpenOptions::new().append(true).open(&log).unwrap();
        write!(file, "one\n\n  two\n").unwrap();
        assert_eq!(last_words_since(&log, begin), "one; two");
        std::fs::write(&log, "three\n").unwrap();
        assert_eq!(last_words_since(&log, begin), "three");
        assert_eq!(last_words(&log).unwrap(), "three");
        assert_eq!(last_words_since(&place.path().join("none"), 0), "its output cannot be read");
    }
}
