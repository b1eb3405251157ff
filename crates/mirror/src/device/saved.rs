//! Device state that QEMU has saved by itself (`xen-save-devices-state`), made into a migration stream that another QEMU takes.
//!
//! What QEMU saves is the stream of a migration without three things: the configuration section at the beginning, all RAM, and the
//! description at the end. Guest RAM is the mirror's; what else QEMU keeps in RAM blocks (video memory, firmware, ACPI tables) goes along
//! in a RAM section made here, so that the QEMU that loads it puts each where it belongs. The format is that of QEMU's migration/savevm.c and
//! migration/ram.c, section `ram` version 4, unchanged from QEMU 2.4 to 10.

use crate::hash::is_zero;
use crate::layout::PAGE_SIZE;

/// What a saved state begins with: magic (`QEVM`) and version.
pub const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";

const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const DESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
const FOOTER: u8 = 0x7e;

const RAM: &[u8] = b"ram";
const RAM_VERSION: u32 = 4;
/// No section that QEMU saves has it: those are counted from 0.
const RAM_SECTION: u32 = 0x7f00_0000;

/// What the offsets of pages are marked with, in the bits below a page.
const ZERO: u64 = 0x02;
const BLOCKS: u64 = 0x04;
const PAGE: u64 = 0x08;
const END: u64 = 0x10;
const SAME_BLOCK: u64 = 0x20;

/// A RAM block that is not the guest's main memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its name in the stream; at most 255 bytes.
    pub name: String,
    /// Its bytes in use, whole pages.
    pub content: Vec<u8>,
}

/// The beginning of the stream, with all of these blocks. Everything of it may be sent before the guest is paused.
#[must_use]
pub fn beginning(machine: &str, blocks: &[Block]) -> Vec<u8> {
    let mut stream = HEADER.to_vec();
    stream.push(CONFIGURATION);
    put(&mut stream, u32::try_from(machine.len()).unwrap_or(u32::MAX));
    stream.extend_from_slice(machine.as_bytes());
    stream.push(SECTION_START);
    put(&mut stream, RAM_SECTION);
    name(&mut stream, RAM);
    put(&mut stream, 0u32);
    put(&mut stream, RAM_VERSION);
    let bytes: u64 = blocks.iter().map(|block| block.content.len() as u64).sum();
    stream.extend((bytes | BLOCKS).to_be_bytes());
    for block in blocks {
        name(&mut stream, block.name.as_bytes());
        stream.extend((block.content.len() as u64).to_be_bytes());
    }
    // The pages are in the section's next part: of this one QEMU takes the list and looks for the end.
    stream.extend(END.to_be_bytes());
    footer(&mut stream);
    part(&mut stream, SECTION_PART, blocks.iter().map(|block| (block, None)));
    stream
}

/// What has changed of the blocks since that was sent; with the same names and sizes. The paused guest's, and the last of them.
#[must_use]
pub fn rest(before: &[Block], now: &[Block]) -> Vec<u8> {
    let mut stream = Vec::new();
    part(&mut stream, SECTION_END, now.iter().zip(before.iter().map(Some)));
    stream
}

/// What stands at the end of the stream where QEMU has described its content: nothing is.
#[must_use]
pub fn end() -> Vec<u8> {
    let mut stream = vec![DESCRIPTION];
    put(&mut stream, 2u32);
    stream.extend_from_slice(b"{}");
    stream
}

/// The pages of blocks, but for those that are as they were before. A page that is zero has to be said to be: QEMU there has loaded firmware.
fn part<'a>(stream: &mut Vec<u8>, section: u8, blocks: impl Iterator<Item = (&'a Block, Option<&'a Block>)>) {
    stream.push(section);
    put(stream, RAM_SECTION);
    for (block, before) in blocks {
        let mut named = false;
        let pages = block.content.chunks_exact(PAGE_SIZE);
        let mut known = before.map(|before| before.content.chunks_exact(PAGE_SIZE));
        for (number, page) in pages.enumerate() {
            if known.as_mut().is_some_and(|known| known.next() == Some(page)) {
                continue;
            }
            let same = if named { SAME_BLOCK } else { 0 };
            let zero = is_zero(page);
            let offset = number as u64 * PAGE_SIZE as u64;
            stream.extend((offset | same | if zero { ZERO } else { PAGE }).to_be_bytes());
            if !named {
                name(stream, block.name.as_bytes());
                named = true;
            }
            match zero {
                true => stream.push(0),
                false => stream.extend_from_slice(page),
            }
        }
    }
    stream.extend(END.to_be_bytes());
    footer(stream);
}

fn footer(stream: &mut Vec<u8>) {
    stream.push(FOOTER);
    put(stream, RAM_SECTION);
}

fn put(stream: &mut Vec<u8>, number: u32) {
    stream.extend(number.to_be_bytes());
}

fn name(stream: &mut Vec<u8>, name: &[u8]) {
    let name = &name[..name.len().min(255)];
    stream.push(name.len() as u8);
    stream.extend_from_slice(name);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, pages: &[u8]) -> Block {
        Block { name: name.into(), content: pages.iter().flat_map(|byte| vec![*byte; PAGE_SIZE]).collect() }
    }

    #[test]
    fn only_pages_that_have_changed_come_again() {
        let before = [block("vga.vram", &[1, 0, 2]), block("pc.rom", &[3])];
        let now = [block("vga.vram", &[1, 4, 0]), block("pc.rom", &[3])];
        let stream = rest(&before, &now);
        // Section, number; offset, name, page; offset, zero; the end, and the footer.
        assert_eq!(stream.len(), 5 + 8 + 9 + PAGE_SIZE + 8 + 1 + 8 + 5);
        assert_eq!(stream[5..13], (4096 | PAGE).to_be_bytes());
        assert_eq!(stream[13..22], *b"\x08vga.vram");
        assert_eq!(stream[22 + PAGE_SIZE..30 + PAGE_SIZE], (8192 | ZERO | SAME_BLOCK).to_be_bytes());
        assert_eq!(rest(&before, &before).len(), 5 + 8 + 5);
    }

    #[test]
    fn the_beginning_names_the_machine_and_every_block_with_its_size() {
        let stream = beginning("pc-q35-7.2", &[block("pc.rom", &[0])]);
        assert_eq!(stream[..13], *b"QEVM\0\0\0\x03\x07\0\0\0\x0a");
        assert_eq!(stream[13..23], *b"pc-q35-7.2");
        assert_eq!(stream[23..28], *b"\x01\x7f\0\0\0");
        assert_eq!(stream[28..40], *b"\x03ram\0\0\0\0\0\0\0\x04");
        assert_eq!(stream[40..48], (4096 | BLOCKS).to_be_bytes());
        assert_eq!(stream[48..63], [b"\x06pc.rom".as_slice(), &4096u64.to_be_bytes()].concat());
    }
}
