//! Goals about guests whose disk moves with them, held against QEMU's own storage migration.

use readable::{count, measured_ms as ms};

use super::{Goal, bytes, cell, judged, median};
use crate::contender::Contender;
use crate::measure::Spread;
use crate::record::Sample;
use crate::throughput::Throughput;
use crate::trial::CellRecord;

/// Each of them.
pub(super) fn of(cells: &[CellRecord]) -> Vec<Goal> {
    vec![
        copy_time(cells, "disk-4g", "disk of 4 GiB, unshaped"),
        copy_time(cells, "disk-4g-1gbit", "disk of 4 GiB, 1 Gbit/s"),
        bytes_sent(cells, "disk-4g-1gbit", "bytes, disk half incompressible, 1 Gbit/s"),
        bytes_sent(cells, "disk-debian", "bytes, disk of a Debian file system, 1 Gbit/s"),
        guest_speed(cells),
        added_downtime(cells),
        downtime_written(cells),
    ]
}

/// From the command until the guest runs there, memory and all; what the copying of the disk took of that beside it.
fn copy_time(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const PART: f64 = 0.8;
    let goal = format!("copied and running there in ≤ {PART} of QEMU's time");
    judged(case, goal, cell(cells, name), |record| {
        let until = |contender| median(record, contender, |sample| Some(sample.until_running_ms));
        let (own, qemu) = (until(Contender::VMIRROR)?, until(Contender::NBD)?);
        let copying = |contender| median(record, contender, |sample| Some(sample.disk?.took_ms()));
        let copying = [Contender::VMIRROR, Contender::NBD].map(|who| ms(copying(who).unwrap_or(f64::NAN)));
        let ratio = own / qemu;
        let measured = format!(
            "{}; {ratio:.2} of {}; copying alone {} and {}",
            ms(own),
            ms(qemu),
            copying[0],
            copying[1]
        );
        Some((measured, ratio <= PART))
    })
}

fn bytes_sent(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const PART: f64 = 0.5;
    judged(case, format!("≤ {PART} of QEMU's"), cell(cells, name), |record| {
        let sent = |contender| median(record, contender, |sample| Some(sample.link_bytes? as f64));
        let (own, qemu) = (sent(Contender::VMIRROR)?, sent(Contender::NBD)?);
        let ratio = own / qemu;
        Some((format!("{}; {ratio:.2} of {}", bytes(own), bytes(qemu)), ratio <= PART))
    })
}

