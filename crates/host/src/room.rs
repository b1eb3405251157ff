//! Room for guest RAM: what the file system of `ram_dir`, the host's memory and its pools of huge pages can still give.
//!
//! RAM files are sparse, and are filled as the guest uses its memory. Allocating them in full would hold a promise made to
//! one machine by taking what no machine uses (and costs 0.38 s a GiB, measured); instead every machine's RAM is counted
//! in full when room is promised: what a machine of this agent has not yet allocated is not free. That goes for RAM that an adopted
//! machine's QEMU has to itself as well.
//!
//! Huge pages are another matter: QEMU's mapping reserves all of a file at once, or fails. What the kernel says is free
//! and not reserved is free, but for machines that are only about to start.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use qemu::{Process, Spec};

use crate::host::Host;
use crate::ram_files::{self, place};

/// Which memory a RAM file takes: 0 for that of ordinary pages, else pages of so many bytes.
type Pool = u64;

/// RAM that a machine needs: in which directory, how many bytes.
pub type Demand = (PathBuf, u64);

/// RAM that there is no room for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} of guest RAM are needed {place}, which has room for {}", mib(*.needed), mib(*.free))]
pub struct Shortage {
    place: String,
    needed: u64,
    free: u64,
    huge: bool,
}

impl Shortage {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        if self.huge {
            "add huge pages there (sysctl vm.nr_hugepages), or make the hugetlbfs larger"
        } else {
            "free memory there, or make its ram_dir larger"
        }
    }
}

/// The RAM files of a command line: where they are, and their sizes.
pub(crate) fn demands(spec: &Spec) -> Vec<Demand> {
    let demand = |ram: qemu::RamBackend| Some((place(&ram.mem_path?)?, ram.size));
    spec.ram_backends().into_iter().filter_map(demand).collect()
}

/// What of a machine's RAM this host has no room for.
pub fn shortages(host: &Host, demands: &[Demand]) -> Vec<Shortage> {
    let mut needed: BTreeMap<Pool, (u64, Vec<&Path>)> = BTreeMap::new();
    for (directory, bytes) in demands {
        let pool = pool_of(directory);
        let whole = if pool == 0 { *bytes } else { bytes.next_multiple_of(pool) };
        let (sum, directories) = needed.entry(pool).or_default();
        *sum = sum.saturating_add(whole);
        directories.push(directory);
    }
    let short = |(pool, (needed, directories)): (Pool, (u64, Vec<&Path>))| {
        let free = match pool {
            0 => ordinary(host),
            pool => huge(pool, &directories).saturating_sub(promised(host, pool)),
        };
        let place = match pool {
            0 => format!("in {} on {}", host.ram_dir.display(), host.name),
            pool => format!("in huge pages of {} KiB on {}", pool >> 10, host.name),
        };
        (free < needed).then_some(Shortage { place, needed, free, huge: pool > 0 })
    };
    needed.into_iter().filter_map(short).collect()
}

fn pool_of(directory: &Path) -> Pool {
    qemu::huge_page_size(directory).unwrap_or(0)
}

/// Bytes of ordinary memory for guest RAM: of the file system of `ram_dir`, and of the host.
fn ordinary(host: &Host) -> u64 {
    let filesystem = match pool_of(&host.ram_dir) {
        0 => rustix::fs::statvfs(&host.ram_dir).map_or(0, |stat| stat.f_bavail * stat.f_frsize),
        // Nothing of it is needed in that directory.
        _ => u64::MAX,
    };
    filesystem.min(available_memory().unwrap_or(u64::MAX)).saturating_sub(promised(host, 0))
}

/// Bytes in huge pages of a size that nobody has and nobody was promised, the directories' own limits respected.
fn huge(page_size: Pool, directories: &[&Path]) -> u64 {
    let number = |file: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{file}", page_size >> 10);
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let there = number("free_hugepages").saturating_sub(number("resv_hugepages"));
    let more = number("nr_overcommit_hugepages").saturating_sub(number("surplus_hugepages"));
    // Pages beyond the pool are made of ordinary memory when they are needed.
    let more = more.saturating_mul(page_size).min(available_memory().unwrap_or(u64::MAX));
    let pool = there.saturating_mul(page_size).saturating_add(more);
    // A hugetlbfs that was mounted without a size says that it has no blocks at all.
    let limit = |directory: &&Path| {
        let limited = rustix::fs::statvfs(*directory).ok().filter(|stat| stat.f_blocks > 0);
        limited.map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    };
    directories.iter().map(limit).fold(pool, u64::min)
}

/// Bytes that this agent's machines may still allocate of a pool.
fn promised(host: &Host, pool: Pool) -> u64 {
    let outstanding = |(directory, size, file): (PathBuf, u64, PathBuf)| {
        if pool_of(&directory) != pool {
            return 0;
        }
        match std::fs::metadata(&file) {
            // Reserved since QEMU has mapped it.
            Ok(_) if pool > 0 => 0,
            Ok(file) => size.saturating_sub(file.blocks() * 512),
            Err(_) => size,
        }
    };
    let mut sum = 0_u64;
    for (process, ram) in host.ram_files.of(host.journal.all(), ram_files::read) {
        if pool == 0 && ram.unnamed > 0 {
            // What is in files of its own is shared memory of the process as well.
            let shared = ram.files.is_empty();
            let there = process.as_ref().map_or(0, |process| allocated(process, shared));
            sum = sum.saturating_add(ram.unnamed.saturating_sub(there));
        }
        sum = ram.files.into_iter().map(outstanding).fold(sum, u64::saturating_add);
    }
    sum
}

/// Bytes of ordinary memory that a process has: its own, there or swapped out, and what it has of shared memory, if that counts. All of it
/// is taken for RAM: a QEMU's own is little beside that.
fn allocated(process: &Process, shared: bool) -> u64 {
    let path = format!("/proc/{}/status", process.pid);
    let status = std::fs::read_to_string(path).unwrap_or_default();
    let fields = ["RssAnon:", "VmSwap:"].into_iter().chain(shared.then_some("RssShmem:"));
    fields.filter_map(|field| kib(&status, field)).sum::<u64>() << 10
}

/// A number of KiB from a file of /proc.
fn kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Bytes of guest RAM of all machines of this agent.
pub fn in_use(host: &Host) -> u64 {
    host.journal.all().iter().map(|record| record.memory).fold(0, u64::saturating_add)
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    kib(&info, "MemAvailable:").map(|kib| kib << 10)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
