//! A place for an agent to run in, and the agent in a process of its own.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use serde_json::Value;
use tempfile::TempDir;

use crate::{PROGRAM, text, vmirror};

/// A directory with certificates and the configuration of `host-a`.
#[derive(Clone)]
pub(crate) struct Site {
    directory: Arc<TempDir>,
}

impl Site {
    pub(crate) fn new() -> Site {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let site = Site { directory };
        let dir = site.path("");
        let dir = dir.to_str().unwrap();
        assert!(vmirror(&["cert", "init", "--dir", dir]).status.success());
        let issue = ["cert", "issue", "--dir", dir, "--name", "host-a", "--address", "127.0.0.1"];
        assert!(vmirror(&issue).status.success());
        let config = "name = \"host-a\"\nlisten = \"127.0.0.1:0\"\napi = \"api.sock\"\nstate_dir = \"state\"\n\
                      run_dir = \"run\"\nram_dir = \".\"\n[tls]\nca = \"ca.pem\"\ncert = \"host-a.pem\"\n\
                      key = \"host-a-key.pem\"\n";
        std::fs::write(site.path("agent.toml"), config).unwrap();
        site
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// An agent in a process of its own; ended with its value.
pub(crate) struct Agent {
    pub(crate) site: Site,
    pub(crate) process: Child,
}

impl Agent {
    pub(crate) fn start() -> Agent {
        Agent::start_at(Site::new())
    }

    /// Starts one on a site that another has left.
    pub(crate) fn start_at(site: Site) -> Agent {
        Agent::start_by(&[], site)
    }

    /// Starts one, and does not wait until it has found its machines again: only until it answers.
    pub(crate) fn start_serving(site: Site) -> Agent {
        let process = Command::new(PROGRAM)
            .args(["agent", "--config"])
            .arg(site.path("agent.toml"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut agent = Agent { site, process };
        while !agent.ask(&["list"]).status.success() {
            assert_eq!(agent.process.try_wait().unwrap(), None, "it has ended");
        }
        agent
    }

    /// Starts one by another program, which is to become it.
    pub(crate) fn start_by(starter: &[&str], site: Site) -> Agent {
        let line = [starter, &[PROGRAM]].concat();
        let mut process = Command::new(line[0])
            .args(&line[1..])
            .args(["agent", "--config"])
            .arg(site.path("agent.toml"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let mut agent = Agent { site, process };
        let mut lines = stderr.lines();
        let ready = lines.by_ref().map(Result::unwrap).find(|line| line.contains(" ready: "));
        let ready = ready.unwrap_or_else(|| panic!("the agent ended: {:?}", agent.process.wait()));
        assert!(ready.starts_with("vmirror agent host-a ready: link 127.0.0.1:"), "{ready}");
        assert!(ready.ends_with(&format!(", api {}", agent.site.path("api.sock").display())), "{ready}");
        // Read on, or the agent would block on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        agent
    }

    pub(crate) fn ask(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("VMIRROR_AGENT", self.site.path("api.sock")).output().unwrap()
    }

    /// The answer to a question that has one, in JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.ask(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Ends it as systemd would, and says how it exited.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.process.wait().unwrap().code()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
