//! QEMU's own table of its RAM blocks, and where each is in its address space.
//!
//! RAM that is no named file can be found by nothing else: the command line has no address, and a block of the machine's own (video memory,
//! firmware) is not on it at all. QEMU 8.0 and later tell the address (`HVA`); of earlier ones the block's description is looked for in the
//! process's heap, by what the table says of it.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use serde_json::{Value, json};

use crate::{
    Process,
    maps::{MapsLine, maps},
    qmp::{Qmp, QmpError},
};

/// A RAM block of a running QEMU: guest RAM, video memory, a ROM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocatedBlock {
    /// Its name in QEMU's migration stream.
    pub name: String,
    /// Where it begins in QEMU's address space.
    pub address: u64,
    /// Bytes in use.
    pub used: u64,
}

impl LocatedBlock {
    /// Whether it is the RAM of the backend with this id. Old machine types name that by its path in QEMU's tree of objects, and a device
    /// that has it, such as virtio-mem, by its own before it.
    #[must_use]
    pub fn is_of(&self, id: &str) -> bool {
        self.name == id || self.name.strip_suffix(id).is_some_and(|before| before.ends_with('/'))
    }
}

/// Why QEMU's RAM blocks cannot be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocateError {
    /// QEMU does not tell of them.
    #[error("QEMU does not list its RAM blocks")]
    Qmp(#[from] QmpError),
    /// What it tells has another form than up to QEMU 10.
    #[error("QEMU's list of RAM blocks has a line that is not understood: {line:?}")]
    Form {
        /// The line.
        line: String,
    },
    /// The process's memory cannot be looked at.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file below /proc.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The block is not where it is said to be, or nothing says where it is.
    #[error("RAM block {name} of {total} bytes is not found in QEMU's memory")]
    NotFound {
        /// Its name.
        name: String,
        /// Bytes that it may have.
        total: u64,
    },
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    name: String,
    offset: u64,
    used: u64,
    total: u64,
    address: Option<u64>,
}

/// QEMU's table of all RAM blocks that its migration would carry. As long as it is the same, no block has come, gone or grown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamTable {
    lines: Vec<Line>,
}

impl RamTable {
    /// As QEMU tells it.
    ///
    /// # Errors
    /// [`LocateError::Qmp`], [`LocateError::Form`]
    pub async fn of(qmp: &Qmp) -> Result<RamTable, LocateError> {
        Ok(RamTable { lines: parse(&table(qmp).await?)? })
    }

    /// The same as [`locate`](Self::locate), on a thread that may wait.
    ///
    /// # Errors
    /// Its.
    pub async fn located(self, process: &Process) -> Result<Vec<LocatedBlock>, LocateError> {
        let process = process.clone();
        let located = tokio::task::spawn_blocking(move || self.locate(&process));
        located.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }

    /// Where the blocks are, each checked against the kernel's map of the process. Where QEMU does not tell, all of its heap is looked
    /// through, which takes its time.
    ///
    /// # Errors
    /// [`LocateError::Read`], [`LocateError::NotFound`]
    pub fn locate(&self, process: &Process) -> Result<Vec<LocatedBlock>, LocateError> {
        let maps = maps(process).map_err(|(path, source)| LocateError::Read { path, source })?;
        let addresses: Vec<Option<u64>> =
            match self.lines.iter().map(|line| line.address).collect::<Option<Vec<u64>>>() {
                Some(told) => told.into_iter().map(Some).collect(),
                None => {
                    let found = search(process, &maps, &self.lines)?.into_iter();
                    found.map(|found| found.filter(|address| begins_at(&maps, *address))).collect()
                }
            };
        let place = |(line, address): (&Line, Option<u64>)| {
            let is_there = |address: &u64| is_mapped(&maps, *address, line.total);
            match address.filter(is_there) {
                Some(address) => Ok(LocatedBlock { name: line.name.clone(), address, used: line.used }),
                None => Err(LocateError::NotFound { name: line.name.clone(), total: line.total }),
            }
        };
        self.lines.iter().zip(addresses).map(place).collect()
    }
}

async fn table(qmp: &Qmp) -> Result<String, QmpError> {
    let told = match qmp.execute_raw("x-query-ramblock", Value::Null).await {
        Ok(value) => value["human-readable-text"].clone(),
        // Before QEMU 6.2 only the monitor for people has it.
        Err(QmpError::Refused { .. }) => {
            qmp.execute_raw("human-monitor-command", json!({ "command-line": "info ramblock" })).await?
        }
        Err(error) => return Err(error),
    };
    Ok(told.as_str().unwrap_or_default().to_owned())
}

