//! The goals, held against what was measured. Every goal is judged by medians, and a ratio only within one cell, whose
//! contenders took turns.

use serde::Serialize;

use crate::cell::Contender;
use crate::measure::Spread;
use crate::number::{bytes, ms};
use crate::record::{Method, Miss, Sample};
use crate::trial::CellRecord;

/// A goal, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// The case.
    pub case: String,
    /// What was to be reached.
    pub goal: String,
    /// What was measured.
    pub measured: String,
    /// Whether it is reached; none where it was not measured.
    pub reached: Option<bool>,
}

const DEFAULT: Contender = Contender::plain(Method::QemuDefault);
const MULTIFD: Contender = Contender::plain(Method::QemuMultifd);

/// Each goal.
#[must_use]
pub fn of(cells: &[CellRecord]) -> Vec<Goal> {
    vec![
        downtime(cells, "idle", "idle, unshaped", 10.0, 0.4),
        downtime(cells, "random-75", "dirtying 75 % of 1 Gbit/s", 30.0, 0.2),
        by_deltas(cells, "counters-150", "dirtying 150 %, small counters"),
        by_deltas(cells, "counters-400", "dirtying 400 %, small counters"),
        by_post_copy(cells, "random-150", "dirtying 150 %, incompressible, post-copy"),
        by_post_copy(cells, "random-400", "dirtying 400 %, incompressible, post-copy"),
        total_time(cells),
        bytes_sent(cells, "idle-debian", "bytes, Debian userland"),
        slowdown(cells),
        overhead(cells),
    ]
}

fn cell<'a>(cells: &'a [CellRecord], name: &str) -> Option<&'a CellRecord> {
    cells.iter().find(|record| record.cell.name == name)
}

fn median(record: &CellRecord, contender: Contender, value: fn(&Sample) -> f64) -> Option<f64> {
    Spread::of(record.samples(contender).map(value)).map(|spread| spread.median)
}

fn judged(case: &str, goal: String, found: Option<(String, bool)>) -> Goal {
    let (measured, reached) = match found {
        Some((measured, reached)) => (measured, Some(reached)),
        None => ("not measured".to_owned(), None),
    };
    Goal { case: case.to_owned(), goal, measured, reached }
}

/// A downtime, by itself and as a part of QEMU's.
fn downtime(cells: &[CellRecord], name: &str, case: &str, limit: f64, part: f64) -> Goal {
    let goal = format!("downtime ≤ {limit} ms, ≤ {part} of QEMU's default");
    let found = cell(cells, name).and_then(|record| {
        let own = median(record, Contender::VMIRROR, |sample| sample.downtime_ms)?;
        Some(match median(record, DEFAULT, |sample| sample.downtime_ms) {
            Some(qemu) => {
                let ratio = own / qemu;
                (format!("{}; {ratio:.2} of QEMU's {}", ms(own), ms(qemu)), own <= limit && ratio <= part)
            }
            None => (format!("{}; QEMU: {}", ms(own), missed(record, DEFAULT)?), own <= limit),
        })
    });
    judged(case, goal, found)
}

/// Why a contender has no figures.
fn missed(record: &CellRecord, contender: Contender) -> Option<String> {
    record.by(contender).find_map(|trial| trial.miss.as_ref()).map(crate::present::missed)
}

/// A guest that outruns the link, mirrored by deltas alone, where QEMU does not come to an end.
fn by_deltas(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const LIMIT_MS: f64 = 50.0;
    let goal = format!("by deltas alone, downtime ≤ {LIMIT_MS} ms; QEMU's pre-copy does not converge");
    let found = cell(cells, name).and_then(|record| {
        let own = median(record, Contender::VMIRROR, |sample| sample.downtime_ms)?;
        let mut reports = record.samples(Contender::VMIRROR).filter_map(|sample| sample.report.as_ref());
        let alone = reports.all(|report| report.throttle.is_none() && report.post_copy.is_none());
        let diverged = record.by(DEFAULT).any(|trial| matches!(trial.miss, Some(Miss::NotConverged { .. })));
        let how = if alone { "" } else { " and slowed the guest" };
        let qemu = match median(record, DEFAULT, |sample| sample.downtime_ms) {
            Some(downtime) => format!("downtime {}", ms(downtime)),
            None => missed(record, DEFAULT)?,
        };
        Some((format!("{}{how}; QEMU: {qemu}", ms(own)), alone && own <= LIMIT_MS && diverged))
    });
    judged(case, goal, found)
}

