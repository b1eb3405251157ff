//! Goals about guests whose disk moves with them, held against QEMU's own storage migration.

use readable::{count, measured_ms as ms};

use super::judged::{Case, Goal, find};
use crate::contender::Contender;
use crate::measure::bytes;
use crate::outcome::CellRecord;
use crate::record::{Measure, Sample};
use crate::throughput::Throughput;

const OWN: Contender = Contender::VMIRROR;
const QEMU: Contender = Contender::NBD;
/// The most that disks may add to the downtime.
const LIMIT_MS: f64 = 5.0;

/// Each of them.
pub(super) fn of(cells: &[CellRecord]) -> Vec<Goal> {
    let case = |name, cell| Case::of(cells, name, cell);
    vec![
        copy_time(case("disk of 4 GiB, unshaped", "disk-4g")),
        copy_time(case("disk of 4 GiB, 1 Gbit/s", "disk-4g-1gbit")),
        bytes_sent(case("bytes, disk half incompressible, 1 Gbit/s", "disk-4g-1gbit")),
        bytes_sent(case("bytes, disk of a Debian file system, 1 Gbit/s", "disk-debian")),
        guest_speed(case("guest's writes to a mirrored disk", "disk-write")),
        added_downtime(case("downtime with a disk at rest, unshaped", "disk-4g")),
        downtime_written(case("downtime with a disk that is written, unshaped", "disk-write")),
    ]
}

/// A figure of vmirror's as a part of QEMU's: in words, and the part.
fn part(cell: &CellRecord, measure: Measure, show: fn(f64) -> String) -> Option<(String, f64)> {
    let (own, qemu) = (cell.median(OWN, measure)?, cell.median(QEMU, measure)?);
    let ratio = own / qemu;
    Some((format!("{}; {ratio:.2} of {}", show(own), show(qemu)), ratio))
}

/// From the command until the guest runs there, memory and all; what the copying of the disk took of that beside it.
fn copy_time(case: Case<'_>) -> Goal {
    const PART: f64 = 0.8;
    case.goal(format!("copied and running there in ≤ {PART} of QEMU's time"), |cell| {
        let (words, ratio) = part(cell, Sample::UNTIL_RUNNING, ms)?;
        let [own, qemu] = [OWN, QEMU].map(|who| ms(cell.median(who, Sample::COPYING).unwrap_or(f64::NAN)));
        Some((format!("{words}; copying alone {own} and {qemu}"), ratio <= PART))
    })
}

fn bytes_sent(case: Case<'_>) -> Goal {
    const PART: f64 = 0.5;
    case.goal(format!("≤ {PART} of QEMU's"), |cell| {
        let (words, ratio) = part(cell, Sample::LINK_BYTES, bytes)?;
        Some((words, ratio <= PART))
    })
}

/// How fast a guest writes to a disk that is mirrored: while it is copied, and when only what is written travels.
fn guest_speed(case: Case<'_>) -> Goal {
    const PART: f64 = 0.9;
    case.goal(format!("≥ {PART} of the speed with QEMU's mirror, while it is copied and after"), |cell| {
        let both =
            |value: fn(&Throughput) -> Option<f64>| Some((cell.speed(OWN, value)?, cell.speed(QEMU, value)?));
        let (during, after) = (both(|speed| speed.during)?, both(|speed| speed.copied)?);
        let alone = both(|speed| speed.before)?;
        let words = |(own, qemu): (f64, f64)| {
            let [own_blocks, qemu_blocks] = [own, qemu].map(|blocks| count(blocks.round() as u64));
            format!("{own_blocks} blocks/s, {:.2} of {qemu_blocks}", own / qemu)
        };
        let measured = format!(
            "while copied {}; after {}; not mirrored {}, of which it keeps {:.2} and {:.2}, with QEMU {:.2} and {:.2}",
            words(during),
            words(after),
            words(alone),
            during.0 / alone.0,
            after.0 / alone.0,
            during.1 / alone.1,
            after.1 / alone.1
        );
        Some((measured, during.0 >= PART * during.1 && after.0 >= PART * after.1))
    })
}

/// QEMU's downtime, told beside vmirror's where there is one.
fn beside(cell: &CellRecord, words: &str) -> String {
    let qemu = cell.median(QEMU, Sample::DOWNTIME);
    qemu.map_or_else(String::new, |qemu| format!("; QEMU{words} {}", ms(qemu)))
}

/// What a disk that is written as fast as it goes takes of the pause.
fn downtime_written(case: Case<'_>) -> Goal {
    case.goal(format!("the disk takes ≤ {LIMIT_MS} ms of it"), |cell| {
        let in_pause = cell.median(OWN, Sample::PAUSE_OF_DISKS)?;
        let own = cell.median(OWN, Sample::DOWNTIME)?;
        Some((format!("{} of {}{}", ms(in_pause), ms(own), beside(cell, "")), in_pause <= LIMIT_MS))
    })
}

/// What a disk that nobody writes adds to a guest's downtime, by the report and by comparison with the same guest without one.
fn added_downtime(case: Case<'_>) -> Goal {
    let without = find(case.cells, "disk-none");
    case.goal(format!("adds ≤ {LIMIT_MS} ms"), |cell| {
        let own = cell.median(OWN, Sample::DOWNTIME)?;
        let in_pause = cell.median(OWN, Sample::PAUSE_OF_DISKS)?;
        let without = without?.median(OWN, Sample::DOWNTIME)?;
        let added = own - without;
        let measured = format!(
            "{} with it, {} without: {added:.1} ms more; in the pause the disk takes {}{}",
            ms(own),
            ms(without),
            ms(in_pause),
            beside(cell, ", with the disk:")
        );
        Some((measured, added.max(in_pause) <= LIMIT_MS))
    })
}
