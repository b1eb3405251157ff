//! What starts a guest again whenever it has ended, as a service manager does.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use testbed::Host;
use testbed::guest_spec::GuestSpec;

/// A shell that starts a guest's QEMU again, a moment after it has ended, for ever. Ended when dropped; its QEMU is not.
#[derive(Debug)]
pub struct Supervisor {
    shell: Child,
    said: PathBuf,
}

/// Says when it begins, and what QEMU says.
const LOOP: &str =
    r#"log=$1; shift; while :; do echo BEGINS >> "$log"; "$@" >> "$log" 2>&1; sleep 0.1; done"#;

impl Supervisor {
    /// Starts a guest on a host whose agent runs, which sees the same disks as that.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn of(host: &Host, spec: &GuestSpec) -> Supervisor {
        let said = host.directory().join("supervisor.log");
        let mounts = format!("--mount=/proc/{}/ns/mnt", host.agent_pid().unwrap());
        let mut shell = host.command("nsenter");
        shell.arg(mounts).args(["sh", "-c", LOOP, "sh"]).arg(&said).args(spec.command_line());
        let shell = shell.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        Supervisor { shell, said }
    }

    /// Everything that its QEMUs have said.
    ///
    /// # Panics
    /// If that cannot be read.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }

    /// How often it has begun.
    #[must_use]
    pub fn begun(&self) -> usize {
        self.said().lines().filter(|line| *line == "BEGINS").count()
    }

    /// How often QEMU has ended for want of an image's lock.
    #[must_use]
    pub fn locked_out(&self) -> usize {
        self.said().matches("Failed to get \"write\" lock").count()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let group = self.shell.id();
        let _ = self.shell.kill();
        let _ = self.shell.wait();
        // The pause between two of its QEMUs is a process as well; what it has started runs on.
        while pauses(group) {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether a `sleep` of this process group runs.
fn pauses(group: u32) -> bool {
    let of_it = |stat: String| {
        let (name, rest) = stat.split_once(" (").and_then(|(_, rest)| rest.rsplit_once(") "))?;
        Some(name == "sleep" && rest.split(' ').nth(2)?.parse() == Ok(group) && !rest.starts_with('Z'))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut stats = processes.filter_map(|process| fs::read_to_string(process.path().join("stat")).ok());
    stats.any(|stat| of_it(stat).unwrap_or_default())
}
