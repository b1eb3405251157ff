//! Room for guest RAM: what the file system of `ram_dir` and the host's memory can still give.
//!
//! RAM files are sparse, and are filled as the guest uses its memory. Allocating them in full would hold a promise made to
//! one machine by taking what no machine uses (and costs 0.38 s a GiB, measured); instead every machine's RAM is counted
//! in full when room is promised: what a machine of this agent has not yet allocated is not free.

use std::os::unix::fs::MetadataExt;

use qemu::Spec;

use crate::host::Host;
use crate::lifecycle::ram_files;

/// Bytes of guest RAM for which this host still has room: in the file system of `ram_dir`, and in its memory.
pub(crate) fn free(host: &Host) -> u64 {
    let filesystem = rustix::fs::statvfs(&host.ram_dir).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    let memory = available_memory().unwrap_or(u64::MAX);
    filesystem.min(memory).saturating_sub(promised(host))
}

/// Bytes that this agent's machines may still allocate.
fn promised(host: &Host) -> u64 {
    let outstanding = |record: crate::vm::Record| {
        let files = Spec::parse(&record.argv).map(|spec| ram_files(&spec)).unwrap_or_default();
        let size = |file: &std::path::PathBuf| std::fs::metadata(file).map_or(0, |file| file.blocks() * 512);
        record.memory.saturating_sub(files.iter().map(size).sum())
    };
    host.journal.all().into_iter().map(outstanding).sum()
}

/// Bytes of guest RAM of all machines of this agent.
pub(crate) fn in_use(host: &Host) -> u64 {
    host.journal.all().iter().map(|record| record.memory).sum()
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