/// `ram_block_format` in QEMU's system/physmem.c: name, page size, offset, used, total and, from 8.0 on, address and access. A block
/// without a name is one that QEMU does not migrate.
fn parse(text: &str) -> Result<Vec<Line>, LocateError> {
    let mut lines = Vec::new();
    for line in text.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(first) = words.iter().position(|word| word.starts_with("0x")) else { continue };
        let numbers: Option<Vec<u64>> = words[first..]
            .iter()
            .map_while(|word| word.strip_prefix("0x"))
            .map(|hex| u64::from_str_radix(hex, 16).ok())
            .collect();
        let (offset, used, total, address) = match numbers.as_deref() {
            Some(&[offset, used, total]) => (offset, used, total, None),
            Some(&[offset, used, total, address]) => (offset, used, total, Some(address)),
            _ => return Err(LocateError::Form { line: line.to_owned() }),
        };
        // Before the numbers are the name and the page size, in two words ("4 KiB").
        if let Some(name) = first.checked_sub(3).map(|last| words[..=last].join(" ")) {
            lines.push(Line { name, offset, used, total, address });
        }
    }
    Ok(lines)
}

/// Whether all of this is memory that the process can write, or a ROM.
fn is_mapped(maps: &[MapsLine], address: u64, length: u64) -> bool {
    let mut at = address;
    for line in maps.iter().filter(|line| line.readable) {
        let (from, to) = (line.mapping.address, line.mapping.address + line.mapping.len);
        if (from..to).contains(&at) {
            at = to;
        }
        if at >= address.saturating_add(length) {
            return true;
        }
    }
    false
}

/// Whether the kernel has something of its own from this address on: each RAM block is mapped by itself, with a guard after it.
fn begins_at(maps: &[MapsLine], address: u64) -> bool {
    maps.iter().any(|line| line.mapping.address == address)
}

/// Bytes of a heap that are looked through; QEMU's has a few MiB.
const MOST_HEAP: u64 = 256 << 20;
/// Read at a time.
const PIECE: usize = 4 << 20;
/// A description as it is looked for: `offset`, `used_length` and `max_length` stand in a row; two pointers before them is where the block
/// is, and soon after them its name (`struct RAMBlock` in QEMU's include/exec/ramblock.h, 6.0 to 7.2).
const HOST_BEFORE: usize = 16;
const NAME_AFTER: std::ops::Range<usize> = 24..72;
const NAME_SIZE: usize = 256;

/// Where the blocks are by the descriptions in the process's heap. What a guest sends goes through that heap too, and may look like one: a
/// block of which two descriptions name two places is at none.
fn search(process: &Process, maps: &[MapsLine], lines: &[Line]) -> Result<Vec<Option<u64>>, LocateError> {
    let path = PathBuf::from(format!("/proc/{}/mem", process.pid));
    let failed = |source| LocateError::Read { path: path.clone(), source };
    let memory = File::open(&path).map_err(failed)?;
    let mut found = vec![Found::Nowhere; lines.len()];
    let heaps = maps.iter().filter(|line| line.name == "[heap]");
    for heap in heaps.filter(|heap| heap.readable) {
        // They are made when QEMU starts, so they are where it begins.
        let length = heap.mapping.len.min(MOST_HEAP);
        let mut at = 0;
        // Pieces overlap by what a description has.
        let overlap = HOST_BEFORE + NAME_AFTER.end + NAME_SIZE;
        while at < length {
            let part = (length - at).min(PIECE as u64);
            let mut piece = vec![0; usize::try_from(part).unwrap_or(PIECE)];
            // What was unmapped since is no heap any more.
            if memory.read_exact_at(&mut piece, heap.mapping.address + at).is_err() {
                break;
            }
            look_through(&piece, lines, &mut found);
            if part < PIECE as u64 {
                break;
            }
            at += part - overlap as u64;
        }
    }
    Ok(found.into_iter().map(Found::one).collect())
}

/// What the descriptions of a block say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nowhere,
    At(u64),
    Several,
}

impl Found {
    fn add(&mut self, address: u64) {
        *self = match *self {
            Found::Nowhere => Found::At(address),
            Found::At(known) if known == address => Found::At(known),
            Found::At(_) | Found::Several => Found::Several,
        };
    }

    fn one(self) -> Option<u64> {
        match self {
            Found::At(address) => Some(address),
            Found::Nowhere | Found::Several => None,
        }
    }
}

