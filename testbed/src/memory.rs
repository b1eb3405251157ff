//! Memory that moving a guest takes, beyond the guest's own.

use std::fs;
use std::ops::Range;

use crate::Host;
use procfs_core::FromRead;
use procfs_core::process::{MMPermissions, MemoryMap, MemoryMaps, Status};

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
    pub fn of_agent(host: &Host) -> Option<Self> {
        Self::of(host.agent_pid()?, None)
    }

    /// Of a QEMU that has its guest's RAM in its own memory. None where that is not found.
    pub fn of_qemu(pid: i32, guest_mib: u64) -> Option<Self> {
        let maps: MemoryMaps = read(pid, "smaps")?;
        let (start, end) = maps.iter().find(|mapping| is_ram(mapping, guest_mib << 20))?.address;
        Self::of(pid, Some(start..end))
    }

    fn of(pid: i32, guest: Option<Range<u64>>) -> Option<Self> {
        let mut memory = Self { pid, guest, before: 0 };
        let resident = read::<Status>(pid, "status")?.vmrss? << 10;
        memory.before = resident.saturating_sub(memory.guest_resident()?);
        // 5: the most that was resident begins anew (proc_pid_clear_refs(5)).
        fs::write(format!("/proc/{pid}/clear_refs"), "5").ok()?;
        Some(memory)
    }

    /// The most since then beyond what there was, without the guest's RAM as it is now: where that has grown up to now, as at a
    /// destination, what was taken before the peak of both together is not seen, so of QEMU this is an estimate from below.
    pub fn overhead(&self) -> Option<u64> {
        let most = read::<Status>(self.pid, "status")?.vmhwm? << 10;
        Some(most.saturating_sub(self.guest_resident()?).saturating_sub(self.before))
    }

    fn guest_resident(&self) -> Option<u64> {
        let Some(guest) = &self.guest else { return Some(0) };
        let maps: MemoryMaps = read(self.pid, "smaps")?;
        // It may have been divided meanwhile.
        let inside =
            |mapping: &&MemoryMap| guest.start <= mapping.address.0 && mapping.address.1 <= guest.end;
        Some(maps.iter().filter(inside).filter_map(|mapping| mapping.extension.map.get("Rss")).sum())
    }
}

/// The most, of several that may not be known.
pub fn most_overhead(memories: &[Option<Memory>]) -> Option<u64> {
    memories.iter().filter_map(|memory| memory.as_ref()?.overhead()).max()
}

fn read<T: FromRead>(pid: i32, file: &str) -> Option<T> {
    T::from_file(format!("/proc/{pid}/{file}")).ok()
}

/// Whether it may be a guest's RAM of that size. Translated code, which may be as large, can be executed.
fn is_ram(mapping: &MemoryMap, bytes: u64) -> bool {
    let plain = MMPermissions::READ | MMPermissions::WRITE | MMPermissions::PRIVATE;
    mapping.perms == plain && mapping.address.1 - mapping.address.0 == bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_translated_code_of_the_same_size() {
        let text = "7f0000000000-7f0020000000 rwxp 00000000 00:00 0 \nSize: 524288 kB\nRss: 100 kB\nVmFlags: rd wr\n\
                    7f0040000000-7f0060000000 rw-p 00000000 00:00 0 \nSize: 524288 kB\nRss:              300000 kB\nPss: 1 kB\n";
        let maps = MemoryMaps::from_read(text.as_bytes()).unwrap();
        let ram: Vec<&MemoryMap> = maps.iter().filter(|mapping| is_ram(mapping, 512 << 20)).collect();
        assert_eq!((maps.len(), ram.len()), (2, 1));
        assert_eq!((ram[0].address.0, ram[0].extension.map["Rss"]), (0x7f00_4000_0000, 300_000 << 10));
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
