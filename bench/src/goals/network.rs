//! Goals about what a guest's network notices, held against QEMU's own migration.

use readable::{count, measured_ms as ms};

use super::{DEFAULT, Goal, cell, judged, median, missed};
use crate::contender::Contender;
use crate::record::Sample;
use crate::trial::CellRecord;

const CELL: &str = "idle-zero";

/// Each of them.
pub(super) fn of(cells: &[CellRecord]) -> Vec<Goal> {
    vec![frames_lost(cells), gap(cells), added_downtime(cells)]
}

/// Of 1,000 frames per second, and as many answers.
fn frames_lost(cells: &[CellRecord]) -> Goal {
    judged("frames lost, idle, unshaped", "none in all runs".to_owned(), cell(cells, CELL), |record| {
        let lost = |contender| {
            let beats = record.samples(contender).filter_map(|sample| sample.heartbeats);
            beats.map(|beats| beats.lost).reduce(|sum, lost| sum + lost)
        };
        let own = lost(Contender::VMIRROR)?;
        let qemu = match lost(DEFAULT) {
            Some(qemu) => format!("QEMU {}", count(qemu)),
            None => format!("QEMU: {}", missed(record, DEFAULT)?),
        };
        Some((format!("{}; {qemu}", count(own)), own == 0))
    })
}

/// How much longer than its downtime a guest is not heard.
fn gap(cells: &[CellRecord]) -> Goal {
    const LIMIT_MS: f64 = 3.0;
    let goal = format!("≤ downtime + {LIMIT_MS} ms");
    judged("heartbeat gap, idle, unshaped", goal, cell(cells, CELL), |record| {
        let beyond = |sample: &Sample| Some(sample.gap_ms()? - sample.downtime_ms);
        let own = median(record, Contender::VMIRROR, beyond)?;
        let qemu = median(record, DEFAULT, beyond);
        let qemu = qemu.map_or_else(String::new, |qemu| format!("; QEMU: its downtime + {}", ms(qemu)));
        Some((format!("downtime + {}{qemu}", ms(own)), own <= LIMIT_MS))
    })
}

/// What it costs to carry frames.
fn added_downtime(cells: &[CellRecord]) -> Goal {
    const LIMIT_MS: f64 = 2.0;
    let goal = format!("carrying frames adds ≤ {LIMIT_MS} ms");
    judged("downtime with frames carried, unshaped", goal, cell(cells, CELL), |record| {
        let downtime = |record| median(record, Contender::VMIRROR, |sample| Some(sample.downtime_ms));
        let (with, without) = (downtime(record)?, downtime(cell(cells, "idle-zero-no-frames")?)?);
        let added = with - without;
        Some((format!("{} with, {} without: {added:+.1} ms", ms(with), ms(without)), added <= LIMIT_MS))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{judge, record};
    use super::*;
    use crate::measure::Beats;

    fn with_beats(name: &str, figures: &[(Contender, f64, f64, u64)]) -> CellRecord {
        let trials: Vec<(Contender, f64)> =
            figures.iter().map(|(contender, downtime, ..)| (*contender, *downtime)).collect();
        let mut record = record(name, &trials);
        for (trial, (.., longest_gap_ms, lost)) in record.trials.iter_mut().zip(figures) {
            let beats = Beats { sent: 9000, lost: *lost, longest_gap_ms: *longest_gap_ms, heard_again: true };
            trial.sample.as_mut().unwrap().heartbeats = Some(beats);
        }
        record
    }

    #[test]
    fn no_frame_may_be_lost_and_no_gap_be_longer_than_the_pause() {
        for (gap, lost, heard, kept) in [(12.5, 0, true, true), (14.0, 1, false, false)] {
            let cells =
                [with_beats(CELL, &[(Contender::VMIRROR, 10.0, gap, lost), (DEFAULT, 50.0, 90.0, 40)])];
            assert_eq!(judge(&cells, "heartbeat gap").0, Some(heard), "{gap}");
            assert_eq!(judge(&cells, "frames lost").0, Some(kept), "{lost}");
        }
    }

    #[test]
    fn what_frames_add_is_told_beside_a_guest_whose_frames_are_lost() {
        let with = with_beats(CELL, &[(Contender::VMIRROR, 10.0, 12.0, 0)]);
        assert_eq!(judge(std::slice::from_ref(&with), "downtime with frames").0, None);
        for (without, expected) in [(9.0, true), (7.0, false)] {
            let without = record("idle-zero-no-frames", &[(Contender::VMIRROR, without)]);
            assert_eq!(judge(&[with.clone(), without], "downtime with frames").0, Some(expected));
        }
    }
}
