//! How long each test has its testbed: what the time of a suite goes to.

use std::fs::File;
use std::io::Write as _;
use std::thread;
use std::time::Instant;

/// Names the file that is added to, a line for each testbed: seconds, a tab, the test. None where it is not set.
const FILE: &str = "TEST_TIMES";

/// Notes from when to when there was a testbed.
#[derive(Debug)]
pub(crate) struct Timed {
    test: String,
    since: Instant,
}

impl Timed {
    pub(crate) fn begin() -> Timed {
        // The harness names a test's thread after it.
        let test = thread::current().name().unwrap_or("(another thread)").to_owned();
        Timed { test, since: Instant::now() }
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        let Some(path) = std::env::var_os(FILE) else { return };
        let line = format!("{:.1}\t{}\n", self.since.elapsed().as_secs_f64(), self.test);
        // One write to a file that is appended to stays in one piece, whoever else writes.
        let written = File::options()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        if let Err(error) = written {
            eprintln!("testbed: {}: {error}", path.display());
        }
    }
}
