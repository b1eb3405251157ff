//! PostgreSQL in a guest, asked and kept busy from the client host: what it committed, and how long its clients waited.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use super::Client;
use crate::programs::Postgresql;
use crate::running::POLL;
use crate::tool::tail;
use crate::{TestbedError, fault};

/// The database, and who may do anything with it: as set-up made them.
const DATABASE: &str = "pgbench";
const USER: &str = "postgres";
/// How long a connection for a question may take, in seconds.
const CONNECT: &str = "10";
/// How long pgbench works at most, in seconds: longer than any test.
const WORK: &str = "36000";

/// pgbench at work on a guest's database. Killed when dropped, if it has not ended.
#[derive(Debug)]
pub struct Pgbench {
    child: Child,
    directory: PathBuf,
}

/// What became of pgbench's transactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgbenchReport {
    /// How it exited: with 0 only where no client had to give up.
    pub status: ExitStatus,
    /// All that it said on standard error.
    pub complaints: String,
    /// Its account of the transactions.
    pub summary: Summary,
    /// Its log of them.
    pub log: Log,
}

/// pgbench's account of its transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// How many were committed, and a client was told so.
    pub processed: u64,
    /// How many were not.
    pub failed: u64,
}

/// pgbench's log of single transactions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// How long the longest of them took.
    pub longest: Duration,
    /// When each was committed.
    pub commits: Vec<SystemTime>,
}

impl Client {
    /// Carries out SQL in a guest's database for pgbench and gives back what it says: a line for each row, with `|` between columns.
    ///
    /// # Errors
    /// Where psql fails, with what it says: nobody listens, or the SQL is refused.
    pub fn sql(&self, postgresql: &Postgresql, guest: Ipv4Addr, sql: &str) -> Result<String, TestbedError> {
        let mut command = self.command(&postgresql.psql);
        command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", USER, "-d", DATABASE, "-h"]);
        command.arg(guest.to_string()).args(["-c", sql]).env("PGCONNECT_TIMEOUT", CONNECT);
        let output = command.output().map_err(not_started(&postgresql.psql))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(TestbedError::Tool { command: format!("psql {guest}: {sql}"), message });
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Starts pgbench with that many connections to a guest's database, each committing one transaction after the other until
    /// it is stopped. Its logs are left in a directory that is empty.
    ///
    /// # Errors
    /// Where it cannot be started, or the directory not be written.
    pub fn pgbench(
        &self,
        postgresql: &Postgresql,
        guest: Ipv4Addr,
        connections: u32,
        directory: &Path,
    ) -> Result<Pgbench, TestbedError> {
        let mut command = self.command(&postgresql.pgbench);
        // In one thread: its log is one file. Without a vacuum first, which would take away what is in the history.
        command.args(["--no-vacuum", "--jobs", "1", "--time", WORK, "--client", &connections.to_string()]);
        command.arg("--log").arg("--log-prefix").arg(directory.join(TRANSACTIONS));
        command.args(["-U", USER, "-h", &guest.to_string(), DATABASE]);
        let file = |name: &str| {
            let path = directory.join(name);
            File::create(&path).map_err(TestbedError::file(path))
        };
        let child = command.stdout(file(OUTPUT)?).stderr(file(COMPLAINTS)?).spawn();
        let child = child.map_err(not_started(&postgresql.pgbench))?;
        Ok(Pgbench { child, directory: directory.to_owned() })
    }
}

/// The files in pgbench's directory; the first is followed by its process's number.
const TRANSACTIONS: &str = "transactions";
const OUTPUT: &str = "output";
const COMPLAINTS: &str = "complaints";

fn not_started(program: &Path) -> impl FnOnce(std::io::Error) -> TestbedError {
    let program = program.display().to_string();
    move |source| TestbedError::Start { program, source }
}

impl Pgbench {
    /// Whether it has ended, which it does by itself only if all clients had to give up.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Has every connection come to the end of its transaction, and reports.
    ///
    /// # Errors
    /// [`TestbedError::Timeout`] where they do not, [`TestbedError::Answer`] where it says nothing that can be understood.
    pub fn stop(mut self, within: Duration) -> Result<PgbenchReport, TestbedError> {
        // What it sets its own alarm clock for: the time to work is over.
        fault::signal(self.child.id().cast_signed(), Signal::ALARM);
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if start.elapsed() < within => thread::sleep(POLL),
                Ok(None) => {
                    let (what, last) = ("pgbench to end".to_owned(), tail(&self.directory.join(COMPLAINTS)));
                    return Err(TestbedError::Timeout { what, waited: start.elapsed(), last });
                }
                Err(source) => return Err(TestbedError::file("pgbench")(source)),
            }
        };
        let read = |name: &str| {
            let path = self.directory.join(name);
            fs::read_to_string(&path).map_err(TestbedError::file(path))
        };
        let (output, complaints) = (read(OUTPUT)?, read(COMPLAINTS)?);
        let log = read(&format!("{TRANSACTIONS}.{}", self.child.id()))?;
        let summary = Summary::parse(&output)
            .ok_or_else(|| TestbedError::Answer(format!("{output}{complaints}").trim_end().to_owned()))?;
        let log = Log::parse(&log).map_err(|line| TestbedError::Answer(line.to_owned()))?;
        Ok(PgbenchReport { status, complaints, summary, log })
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Summary {
    /// From what pgbench prints at its end.
    fn parse(output: &str) -> Option<Self> {
        let number = |name: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))?;
            line.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        Some(Self {
            processed: number("number of transactions actually processed")?,
            failed: number("number of failed transactions")?,
        })
    }
}

