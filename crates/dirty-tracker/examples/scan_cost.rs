//! What tracking costs: how long the process is held, a scan of clean memory, and scans that find 40,000
//! written pages in every way. Needs nothing but Linux 6.7: it tracks a child process of its own.
//!
//! `cargo run --release -p dirty-tracker --example scan_cost [GIBIBYTES]`

use dirty_tracker::{DescriptorSource, Scan, Tracker};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::error::Error;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const DIRTY_PAGES: usize = 40_000;
const ROUNDS: usize = 15;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("child") => child(arguments.next().ok_or("no size")?.parse()?),
        size => measure(size.unwrap_or("1").parse()?),
    }
}

/// Maps that much shared memory, fills it, and dirties pages of it at every line of input.
fn child(bytes: usize) -> Result<(), Box<dyn Error>> {
    let path = format!("/dev/shm/dirty-tracker-scan-cost-{}", std::process::id());
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    file.set_len(bytes as u64)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
    }?;
    // SAFETY: the mapping is that long, and nothing else in this process refers to it.
    let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), bytes) };
    memory.fill(1);
    println!("{}", start.addr());
    let mut state = 1_u64;
    for line in std::io::stdin().lines() {
        for _ in 0..line?.parse::<usize>()? {
            // xorshift64: scattered, and the same in every run.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let page = usize::try_from(state)? % (bytes / PAGE);
            memory[page * PAGE] = memory[page * PAGE].wrapping_add(1);
        }
        println!("done");
    }
    Ok(())
}

fn measure(gibibytes: f64) -> Result<(), Box<dyn Error>> {
    let bytes = (gibibytes * f64::from(1 << 18)) as usize * PAGE;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["child", &bytes.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().ok_or("no stdin")?;
    let mut output = BufReader::new(child.stdout.take().ok_or("no stdout")?).lines();
    let start: u64 = output.next().ok_or("child ended")??.parse()?;
    let range = start..start + bytes as u64;

    let mut holds = Vec::new();
    let mut attaches = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let tracker = Tracker::attach(child.id(), std::slice::from_ref(&range), DescriptorSource::Injected)?;
        attaches.push(begin.elapsed());
        holds.push(tracker.hold());
        tracker.detach()?;
    }
    println!("memory                          {gibibytes} GiB");
    print("hold of the process", &mut holds);
    print("attach as a whole", &mut attaches);

    let mut tracker = Tracker::attach(child.id(), std::slice::from_ref(&range), DescriptorSource::Injected)?;
    let mut regions = Vec::new();
    let first = tracker.scan(Scan::OneStep, &mut regions)?;
    println!("first scan, {} pages        {:?}", first.pages, first.elapsed);
    for (name, scan) in [("one step", Scan::OneStep), ("two steps", Scan::TwoStep), ("list only", Scan::List)]
    {
        let mut clean = Vec::new();
        for _ in 0..ROUNDS {
            regions.clear();
            clean.push(tracker.scan(scan, &mut regions)?.elapsed);
        }
        print(&format!("clean, {name}"), &mut clean);
    }
    for (name, scan) in [("one step", Scan::OneStep), ("two steps", Scan::TwoStep), ("list only", Scan::List)]
    {
        let mut dirty = Vec::new();
        let mut found = (0, 0);
        for _ in 0..ROUNDS {
            regions.clear();
            tracker.scan(Scan::OneStep, &mut regions)?;
            writeln!(input, "{DIRTY_PAGES}")?;
            output.next().ok_or("child ended")??;
            regions.clear();
            let stats = tracker.scan(scan, &mut regions)?;
            dirty.push(stats.elapsed);
            found = (stats.pages, stats.calls);
        }
        print(&format!("{} scattered pages, {name}", found.0), &mut dirty);
        println!("{:32}{} calls", "", found.1);
    }
    tracker.detach()?;
    drop(input);
    child.wait()?;
    Ok(())
}

/// Median and worst.
fn print(what: &str, times: &mut [Duration]) {
    times.sort();
    let worst = times.last().copied().unwrap_or_default();
    println!("{what:32}median {:>10.1?}  worst {worst:>10.1?}", times[times.len() / 2]);
}
