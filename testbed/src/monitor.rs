//! A QMP monitor, spoken to from outside the project's own client: a test must not trust what it tests.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::TestbedError;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a job is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A connection to a monitor.
pub struct Monitor {
    reader: Box<dyn BufRead + Send>,
    writer: Box<dyn Write + Send>,
}

impl Monitor {
    /// Connects to the monitor at that unix socket. It has one client at a time.
    ///
    /// # Errors
    /// Where nothing listens there, or no monitor.
    pub fn connect(socket: &Path) -> Result<Self, TestbedError> {
        let open = || -> io::Result<_> {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok((stream.try_clone()?, stream))
        };
        let (reader, writer) = open().map_err(TestbedError::file(socket))?;
        Self::over(reader, writer)
    }

    /// The monitor at the other end of these.
    pub(crate) fn over(
        reader: impl io::Read + Send + 'static,
        writer: impl Write + Send + 'static,
    ) -> Result<Self, TestbedError> {
        let mut monitor = Self { reader: Box::new(BufReader::new(reader)), writer: Box::new(writer) };
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Carries out a command, and gives back what it returns. Events are passed over.
    ///
    /// # Errors
    /// Where the monitor says that it failed; [`TestbedError::Monitor`] where it says nothing, as of a QEMU that has ended.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, TestbedError> {
        let failed = |message: String| TestbedError::Tool { command: format!("QMP {command}"), message };
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        let gone = |source| TestbedError::Monitor { command: command.to_owned(), source };
        self.writer.write_all(line.as_bytes()).and_then(|()| self.writer.flush()).map_err(gone)?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).map_err(gone)? == 0 {
                return Err(gone(io::ErrorKind::UnexpectedEof.into()));
            }
            let mut answer: Value =
                serde_json::from_str(&line).map_err(|error| failed(format!("{line:?}: {error}")))?;
            if let Some(error) = answer.get("error") {
                return Err(failed(error["desc"].as_str().unwrap_or_default().to_owned()));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Carries out a command that starts a job, whose id in the arguments is `job`, and waits until it has ended. Jobs of block
    /// devices need `auto-dismiss` off.
    ///
    /// # Errors
    /// Where it cannot be started, or fails.
    pub(crate) fn run_job(&mut self, command: &str, arguments: Value) -> Result<(), TestbedError> {
        self.execute(command, arguments)?;
        let start = Instant::now();
        let failed = |message: &str| TestbedError::Tool {
            command: format!("QMP {command}"),
            message: message.to_owned(),
        };
        loop {
            let jobs = self.execute("query-jobs", json!({}))?;
            let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == "job");
            let job = job.ok_or_else(|| failed("the job is gone"))?;
            if job["status"] == "concluded" {
                let error = job["error"].as_str().map(failed);
                self.execute("job-dismiss", json!({ "id": "job" }))?;
                return error.map_or(Ok(()), Err);
            }
            if start.elapsed() > PATIENCE {
                return Err(failed("the job does not end"));
            }
            thread::sleep(POLL);
        }
    }
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}
