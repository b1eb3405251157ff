//! A host's agent: started, ended, killed.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::{MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{AgentOptions, HIDE, Host};
use crate::running::POLL;
use crate::tool::tail;
use crate::{TestbedError, fault, old_kernel};

/// How long an agent may take to answer after it was started, and to end after it was told to.
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

impl Host {
    /// Starts the agent and waits until it answers.
    ///
    /// # Errors
    /// Where it cannot be started, ends at once (with the end of its log), or does not answer.
    pub fn start_agent(&self) -> Result<(), TestbedError> {
        self.start_agent_with(&AgentOptions::default())
    }

    /// As [`Host::start_agent`], with options.
    ///
    /// # Errors
    /// As [`Host::start_agent`].
    pub fn start_agent_with(&self, options: &AgentOptions) -> Result<(), TestbedError> {
        let program = self.vmirror_program()?;
        let path = self.agent_log();
        let log =
            fs::File::options().create(true).append(true).open(&path).map_err(TestbedError::file(&path))?;
        let also = log.try_clone().map_err(TestbedError::file(&path))?;
        let mut command = if options.hidden.is_empty() && options.bound.is_empty() && !options.local {
            self.command(program)
        } else {
            let mut command = self.command("unshare");
            command.args(["--mount", "--propagation", "private", "--", "sh", "-c", HIDE, "sh"]);
            if options.local {
                command.arg(self.disk_dir()).arg("at").arg(self.local_dir());
            }
            for (what, place) in &options.bound {
                command.args([what.as_path(), Path::new("at"), place]);
            }
            command.args(&options.hidden).arg("--").arg(program);
            command
        };
        command.args(["agent", "--config"]).arg(self.config_path()).stdout(log).stderr(also);
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        if options.old_kernel {
            old_kernel::apply(&mut command)?;
        }
        if options.without_bpf {
            old_kernel::without_bpf(&mut command)?;
        }
        let failed = |source| TestbedError::Start { program: program.display().to_string(), source };
        let child = command.spawn().map_err(failed)?;
        *self.agent() = Some(child);
        self.wait_for_agent()
    }

    fn wait_for_agent(&self) -> Result<(), TestbedError> {
        let start = Instant::now();
        while !has_found_all(&self.api()) {
            let ended = self.agent().as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                *self.agent() = None;
                return Err(self.ended(status));
            }
            if start.elapsed() > AGENT_TIMEOUT {
                let what = format!("the agent of {} to answer", self.name);
                return Err(TestbedError::Timeout {
                    what,
                    waited: start.elapsed(),
                    last: tail(&self.agent_log()),
                });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    fn ended(&self, status: ExitStatus) -> TestbedError {
        let what = format!("the agent of {}", self.name);
        TestbedError::Ended { what, status: status.to_string(), last: tail(&self.agent_log()) }
    }

    /// The running agent's process.
    pub fn agent_pid(&self) -> Option<i32> {
        self.agent().as_ref().map(|child| child.id().cast_signed())
    }

    /// Ends the agent as its service manager would, with SIGTERM. Guests live on.
    ///
    /// # Errors
    /// [`TestbedError::Timeout`] where it does not end.
    pub fn stop_agent(&self) -> Result<Option<ExitStatus>, TestbedError> {
        self.end_agent(Signal::TERM)
    }

    /// Kills the agent, as a crash would. Guests live on.
    ///
    /// # Errors
    /// [`TestbedError::Timeout`] where even that does not end it.
    pub fn kill_agent(&self) -> Result<Option<ExitStatus>, TestbedError> {
        self.end_agent(Signal::KILL)
    }

    fn end_agent(&self, signal: Signal) -> Result<Option<ExitStatus>, TestbedError> {
        let Some(mut child) = self.agent().take() else { return Ok(None) };
        fault::signal(child.id().cast_signed(), signal);
        let start = Instant::now();
        loop {
            match child.try_wait() {
                Ok(None) if start.elapsed() < AGENT_TIMEOUT => thread::sleep(POLL),
                Ok(None) => {
                    let what = format!("the agent of {} to end", self.name);
                    *self.agent() = Some(child);
                    return Err(TestbedError::Timeout {
                        what,
                        waited: start.elapsed(),
                        last: tail(&self.agent_log()),
                    });
                }
                Ok(status) => return Ok(status),
                Err(source) => return Err(TestbedError::file("agent")(source)),
            }
        }
    }

    fn agent(&self) -> MutexGuard<'_, Option<Child>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an agent answers, and looks for no guest of its any more.
fn has_found_all(api: &Path) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(api)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /v1/agent HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let looks = answer.split_once("\"recovering\":").is_some_and(|(_, number)| !number.starts_with('0'));
        Ok(answer.starts_with("HTTP/") && !looks)
    };
    ask().unwrap_or(false)
}