fn look_through(piece: &[u8], lines: &[Line], found: &mut [Found]) {
    let word = |at: usize| {
        let bytes = piece.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    for at in (HOST_BEFORE..piece.len()).step_by(8) {
        let (Some(offset), Some(used), Some(total)) = (word(at), word(at + 8), word(at + 16)) else { return };
        for (line, found) in lines.iter().zip(found.iter_mut()) {
            if (offset, used, total) != (line.offset, line.used, line.total) {
                continue;
            }
            let name = [line.name.as_bytes(), b"\0"].concat();
            let after = piece.get(at + NAME_AFTER.start..).unwrap_or_default();
            let after = &after[..after.len().min(NAME_AFTER.len() + name.len())];
            if let Some(host) = word(at - HOST_BEFORE)
                && after.windows(name.len()).any(|text| text == name)
            {
                found.add(host);
            }
        }
    }
}

#[cfg(fuzzing)]
pub(crate) fn fuzz(table: &str, heap: &[u8]) {
    let Ok(lines) = parse(table) else { return };
    assert!(lines.len() <= table.lines().count().saturating_sub(1));
    let told = |line: &Line| {
        let Line { name, offset, used, total, address } = line;
        let address = address.map(|address| format!(" {address:#x}")).unwrap_or_default();
        format!("\n{name} 4 KiB {offset:#x} {used:#x} {total:#x}{address}")
    };
    let again: String = lines.iter().map(told).collect();
    assert_eq!(parse(&again).expect("as QEMU tells it"), lines);
    let mut found = vec![Found::Nowhere; lines.len()];
    look_through(heap, &lines, &mut found);
    for (line, found) in lines.iter().zip(found) {
        let Some(address) = found.one() else { continue };
        let numbers = [line.offset, line.used, line.total].map(u64::to_le_bytes).concat();
        let is_there = |bytes: &[u8]| heap.windows(bytes.len()).any(|part| part == bytes);
        assert!(is_there(&address.to_le_bytes()) && is_there(&numbers), "{line:?}");
        assert!(is_there(&[line.name.as_bytes(), b"\0"].concat()), "{line:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_old_and_new_versions() {
        let old = "              Block Name    PSize              Offset               Used              Total\n\
                                 pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000\n\
                   /rom@etc/acpi/tables    4 KiB  0x0000000021000000 0x0000000000020000 0x0000000000200000\n";
        let line = |name: &str, offset, used, total, address| Line {
            name: name.to_owned(),
            offset,
            used,
            total,
            address,
        };
        let lines = parse(old).unwrap();
        assert_eq!(lines[0], line("pc.ram", 0, 512 << 20, 512 << 20, None));
        assert_eq!(lines[1], line("/rom@etc/acpi/tables", 0x2100_0000, 0x20000, 0x20_0000, None));
        let new = "Block Name PSize Offset Used Total HVA RO\n\
                   vga.vram 4 KiB 0x0000000080060000 0x0000000001000000 0x0000000001000000 0x00007f12ebe00000 rw\n\
                   4 KiB 0x0000000080060000 0x0000000001000000 0x0000000001000000 0x00007f12ebe00000 rw\n";
        let lines = parse(new).unwrap();
        assert_eq!(
            lines,
            [line("vga.vram", 0x8006_0000, 16 << 20, 16 << 20, Some(0x7f12_ebe0_0000))],
            "one has no name"
        );
        assert!(matches!(parse("x\nname 4 KiB 0x1 0x2\n"), Err(LocateError::Form { .. })));
    }

    #[test]
    fn a_block_is_of_the_backend_that_its_name_ends_with() {
        let is_of = |name: &str, id| LocatedBlock { name: name.into(), address: 0, used: 0 }.is_of(id);
        assert!(is_of("pc.ram", "pc.ram") && is_of("/objects/m", "m") && is_of("0000:00:03.0/m", "m"));
        assert!(
            !is_of("0000:00:03.0/vm", "m")
                && !is_of("m2", "m")
                && !is_of("0000:00:03.0/virtio-net-pci.rom", "m")
        );
    }

    #[test]
    fn a_description_is_found_by_its_numbers_and_its_name() {
        let line = Line { name: "pc.rom".into(), offset: 0x2000, used: 0x1000, total: 0x2000, address: None };
        let description = |name: &str| {
            let words = [0x7f00_0000_u64, 0, 0x2000, 0x1000, 0x2000, 0xdead];
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.extend([1, 0, 0, 0]);
            bytes.extend(name.as_bytes());
            // Descriptions are aligned.
            bytes.resize((bytes.len() + 64).next_multiple_of(8), 0);
            bytes
        };
        let look = |piece: &[u8]| {
            let mut found = [Found::Nowhere];
            look_through(piece, std::slice::from_ref(&line), &mut found);
            found[0]
        };
        let real = description("pc.rom");
        assert_eq!(look(&real), Found::At(0x7f00_0000));
        assert_eq!(look(&description("pc.rom2")), Found::Nowhere);
        assert_eq!(look(&[0; 64]), Found::Nowhere);
        assert_eq!(
            look(&[real.clone(), real.clone()].concat()),
            Found::At(0x7f00_0000),
            "once more the same"
        );
        let mut other = real.clone();
        other[1] = 1;
        assert_eq!(look(&[real, other].concat()), Found::Several, "one of them a guest has made up");
    }
}