impl Log {
    /// The longest time in which none was committed, between two of them, if it falls at least partly into that time.
    pub fn longest_stall(&self, within: Range<SystemTime>) -> Duration {
        let stalls = self.commits.windows(2).filter(|pair| pair[1] > within.start && pair[0] < within.end);
        // None where the clock was set back.
        stalls.filter_map(|pair| pair[1].duration_since(pair[0]).ok()).max().unwrap_or_default()
    }

    /// From pgbench's log: client, number, microseconds that it took, script, and when it ended in seconds and microseconds. Gives
    /// back the first line that is not like that.
    fn parse(log: &str) -> Result<Self, &str> {
        let mut found = Self::default();
        for line in log.lines() {
            let (took, committed) = Self::line(line).ok_or(line)?;
            found.longest = found.longest.max(took);
            found.commits.push(committed);
        }
        Ok(found)
    }

    /// How long a transaction took, and when it was committed.
    fn line(line: &str) -> Option<(Duration, SystemTime)> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |place: usize| words.get(place)?.parse::<u64>().ok();
        let since_1970 = Duration::from_secs(number(4)?).checked_add(Duration::from_micros(number(5)?))?;
        Some((Duration::from_micros(number(2)?), UNIX_EPOCH.checked_add(since_1970)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_what_was_committed_and_what_was_not() {
        let output = "transaction type: <builtin: TPC-B (sort of)>\nscaling factor: 8\nnumber of clients: 4\n\
                      maximum number of tries: 1\nduration: 36000 s\nnumber of transactions actually processed: 12345\n\
                      number of failed transactions: 2 (0.016%)\nlatency average = 4.2 ms\n";
        assert_eq!(Summary::parse(output), Some(Summary { processed: 12345, failed: 2 }));
        assert_eq!(Summary::parse("pgbench: error: connection to server failed\n"), None);
    }

    #[test]
    fn the_log_shows_the_longest_transaction_and_the_longest_time_without_any() {
        let log = "0 1 5000 0 1700000000 900000\n3 1 250000 0 1700000001 100000\n1 1 7000 0 1700000001 99000\n\
                   0 2 4000 0 1700000001 399000\n";
        let log = Log::parse(log).unwrap();
        assert_eq!((log.longest, log.commits.len()), (Duration::from_millis(250), 4));
        let at = |ms| UNIX_EPOCH + Duration::from_secs(1_700_000_000) + Duration::from_millis(ms);
        let stall = |from, to| log.longest_stall(at(from)..at(to));
        // The clock may be set back by a little between two lines.
        assert_eq!(stall(0, 9000), Duration::from_millis(300));
        assert_eq!(stall(0, 1000), Duration::from_millis(200));
        assert_eq!(stall(1200, 1210), Duration::from_millis(300));
        assert_eq!(stall(1400, 9000), Duration::ZERO);
        assert_eq!(Log::parse(""), Ok(Log::default()));
    }

    #[test]
    fn a_transaction_that_failed_is_no_line_of_the_log() {
        assert_eq!(Log::parse("0 1 failed 0 1700000000 900000\n"), Err("0 1 failed 0 1700000000 900000"));
    }
}