/// A guest that outruns the link, handed over before its memory was complete.
fn by_post_copy(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const LIMIT_MS: f64 = 100.0;
    let goal = format!("switched within one pass, longest stall ≤ {LIMIT_MS} ms");
    let found = cell(cells, name).and_then(|record| {
        let samples: Vec<&Sample> = record.samples(Contender::VMIRROR).collect();
        let reports: Vec<_> = samples.iter().filter_map(|sample| sample.report.as_ref()).collect();
        let stalls = reports.iter().map(|report| {
            let fault = report.post_copy.as_ref().map_or(0.0, |tail| tail.longest_fault_ms);
            fault.max(report.downtime_ms)
        });
        let stall = Spread::of(stalls)?;
        // The first pass, the one that leaves out what was written meanwhile, and the one in the pause.
        let passes = reports
            .iter()
            .map(|report| report.rounds.iter().filter(|round| !round.paused && round.withheld == 0).count());
        let passes = passes.max()?;
        let used = reports.iter().filter(|report| report.post_copy.is_some()).count();
        let measured = format!(
            "longest stall {} (worst {}), {passes} pass{}, post-copy in {used} of {}",
            ms(stall.median),
            ms(stall.most),
            if passes == 1 { "" } else { "es" },
            reports.len()
        );
        Some((measured, stall.median <= LIMIT_MS && passes == 1))
    });
    judged(case, goal, found)
}

/// The total time, against the best of QEMU's settings with TLS.
fn total_time(cells: &[CellRecord]) -> Goal {
    const PART: f64 = 0.7;
    let found = cell(cells, "idle").and_then(|record| {
        let own = median(record, Contender::VMIRROR, |sample| sample.total_ms)?;
        let others = Contender::ALL.into_iter().filter(|other| other.tls && *other != Contender::VMIRROR);
        let best = others
            .filter_map(|other| Some((median(record, other, |sample| sample.total_ms)?, other)))
            .min_by(|a, b| a.0.total_cmp(&b.0))?;
        let ratio = own / best.0;
        let name = best.1.name();
        Some((format!("{}; {ratio:.2} of {} ({name})", ms(own), ms(best.0)), ratio <= PART))
    });
    judged("total time, idle, unshaped, TLS", format!("≤ {PART} of QEMU's best setting with TLS"), found)
}

/// The bytes that were sent.
fn bytes_sent(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const OF_DEFAULT: f64 = 0.4;
    const OF_MULTIFD: f64 = 0.9;
    let found = cell(cells, name).and_then(|record| {
        let sent = |contender| median(record, contender, |sample| sample.sent_bytes as f64);
        let (own, default, multifd) = (sent(Contender::VMIRROR)?, sent(DEFAULT)?, sent(MULTIFD)?);
        let measured = format!(
            "{}; {:.2} of {}, {:.2} of {}",
            bytes(own),
            own / default,
            bytes(default),
            own / multifd,
            bytes(multifd)
        );
        Some((measured, own <= default * OF_DEFAULT && own <= multifd * OF_MULTIFD))
    });
    let goal = format!("≤ {OF_DEFAULT} of QEMU's default, ≤ {OF_MULTIFD} of multifd with zstd");
    judged(case, goal, found)
}

/// What a mirrored guest loses of its speed.
fn slowdown(cells: &[CellRecord]) -> Goal {
    const LIMIT: f64 = 0.05;
    let found = cell(cells, "steady-100m").and_then(|record| {
        let kept = record.by(Contender::VMIRROR).filter_map(|trial| trial.throughput.kept());
        let kept = Spread::of(kept)?;
        let lost = 1.0 - kept.median;
        let dirtied = bytes(record.dirtied.unwrap_or_default());
        Some((format!("{:.1} % at {dirtied}/s", lost * 100.0), lost <= LIMIT))
    });
    judged("guest slowdown while mirrored, dirtying 100 MiB/s", format!("≤ {:.0} %", LIMIT * 100.0), found)
}

