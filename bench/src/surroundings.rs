//! The machine and the programs: what a figure means little without.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};
use testbed::Programs;
use testbed::accelerator::Accelerator;

/// The machine and the programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    /// The CPU's name.
    pub cpu: String,
    /// How many there are.
    pub cpus: usize,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// The kernel's version.
    pub kernel: String,
    /// vmirror's.
    pub vmirror: String,
    /// QEMU's.
    pub qemu: String,
    /// What runs the guests' CPUs: `tcg` or `kvm`.
    #[serde(default)]
    pub accelerator: String,
    /// Processes waiting for a CPU when the run began (the load average of one minute): others' work disturbs.
    pub load: String,
}

impl Surroundings {
    /// Of this machine.
    #[must_use]
    pub fn find(programs: &Programs) -> Self {
        let version = |program: &std::path::Path| {
            let output = Command::new(program).arg("--version").output();
            let text =
                output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            version_in(&text).to_owned()
        };
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let memory = value_of(&read("/proc/meminfo"), "MemTotal")
            .and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            cpu: value_of(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory.unwrap_or_default() / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            vmirror: programs.vmirror.as_deref().map(version).unwrap_or_default(),
            qemu: version(&programs.qemu),
            accelerator: Accelerator::detect(&programs.qemu).map_or("unknown", Accelerator::name).to_owned(),
            load: load(),
        }
    }

    /// The same machine and programs, with its load of now.
    #[must_use]
    pub fn now(&self) -> Self {
        Self { load: load(), ..self.clone() }
    }

    /// Whether it is the same machine with the same programs, whatever its load.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        *self == Self { load: self.load.clone(), ..other.clone() }
    }

    /// In a sentence.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { cpu, cpus, memory_mib, kernel, vmirror, qemu, accelerator, .. } = self;
        let how = match accelerator.as_str() {
            "tcg" => "TCG: an emulated vCPU shares the CPUs with whoever moves it",
            "kvm" => "KVM",
            other => other,
        };
        format!(
            "{cpus} CPUs ({cpu}), {memory_mib} MiB, Linux {kernel}; vmirror {vmirror}, QEMU {qemu}. Guests run under {how}."
        )
    }
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// The value of the first line `KEY : VALUE`.
fn value_of(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    })
}

/// The first word of a version message that begins with a digit.
fn version_in(text: &str) -> &str {
    text.split_ascii_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_values_are_found() {
        assert_eq!(version_in("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"), "7.2.22");
        assert_eq!(version_in("vmirror 0.1.0\n"), "0.1.0");
        assert_eq!(version_in("nothing"), "");
        assert_eq!(
            value_of("processor\t: 0\nmodel name\t: Fast: one\n", "model name"),
            Some("Fast: one".into())
        );
    }
}