/// How fast a guest writes to a disk that is mirrored: while it is copied, and when only what is written travels.
fn guest_speed(cells: &[CellRecord]) -> Goal {
    const PART: f64 = 0.9;
    let goal = format!("≥ {PART} of the speed with QEMU's mirror, while it is copied and after");
    judged("guest's writes to a mirrored disk", goal, cell(cells, "disk-write"), |record| {
        let speed = |contender, value: fn(&Throughput) -> Option<f64>| {
            let speeds = record.by(contender).filter_map(|trial| value(&trial.throughput));
            Spread::of(speeds).map(|spread| spread.median)
        };
        let both = |value| Some((speed(Contender::VMIRROR, value)?, speed(Contender::NBD, value)?));
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

/// The most that disks may add to the downtime.
const LIMIT_MS: f64 = 5.0;

/// What a disk that is written as fast as it goes takes of the pause.
fn downtime_written(cells: &[CellRecord]) -> Goal {
    let goal = format!("the disk takes ≤ {LIMIT_MS} ms of it");
    judged("downtime with a disk that is written, unshaped", goal, cell(cells, "disk-write"), |record| {
        let in_pause = median(record, Contender::VMIRROR, pause_of_disks)?;
        let own = median(record, Contender::VMIRROR, |sample| Some(sample.downtime_ms))?;
        let qemu = median(record, Contender::NBD, |sample| Some(sample.downtime_ms));
        let qemu = qemu.map_or_else(String::new, |qemu| format!("; QEMU {}", ms(qemu)));
        Some((format!("{} of {}{qemu}", ms(in_pause), ms(own)), in_pause <= LIMIT_MS))
    })
}

/// What a disk that nobody writes adds to a guest's downtime, by the report and by comparison with the same guest without one.
fn added_downtime(cells: &[CellRecord]) -> Goal {
    let goal = format!("adds ≤ {LIMIT_MS} ms");
    judged("downtime with a disk at rest, unshaped", goal, cell(cells, "disk-4g"), |record| {
        let own = median(record, Contender::VMIRROR, |sample| Some(sample.downtime_ms))?;
        let in_pause = median(record, Contender::VMIRROR, pause_of_disks)?;
        let without = cell(cells, "disk-none")?;
        let without = median(without, Contender::VMIRROR, |sample| Some(sample.downtime_ms))?;
        let added = own - without;
        let qemu = median(record, Contender::NBD, |sample| Some(sample.downtime_ms));
        let qemu = qemu.map_or_else(String::new, |qemu| format!("; QEMU, with the disk: {}", ms(qemu)));
        let measured = format!(
            "{} with it, {} without: {added:.1} ms more; in the pause the disk takes {}{qemu}",
            ms(own),
            ms(without),
            ms(in_pause)
        );
        Some((measured, added.max(in_pause) <= LIMIT_MS))
    })
}

/// From when the guest is known to be stopped until its disks are complete.
pub(crate) fn pause_of_disks(sample: &Sample) -> Option<f64> {
    let pause = &sample.report.as_ref()?.pause;
    (pause.disks_ms > 0.0).then_some(pause.disks_ms - pause.stopped_ms)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{judge, record};
    use super::*;
    use crate::record::DiskCopy;

    fn with_figures(name: &str, figures: &[(Contender, f64, u64)]) -> CellRecord {
        let trials: Vec<(Contender, f64)> =
            figures.iter().map(|(contender, ..)| (*contender, 20.0)).collect();
        let mut record = record(name, &trials);
        for (trial, (_, seconds, mib)) in record.trials.iter_mut().zip(figures) {
            let sample = trial.sample.as_mut().unwrap();
            sample.until_running_ms = seconds * 1e3;
            sample.link_bytes = Some(mib << 20);
            sample.disk = Some(DiskCopy { began_ms: 500.0, copied_ms: seconds * 1e3 - 500.0 });
        }
        record
    }

    #[test]
    fn time_and_bytes_are_parts_of_qemus() {
        for (seconds, mib, time, bytes) in [(7.0, 500, true, true), (9.0, 600, false, false)] {
            let figures = [(Contender::VMIRROR, seconds, mib), (Contender::NBD, 10.0, 1000)];
            let cells = [with_figures("disk-4g-1gbit", &figures)];
            assert_eq!(judge(&cells, "disk of 4 GiB, 1 Gbit/s").0, Some(time), "{seconds}");
            assert_eq!(judge(&cells, "bytes, disk half").0, Some(bytes), "{mib}");
        }
        let alone = [with_figures("disk-4g", &[(Contender::VMIRROR, 1.0, 1)])];
        assert_eq!(judge(&alone, "disk of 4 GiB, unshaped").0, None);
        assert!(of(&[]).iter().all(|goal| goal.reached.is_none()));
    }

    #[test]
    fn a_guest_is_to_be_fast_while_its_disk_is_copied_and_after() {
        let figures = [(Contender::VMIRROR, 5.0, 1), (Contender::NBD, 5.0, 1)];
        for (during, copied, reached) in [(95.0, 95.0, true), (85.0, 95.0, false), (95.0, 85.0, false)] {
            let mut record = with_figures("disk-write", &figures);
            let speeds = [(during, copied), (100.0, 100.0)];
            for (trial, (during, copied)) in record.trials.iter_mut().zip(speeds) {
                (trial.throughput.during, trial.throughput.copied) = (Some(during), Some(copied));
            }
            assert_eq!(judge(&[record], "guest's writes").0, Some(reached), "{during} {copied}");
        }
    }

    #[test]
    fn added_downtime_is_judged_by_the_larger_of_both_ways_to_see_it() {
        for (with, in_pause, reached) in [(12.0, 4.0, true), (14.0, 4.0, false), (9.0, 6.0, false)] {
            let mut disk = with_figures("disk-4g", &[(Contender::VMIRROR, 5.0, 1)]);
            let sample = disk.trials[0].sample.as_mut().unwrap();
            sample.downtime_ms = with;
            let pause = &mut sample.report.as_mut().unwrap().pause;
            pause.disks_ms = pause.stopped_ms + in_pause;
            let none = record("disk-none", &[(Contender::VMIRROR, 8.0)]);
            let (judged, _) = judge(&[disk, none], "downtime with a disk");
            assert_eq!(judged, Some(reached), "{with} {in_pause}");
        }
    }
}