/// What vmirror takes of a host's memory, in the cell where it is most beyond what is allowed.
fn overhead(cells: &[CellRecord]) -> Goal {
    let allowed = |record: &CellRecord| (record.cell.memory_mib << 20) as f64 / 100.0 + f64::from(128 << 20);
    let worst = cells
        .iter()
        .filter_map(|record| {
            let most = record.trials.iter().filter_map(|trial| trial.overhead_bytes).max()? as f64;
            Some((most, allowed(record), record))
        })
        .max_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let found = worst.map(|(most, allowed, record)| {
        (format!("{} of {} in {}", bytes(most), bytes(allowed), record.cell.name), most <= allowed)
    });
    judged("ledger and caches", "≤ 1 % of guest RAM plus 128 MiB".to_owned(), found)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cell::Cell;
    use crate::throughput::Throughput;
    use crate::trial::Trial;

    pub(crate) fn record(name: &str, downtimes: &[(Contender, f64)]) -> CellRecord {
        let cell = Cell::all().into_iter().find(|cell| cell.name == name).unwrap();
        let trial = |&(contender, downtime_ms): &(Contender, f64)| {
            let mut sample = crate::figures::tests::record().samples.swap_remove(0);
            sample.downtime_ms = downtime_ms;
            Trial {
                contender,
                round: 0,
                sample: Some(sample),
                miss: None,
                throughput: Throughput { before: Some(100.0), during: Some(96.0), after: None },
                overhead_bytes: Some(100 << 20),
            }
        };
        CellRecord {
            description: cell.describe(),
            cell,
            dirtied: Some(1e8),
            unmigrated: None,
            trials: downtimes.iter().map(trial).collect(),
            faults: Some(0),
            skipped: None,
            failure: None,
        }
    }

    fn goal<'a>(goals: &'a [Goal], case: &str) -> &'a Goal {
        goals.iter().find(|goal| goal.case.starts_with(case)).unwrap()
    }

    #[test]
    fn a_goal_needs_both_its_figures() {
        let own = Contender::VMIRROR;
        for (downtimes, reached) in [
            (&[(own, 8.0), (DEFAULT, 40.0)][..], Some(true)),
            (&[(own, 8.0), (DEFAULT, 19.0)], Some(false)),
            (&[(own, 11.0), (DEFAULT, 90.0)], Some(false)),
            (&[(own, 8.0)], None),
            (&[(DEFAULT, 40.0)], None),
        ] {
            let goals = of(&[record("idle", downtimes)]);
            assert_eq!(goal(&goals, "idle, unshaped").reached, reached, "{downtimes:?}");
        }
        assert!(of(&[]).iter().all(|goal| goal.reached.is_none() && goal.measured == "not measured"));
    }

    #[test]
    fn deltas_alone_are_judged_only_where_qemu_does_not_end() {
        let mut cell = record("counters-150", &[(Contender::VMIRROR, 20.0), (DEFAULT, 300.0)]);
        assert_eq!(goal(&of(&[cell.clone()]), "dirtying 150 %, small").reached, Some(false));
        let trial = cell.trials.last_mut().unwrap();
        (trial.sample, trial.miss) = (None, Some(Miss::NotConverged { after_ms: 3e5 }));
        let goals = of(&[cell]);
        let goal = goal(&goals, "dirtying 150 %, small");
        assert_eq!(goal.reached, Some(true));
        assert_eq!(goal.measured, "20.0 ms; QEMU: not converged in 300.00 s");
    }

    #[test]
    fn bytes_are_judged_on_the_userland_against_both_settings() {
        let sent = |own: u64| {
            let contenders = [(Contender::VMIRROR, own), (DEFAULT, 1000), (MULTIFD, 400)];
            let mut cell = record("idle-debian", &contenders.map(|(contender, _)| (contender, 1.0)));
            for (trial, (_, bytes)) in cell.trials.iter_mut().zip(contenders) {
                trial.sample.as_mut().unwrap().sent_bytes = bytes;
            }
            goal(&of(&[cell]), "bytes, Debian userland").reached
        };
        assert_eq!([300, 370, 450].map(sent), [Some(true), Some(false), Some(false)]);
        let other = record("idle-text", &[(Contender::VMIRROR, 1.0), (DEFAULT, 1.0), (MULTIFD, 1.0)]);
        assert_eq!(goal(&of(&[other]), "bytes, Debian userland").reached, None);
    }

    #[test]
    fn memory_and_speed_are_judged() {
        let goals = of(&[record("steady-100m", &[(Contender::VMIRROR, 1.0)])]);
        assert_eq!(goal(&goals, "ledger").reached, Some(true));
        let slowdown = goal(&goals, "guest slowdown");
        assert_eq!((slowdown.reached, slowdown.measured.as_str()), (Some(true), "4.0 % at 95.4 MiB/s"));
    }
}
