//! Commands that are refused: what they say, and that they change nothing.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::{Host, Inventory};

use crate::{Pair, Said, vmirror};

/// How long what is being released may take to be gone.
const RELEASE: Duration = Duration::from_secs(30);

/// Why a command was refused before anything began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The name for scripts.
    pub kind: String,
    /// What is wrong, and why.
    pub message: String,
    /// What to do.
    pub hint: String,
    /// Names of the further reasons that were told.
    pub more: Vec<String>,
}

impl Refusal {
    /// Runs a command that must be refused, once for a script and once for a person, and compares what both are told: exit code
    /// 2, and what is wrong and what to do in one line.
    ///
    /// # Panics
    /// If it is not refused, or not like that.
    #[must_use]
    #[track_caller]
    pub fn of(host: &Host, arguments: &[&str]) -> Refusal {
        // In front: what follows `--` belongs to QEMU.
        let said = vmirror(host, &[&["--json"], arguments].concat());
        let refusal = Refusal::told(&said);
        let person = vmirror(host, &[&["--quiet"], arguments].concat());
        assert_eq!((person.code, person.stdout.as_str()), (Some(2), ""), "{person:?}");
        let lines: Vec<&str> = person.stderr.lines().collect();
        let message = refusal.message.trim_end_matches('.');
        assert_eq!(lines[0], format!("error: {message}; {}", refusal.hint));
        let further = lines[1..].iter().all(|line| line.starts_with("  also: "));
        assert!(further && lines.len() == 1 + refusal.more.len(), "{person:?}");
        refusal
    }

    /// What a command that ran with `--json` was refused for.
    ///
    /// # Panics
    /// If it was not refused.
    #[must_use]
    #[track_caller]
    pub fn told(said: &Said) -> Refusal {
        let error = said.refusal();
        let text = |part: &str| error[part].as_str().unwrap().to_owned();
        let further = error["more"].as_array().cloned().unwrap_or_default();
        let more = further.iter().map(|finding| finding["kind"].as_str().unwrap().to_owned()).collect();
        Refusal { kind: text("kind"), message: text("message"), hint: text("hint"), more }
    }

    /// Asserts that this was the only reason, and that message and hint have all of these words.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn is(&self, kind: &str, words: &[&str]) {
        assert!(self.more.is_empty(), "for more reasons than {kind}: {self:?}");
        self.begins(kind, words);
    }

    /// As [`Refusal::is`], where further reasons may have been told.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn begins(&self, kind: &str, words: &[&str]) {
        assert_eq!(self.kind, kind, "{self:?}");
        for word in words {
            assert!(
                self.message.contains(word) || self.hint.contains(word),
                "{word:?} is not said: {self:?}"
            );
        }
    }
}

impl Pair {
    /// Runs a command that must be refused on a host; both hosts must hold afterwards exactly what they held before, and every
    /// machine must be as it was.
    ///
    /// # Panics
    /// If it is not refused, or changes anything.
    #[must_use]
    #[track_caller]
    pub fn refused(&self, host: &Host, arguments: &[&str]) -> Refusal {
        let hosts = [self.a(), self.b()];
        let inventories = hosts.map(|host| host.inventory().unwrap());
        let machines = hosts.map(machines);
        let refusal = Refusal::of(host, arguments);
        for (host, expected) in hosts.into_iter().zip(&inventories) {
            if self.qemu(host).is_some() {
                self.holds_but_for_growth(host, expected);
            } else {
                self.holds(host, expected);
            }
        }
        assert_eq!(hosts.map(self::machines), machines);
        refusal
    }

    /// As [`Pair::holds`], on a host with a machine that runs, which takes memory as it goes. What was set aside for another machine
    /// would still show as its files.
    ///
    /// # Panics
    /// If the host holds anything else.
    #[track_caller]
    pub fn holds_but_for_growth(&self, host: &Host, expected: &Inventory) {
        let start = Instant::now();
        loop {
            let now = host.inventory().unwrap();
            let expected = Inventory { ram_bytes: now.ram_bytes, ..expected.clone() };
            match expected.difference(&now) {
                Ok(()) => return,
                Err(_) if start.elapsed() < RELEASE => thread::sleep(Duration::from_millis(50)),
                Err(difference) => panic!("{}: {difference}\n{}", host.name(), self.logs()),
            }
        }
    }

    /// As [`Pair::refused`], of a migration from host A to host B.
    ///
    /// # Panics
    /// If it is not refused, or changes anything.
    #[must_use]
    #[track_caller]
    pub fn migration_refused(&self, name: &str, options: &[&str]) -> Refusal {
        let to = self.b().listen().to_string();
        self.refused(self.a(), &[&["migrate", name, "--to", &to], options].concat())
    }

    /// The kinds of all reasons that `vmirror check` tells against a migration from host A to host B.
    ///
    /// # Panics
    /// If it exits other than with what it found.
    #[must_use]
    #[track_caller]
    pub fn check(&self, name: &str) -> Vec<String> {
        let said = vmirror(self.a(), &["check", name, "--to", &self.b().listen().to_string(), "--json"]);
        let findings = said.json()["findings"].as_array().unwrap().clone();
        assert_eq!(said.code, Some(if findings.is_empty() { 0 } else { 2 }), "{said:?}");
        findings.iter().map(|finding| finding["kind"].as_str().unwrap().to_owned()).collect()
    }

    /// Runs a machine of 32 MiB that has nothing but its firmware, with these arguments more. It is there at once, and for tests in
    /// which no guest need judge.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn run_tiny(&self, host: &Host, name: &str, more: &[&str]) {
        let qemu = self.qemu_program().to_str().unwrap();
        let mut arguments = vec!["run", name, "--json", "--", qemu];
        arguments.extend(["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]);
        arguments.extend(more);
        let _ = vmirror(host, &arguments).done();
    }
}

/// What must not change about the machines of a host; nothing where no agent runs.
fn machines(host: &Host) -> Vec<Value> {
    let said = vmirror(host, &["list", "--json"]);
    let mut machines: Vec<Value> =
        if said.code == Some(0) { said.json().as_array().unwrap().clone() } else { Vec::new() };
    for machine in &mut machines {
        // The progress of a migration under way.
        machine.as_object_mut().unwrap().remove("session");
    }
    machines
}
