//! The machine and the programs: what a figure means little without.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Programs;
use crate::accelerator::Accelerator;
use procfs_core::{CpuInfo, FromRead as _, LoadAverage, Meminfo};
use serde::{Deserialize, Serialize};

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
    pub fn find(programs: &Programs) -> Self {
        let version = |program: &Path| {
            let output = Command::new(program).arg("--version").output();
            version_in(&String::from_utf8_lossy(&output.map(|output| output.stdout).unwrap_or_default()))
                .to_owned()
        };
        let cpu = CpuInfo::from_file("/proc/cpuinfo").ok();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: cpu.as_ref().and_then(|cpu| cpu.model_name(0)).unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: Meminfo::from_file("/proc/meminfo").map_or(0, |memory| memory.mem_total >> 20),
            kernel: kernel.trim().to_owned(),
            vmirror: programs.vmirror.as_deref().map(version).unwrap_or_default(),
            qemu: version(&programs.qemu),
            accelerator: Accelerator::detect(&programs.qemu).map_or("unknown", Accelerator::name).to_owned(),
            load: load(),
        }
    }

    /// The same machine and programs, with its load of now.
    pub fn now(&self) -> Self {
        Self { load: load(), ..self.clone() }
    }

    /// Whether it is the same machine with the same programs, whatever its load.
    pub fn same(&self, other: &Self) -> bool {
        *self == Self { load: self.load.clone(), ..other.clone() }
    }

    /// The machine, in a few words.
    pub fn machine(&self) -> String {
        let Self { cpu, cpus, memory_mib, kernel, load, .. } = self;
        let gib = *memory_mib as f64 / 1024.0;
        format!("{cpu}, {cpus} CPUs, {gib:.1} GiB, Linux {kernel}, load {load} at the start")
    }

    /// In a sentence.
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
    LoadAverage::from_file("/proc/loadavg").map_or_else(|_| String::new(), |load| format!("{:.2}", load.one))
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
    fn versions_are_found() {
        assert_eq!(version_in("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"), "7.2.22");
        assert_eq!(version_in("vmirror 0.1.0\n"), "0.1.0");
        assert_eq!(version_in("nothing"), "");
    }
}
