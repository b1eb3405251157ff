//! The process whose memory the benchmarks track: it maps a file and writes to its pages when it is told to.
//!
//! `tracee FILE BYTES` prints where it has mapped the file, and then `done` for each line of its input:
//!
//! | line | |
//! | --- | --- |
//! | `touch N` | writes to N random pages what they hold already |
//! | `touch all` | the same to every page |
//! | `change all` | adds one to a word of every page |

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;

use rustix::mm::{MapFlags, ProtFlags, mmap};

/// 8-byte words of a page.
const WORDS: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("no file")?;
    let bytes: usize = arguments.next().ok_or("no size")?.parse()?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
    }?;
    let memory = start.cast::<u64>();
    let pages = bytes / (WORDS * 8);
    let add = |page: usize, number: u64| {
        // SAFETY: a word of a page of the mapping, which is aligned and lasts as long as the process.
        unsafe {
            let word = memory.add(page * WORDS + WORDS / 2);
            word.write_volatile(word.read_volatile().wrapping_add(number));
        }
    };
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", start.addr())?;
    let mut state = 1_u64;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "touch all" => (0..pages).for_each(|page| add(page, 0)),
            "change all" => (0..pages).for_each(|page| add(page, 1)),
            other => {
                let count: usize = other.strip_prefix("touch ").ok_or("not a command")?.parse()?;
                for _ in 0..count {
                    // xorshift64: scattered, and the same in every run.
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    add(usize::try_from(state >> 8)? % pages, 0);
                }
            }
        }
        writeln!(output, "done")?;
    }
    Ok(())
}
