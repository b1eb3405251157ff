//! Memory that moving a guest takes, beyond the guest's own.

use std::fs;
use std::ops::Range;

use testbed::Host;

/// The memory of a process, from a time on.
#[derive(Debug)]
pub struct Memory {
    pid: i32,
    /// Where the guest's RAM lies in it, if it does.
    guest: Option<Range<u64>>,
    /// What was resident beside that.
    before: u64,
}

impl Memory {
    /// Of a host's agent, from now on. None where the system does not tell.
    #[must_use]
    pub fn of_agent(host: &Host) -> Option<Self> {
        Self::of(host.agent_pid()?, None)
    }

    /// Of a QEMU that has its guest's RAM in its own memory. None where that is not found.
    #[must_use]
    pub fn of_qemu(pid: i32, guest_mib: u64) -> Option<Self> {
        let guest = mappings(&maps(pid)?).find(|mapping| mapping.is_ram(guest_mib << 20))?;
        Self::of(pid, Some(guest.addresses))
    }

    fn of(pid: i32, guest: Option<Range<u64>>) -> Option<Self> {
        let mut memory = Self { pid, guest, before: 0 };
        memory.before = status_bytes(pid, "VmRSS")?.saturating_sub(memory.guest_resident()?);
        // 5: the most that was resident begins anew (proc_pid_clear_refs(5)).
        fs::write(format!("/proc/{pid}/clear_refs"), "5").ok()?;
        Some(memory)
    }

    /// The most since then beyond what there was, without the guest's RAM as it is now: where that has grown up to now, as at a
    /// destination, what was taken before the peak of both together is not seen, so of QEMU this is an estimate from below.
    #[must_use]
    pub fn overhead(&self) -> Option<u64> {
        let most = status_bytes(self.pid, "VmHWM")?;
        Some(most.saturating_sub(self.guest_resident()?).saturating_sub(self.before))
    }

    fn guest_resident(&self) -> Option<u64> {
        let Some(guest) = &self.guest else { return Some(0) };
        // It may have been divided meanwhile.
        let inside =
            |mapping: &Mapping| guest.start <= mapping.addresses.start && mapping.addresses.end <= guest.end;
        Some(mappings(&maps(self.pid)?).filter(inside).map(|mapping| mapping.resident).sum())
    }
}

/// The most, of several that may not be known.
#[must_use]
pub fn most_overhead(memories: &[Option<Memory>]) -> Option<u64> {
    memories.iter().filter_map(|memory| memory.as_ref()?.overhead()).max()
}

fn maps(pid: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/smaps")).ok()
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    addresses: Range<u64>,
    permissions: String,
    resident: u64,
}

impl Mapping {
    /// Whether it may be a guest's RAM of that size. Translated code, which may be as large, can be executed.
    fn is_ram(&self, bytes: u64) -> bool {
        self.permissions == "rw-p" && self.addresses.end - self.addresses.start == bytes
    }
}

/// Mappings of a process as proc_pid_smaps(5) has them: a line that begins with the addresses, lines about it.
fn mappings(text: &str) -> impl Iterator<Item = Mapping> {
    let mut lines = text.lines();
    let mut current = None;
    std::iter::from_fn(move || {
        loop {
            let Some(line) = lines.next() else { return current.take() };
            if let Some(kib) = line.strip_prefix("Rss:") {
                let kib = kib.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or_default();
                if let Some(Mapping { resident, .. }) = &mut current {
                    *resident = kib << 10;
                }
            } else if let Some(next) = head(line) {
                let before = current.replace(next);
                if before.is_some() {
                    return before;
                }
            }
        }
    })
}

fn head(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let addresses = address(start)?..address(end)?;
    Some(Mapping { addresses, permissions: words.next()?.to_owned(), resident: 0 })
}

/// A size in a process's status.
fn status_bytes(pid: i32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_a_process_is_found() {
        let own = std::process::id().cast_signed();
        assert!(status_bytes(own, "VmHWM").unwrap() >= 1 << 20);
        assert_eq!(status_bytes(own, "VmNonsense"), None);
    }

    #[test]
    fn guest_ram_is_told_from_translated_code_of_the_same_size() {
        let text = "7f0000000000-7f0020000000 rwxp 00000000 00:00 0\nSize: 524288 kB\nRss: 100 kB\nVmFlags: rd wr\n\
                    7f0040000000-7f0060000000 rw-p 00000000 00:00 0 \nSize: 524288 kB\nRss:              300000 kB\nPss: 1 kB\n";
        let ram: Vec<Mapping> = mappings(text).filter(|mapping| mapping.is_ram(512 << 20)).collect();
        assert_eq!(ram.len(), 1);
        assert_eq!((ram[0].addresses.start, ram[0].resident), (0x7f00_4000_0000, 300_000 << 10));
        assert_eq!(mappings(text).count(), 2);
        assert_eq!(mappings("").count(), 0);
    }

    #[test]
    fn what_a_process_takes_and_gives_back_is_its_overhead() {
        const BYTES: usize = 64 << 20;
        let own = std::process::id().cast_signed();
        let memory = Memory::of(own, None).unwrap();
        drop(std::hint::black_box(vec![1_u8; BYTES]));
        // Tests beside this one may give back or take some of their own.
        assert!(memory.overhead().unwrap() > BYTES as u64 / 2);
    }
}
