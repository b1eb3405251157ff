//! The goals, held against what was measured. Every goal is judged by medians, and a ratio only within one cell, whose
//! contenders took turns. Goals about disks are in `goals/disks.rs`, about the network in `goals/network.rs`. None is reached where vmirror has not made all the runs it was to make, each to its end.

mod disks;
mod network;

pub(crate) use disks::pause_of_disks;

use micro::Engine;
use readable::measured_ms as ms;
use serde::{Deserialize, Serialize};
use session::report::Round;

use crate::contender::Contender;
use crate::measure::Spread;
use crate::record::{Method, Miss, Sample};
use crate::trial::CellRecord;

/// A goal, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
const NOT_MEASURED: &str = "not measured";

/// Each goal.
pub fn of(cells: &[CellRecord], engine: Option<&Engine>) -> Vec<Goal> {
    let mut goals = vec![
        downtime(cells, "idle", "idle, unshaped", 10.0, 0.4),
        downtime(cells, "random-75", "dirtying 75 % of 1 Gbit/s", 30.0, 0.2),
        by_deltas(cells, "counters-150", "dirtying 150 %, small counters"),
        by_deltas(cells, "counters-400", "dirtying 400 %, small counters"),
        by_post_copy(cells, "random-150", "dirtying 150 %, incompressible, post-copy"),
        by_post_copy(cells, "random-400", "dirtying 400 %, incompressible, post-copy"),
        total_time(cells),
        bytes_sent(cells, "idle-debian", "bytes, Debian userland, 1 Gbit/s"),
        throughput(engine),
        slowdown(cells),
        overhead(cells),
    ];
    goals.extend(disks::of(cells));
    goals.extend(network::of(cells));
    goals
}

fn bytes(bytes: f64) -> String {
    readable::bytes(bytes as u64)
}

fn cell<'a>(cells: &'a [CellRecord], name: &str) -> Option<&'a CellRecord> {
    cells.iter().find(|record| record.cell.name == name)
}

fn spread(
    record: &CellRecord,
    contender: Contender,
    value: impl Fn(&Sample) -> Option<f64>,
) -> Option<Spread> {
    Spread::of(record.samples(contender).filter_map(value))
}

fn median(record: &CellRecord, contender: Contender, value: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
    spread(record, contender, value).map(|spread| spread.median)
}

/// A goal in a cell. What was found there counts only where every run of vmirror came to its end, and where its guest dirtied
/// what it was to dirty and found nothing wrong in itself afterwards.
fn judged(
    case: &str,
    goal: String,
    record: Option<&CellRecord>,
    found: impl FnOnce(&CellRecord) -> Option<(String, bool)>,
) -> Goal {
    let (measured, reached) = record.map_or_else(
        || (NOT_MEASURED.to_owned(), None),
        |record| {
            let tried = record.by(Contender::VMIRROR).count();
            let (done, asked) = (record.samples(Contender::VMIRROR).count(), record.sitting.runs);
            let runs = match missed(record, Contender::VMIRROR) {
                Some(missed) => format!("{done} of {asked} runs, then: {missed}"),
                None => format!("{done} of {asked} runs"),
            };
            match found(record) {
                Some((measured, reached)) => {
                    let wrong = match record.faults {
                        Some(0) if record.is_dirtied_as_asked() => "",
                        Some(0) => "; its guest dirtied less than asked",
                        Some(_) => "; its guest found wrong pages",
                        None => "; its guest was not asked afterwards",
                    };
                    let sound = done == asked as usize && done == tried && wrong.is_empty();
                    (format!("{measured}; {runs}{wrong}"), Some(reached && sound))
                }
                None if tried > done => (runs, Some(false)),
                None => (NOT_MEASURED.to_owned(), None),
            }
        },
    );
    Goal { case: case.to_owned(), goal, measured, reached }
}

/// A downtime, by itself and as a part of QEMU's.
fn downtime(cells: &[CellRecord], name: &str, case: &str, limit: f64, part: f64) -> Goal {
    let goal = format!("downtime ≤ {limit} ms, ≤ {part} of QEMU's default");
    judged(case, goal, cell(cells, name), |record| {
        let own = median(record, Contender::VMIRROR, |sample| Some(sample.downtime_ms))?;
        Some(match median(record, DEFAULT, |sample| Some(sample.downtime_ms)) {
            Some(qemu) => {
                let ratio = own / qemu;
                (format!("{}; {ratio:.2} of QEMU's {}", ms(own), ms(qemu)), own <= limit && ratio <= part)
            }
            None => (format!("{}; QEMU: {}", ms(own), missed(record, DEFAULT)?), own <= limit),
        })
    })
}

/// Why a contender has no figures.
fn missed(record: &CellRecord, contender: Contender) -> Option<String> {
    record.by(contender).find_map(|trial| trial.miss.as_ref()).map(ToString::to_string)
}

/// A guest that outruns the link, mirrored by deltas alone, where QEMU does not come to an end.
fn by_deltas(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const LIMIT_MS: f64 = 50.0;
    const WAITED_MS: f64 = 300_000.0;
    let goal =
        format!("by deltas alone, downtime ≤ {LIMIT_MS} ms; QEMU's pre-copy does not converge in 5 minutes");
    judged(case, goal, cell(cells, name), |record| {
        let own = median(record, Contender::VMIRROR, |sample| Some(sample.downtime_ms))?;
        let mut reports = record.samples(Contender::VMIRROR).filter_map(|sample| sample.report.as_ref());
        let alone = reports.all(|report| report.throttle.is_none() && report.post_copy.is_none());
        let long_enough =
            |miss: &Miss| matches!(miss, Miss::NotConverged { after_ms } if *after_ms >= WAITED_MS);
        let diverged = record.by(DEFAULT).filter_map(|trial| trial.miss.as_ref()).any(long_enough);
        let how = if alone { "" } else { " and slowed the guest" };
        let qemu = match median(record, DEFAULT, |sample| Some(sample.downtime_ms)) {
            Some(downtime) => format!("downtime {}", ms(downtime)),
            None => missed(record, DEFAULT)?,
        };
        // Told, not judged: the goal is about QEMU as it is, and one of its settings may get there all the same.
        let best = Contender::ALL
            .into_iter()
            .filter(|other| {
                !matches!(other.method, Method::Vmirror | Method::QemuDefault | Method::QemuPostCopy)
            })
            .filter_map(|other| Some((median(record, other, |sample| Some(sample.downtime_ms))?, other)))
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map_or_else(String::new, |(downtime, other)| {
                format!(", but {}: {}", other.name(), ms(downtime))
            });
        Some((format!("{}{how}; QEMU: {qemu}{best}", ms(own)), alone && own <= LIMIT_MS && diverged))
    })
}

/// How long a guest stood still in a migration: the longest of what its report says, and of what its client saw, which has in it
/// whatever the report leaves out. None where the client did not hear it again.
fn stall_ms(sample: &Sample) -> Option<f64> {
    let report = sample.report.as_ref()?;
    let fault = report.post_copy.as_ref().map_or(0.0, |tail| tail.longest_fault_ms);
    let gap = sample.gap_ms()?;
    Some(gap.max(fault).max(report.downtime_ms))
}

/// A guest that outruns the link, handed over before its memory was complete.
fn by_post_copy(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const LIMIT_MS: f64 = 100.0;
    let goal = format!("switched within one pass, longest stall ≤ {LIMIT_MS} ms");
    judged(case, goal, cell(cells, name), |record| {
        let samples: Vec<&Sample> = record.samples(Contender::VMIRROR).collect();
        let reports: Vec<_> = samples.iter().filter_map(|sample| sample.report.as_ref()).collect();
        // Whoever was not heard again stood still for longer than anything that was measured.
        let seen = samples.iter().map(|sample| stall_ms(sample).unwrap_or(f64::INFINITY));
        let stall = Spread::of(seen)?;
        // Those that withhold, or found nothing to withhold, and the one in the pause are none.
        let is_pass = |round: &&Round| !round.paused && round.withheld == 0 && round.dirty_pages > 0;
        let passes = reports.iter().map(|report| report.rounds.iter().filter(is_pass).count()).max()?;
        let used = reports.iter().filter(|report| report.post_copy.is_some()).count();
        let floor = record.unmigrated.and_then(|beats| beats.gap_ms()).unwrap_or(f64::NAN);
        let measured = format!(
            "longest stall {} (worst {}; not migrated, gap {}), {passes} pass{}, post-copy in {used} of {}",
            ms(stall.median),
            ms(stall.most),
            ms(floor),
            if passes == 1 { "" } else { "es" },
            reports.len()
        );
        Some((measured, stall.median <= LIMIT_MS && passes == 1 && used == samples.len()))
    })
}

/// The total time, against the best of QEMU's settings with TLS.
fn total_time(cells: &[CellRecord]) -> Goal {
    const PART: f64 = 0.7;
    let goal = format!("≤ {PART} of QEMU's best setting with TLS");
    judged("total time, idle, unshaped, TLS", goal, cell(cells, "idle"), |record| {
        let total = |contender| median(record, contender, |sample| Some(sample.total_ms));
        let own = total(Contender::VMIRROR)?;
        let others = Contender::ALL.into_iter().filter(|other| other.tls && *other != Contender::VMIRROR);
        let best =
            others.filter_map(|other| Some((total(other)?, other))).min_by(|a, b| a.0.total_cmp(&b.0))?;
        let ratio = own / best.0;
        let name = best.1.name();
        Some((format!("{}; {ratio:.2} of {} ({name})", ms(own), ms(best.0)), ratio <= PART))
    })
}

/// The bytes that went over the link.
fn bytes_sent(cells: &[CellRecord], name: &str, case: &str) -> Goal {
    const OF_DEFAULT: f64 = 0.4;
    const OF_MULTIFD: f64 = 0.9;
    let goal = format!("≤ {OF_DEFAULT} of QEMU's default, ≤ {OF_MULTIFD} of multifd with zstd");
    judged(case, goal, cell(cells, name), |record| {
        let sent = |contender| median(record, contender, |sample| Some(sample.link_bytes? as f64));
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
    })
}

/// What the engine sends through a cable, of what iperf3 does, each on one stream.
fn throughput(engine: Option<&Engine>) -> Goal {
    const PART: f64 = 0.5;
    let rate = |bytes: f64| format!("{:.2} GB/s", bytes / 1e9);
    let found = engine.and_then(|engine| {
        let (one, two) = (engine.on(1)?, engine.on(2)?);
        let measured = format!(
            "{}; {:.2} of iperf3's {}; two streams: {:.2}; with TLS: {:.2} and {:.2}; memcpy {} ({})",
            rate(one.plain),
            one.plain / one.iperf3,
            rate(one.iperf3),
            two.plain / two.iperf3,
            one.tls / one.iperf3,
            two.tls / two.iperf3,
            rate(engine.memcpy),
            date(engine)
        );
        Some((measured, one.plain >= PART * one.iperf3))
    });
    let (measured, reached) = found
        .map_or_else(|| (NOT_MEASURED.to_owned(), None), |(measured, reached)| (measured, Some(reached)));
    Goal {
        case: "throughput, incompressible, unshaped, TLS off".to_owned(),
        goal: format!("≥ {:.0} % of iperf3 over the same veth pair, one stream", PART * 100.0),
        measured,
        reached,
    }
}

/// When the engine was measured.
fn date(engine: &Engine) -> String {
    let time = jiff::Timestamp::from_second(engine.measured_unix_s).unwrap_or_default();
    time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M %Z").to_string()
}

/// What a mirrored guest loses of its speed.
fn slowdown(cells: &[CellRecord]) -> Goal {
    const LIMIT: f64 = 0.05;
    let goal = format!("≤ {:.0} %", LIMIT * 100.0);
    let case = "guest slowdown while mirrored, dirtying 100 MiB/s";
    judged(case, goal, cell(cells, "steady-100m"), |record| {
        let kept = record.by(Contender::VMIRROR).filter_map(|trial| trial.throughput.kept());
        let kept = Spread::of(kept)?;
        let lost = 1.0 - kept.median;
        let dirtied = bytes(record.dirtied.unwrap_or_default());
        Some((format!("{:.1} % at {dirtied}/s", lost * 100.0), lost <= LIMIT))
    })
}

/// What vmirror takes of a host's memory, in the cell where it is most beyond what is allowed.
fn overhead(cells: &[CellRecord]) -> Goal {
    let allowed = |record: &CellRecord| (record.cell.memory_mib << 20) as f64 / 100.0 + f64::from(128 << 20);
    let taken = |record: &CellRecord| {
        let taken = record.by(Contender::VMIRROR).filter_map(|trial| trial.overhead_bytes);
        taken.max().map(|most| most as f64)
    };
    let part = |record: &CellRecord| taken(record).map(|most| most / allowed(record));
    let worst = cells
        .iter()
        .filter_map(|record| Some((part(record)?, record)))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, record)| record);
    judged("ledger and caches", "≤ 1 % of guest RAM plus 128 MiB".to_owned(), worst, |record| {
        let (most, allowed) = (taken(record)?, allowed(record));
        let measured = format!("at most {} of {} in {}", bytes(most), bytes(allowed), record.cell.name);
        Some((measured, most <= allowed))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use micro::Through;
    use session::report::{Counted, PostCopy};

    use super::*;
    use crate::cell::Cell;
    use crate::measure::Beats;
    use crate::throughput::Throughput;
    use crate::trial::{Sitting, Trial};

    pub(crate) fn record(name: &str, downtimes: &[(Contender, f64)]) -> CellRecord {
        let cell = Cell::named(name);
        let trial = |&(contender, downtime_ms): &(Contender, f64)| {
            let mut sample = crate::figures::tests::record().samples.swap_remove(0);
            sample.downtime_ms = downtime_ms;
            Trial {
                contender,
                round: 0,
                sample: Some(sample),
                miss: None,
                throughput: Throughput { before: Some(100.0), during: Some(96.0), copied: None, after: None },
                overhead_bytes: Some(100 << 20),
            }
        };
        let runs = downtimes.iter().filter(|(contender, _)| *contender == Contender::VMIRROR).count();
        let dirtied = Some((cell.rate() * crate::cell::PAGE) as f64);
        let sitting = Sitting {
            started: "today".into(),
            took_ms: 60_000.0,
            runs: u32::try_from(runs).unwrap(),
            patience_s: 60,
            contenders: Contender::ALL.to_vec(),
            ..Sitting::default()
        };
        let trials = downtimes.iter().map(trial).collect();
        CellRecord { dirtied, trials, faults: Some(0), ..CellRecord::new(&cell, sitting) }
    }

    /// Whether the goal of a case is reached in these cells, and what was measured.
    pub(crate) fn judge(cells: &[CellRecord], case: &str) -> (Option<bool>, String) {
        let goal = of(cells, None).into_iter().find(|goal| goal.case.starts_with(case)).unwrap();
        (goal.reached, goal.measured)
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
            assert_eq!(judge(&[record("idle", downtimes)], "idle, unshaped").0, reached, "{downtimes:?}");
        }
        assert!(of(&[], None).iter().all(|goal| goal.reached.is_none() && goal.measured == "not measured"));
    }

    #[test]
    fn deltas_alone_are_judged_only_where_qemu_does_not_end() {
        const CASE: &str = "dirtying 150 %, small";
        let mut cell = record("counters-150", &[(Contender::VMIRROR, 20.0), (DEFAULT, 300.0)]);
        assert_eq!(judge(&[cell.clone()], CASE).0, Some(false));
        let trial = cell.trials.last_mut().unwrap();
        (trial.sample, trial.miss) = (None, Some(Miss::NotConverged { after_ms: 3e5 }));
        let told = "20.0 ms; QEMU: not converged in 300.00 s; 1 of 1 runs".to_owned();
        assert_eq!(judge(&[cell.clone()], CASE), (Some(true), told));
        let mut other = cell.trials[0].clone();
        other.contender = MULTIFD;
        cell.trials.push(other);
        let (_, told) = judge(&[cell], CASE);
        assert!(told.contains("300.00 s, but QEMU, multifd zstd: 20.0 ms; 1 of 1"), "{told}");
    }

    #[test]
    fn a_guest_that_dirties_less_than_asked_proves_nothing() {
        let reached = |part: f64| {
            let mut cell = record("steady-100m", &[(Contender::VMIRROR, 1.0)]);
            cell.dirtied = cell.dirtied.map(|dirtied| dirtied * part);
            judge(&[cell], "guest slowdown").0
        };
        assert_eq!([1.0, 0.95, 0.8].map(reached), [Some(true), Some(true), Some(false)]);
    }

    #[test]
    fn bytes_are_judged_on_the_userland_against_both_settings() {
        let sent = |own: u64| {
            let contenders = [(Contender::VMIRROR, own), (DEFAULT, 1000), (MULTIFD, 400)];
            let mut cell = record("idle-debian", &contenders.map(|(contender, _)| (contender, 1.0)));
            for (trial, (_, bytes)) in cell.trials.iter_mut().zip(contenders) {
                trial.sample.as_mut().unwrap().link_bytes = Some(bytes);
            }
            judge(&[cell], "bytes, Debian userland").0
        };
        assert_eq!([300, 370, 450].map(sent), [Some(true), Some(false), Some(false)]);
        let other = record("idle-text", &[(Contender::VMIRROR, 1.0), (DEFAULT, 1.0), (MULTIFD, 1.0)]);
        assert_eq!(judge(&[other], "bytes, Debian userland").0, None);
    }

    #[test]
    fn memory_and_speed_are_judged() {
        let cells = [record("steady-100m", &[(Contender::VMIRROR, 1.0)])];
        assert_eq!(judge(&cells, "ledger").0, Some(true));
        let told = "4.0 % at 100.0 MiB/s; 1 of 1 runs".to_owned();
        assert_eq!(judge(&cells, "guest slowdown"), (Some(true), told));
    }

    #[test]
    fn no_goal_is_reached_where_vmirror_missed_a_run_or_its_guest_is_not_known_to_be_whole() {
        let own = Contender::VMIRROR;
        let whole = record("idle", &[(own, 8.0), (own, 8.0), (DEFAULT, 40.0)]);
        let reached = |cell: &CellRecord| judge(std::slice::from_ref(cell), "idle, unshaped");
        assert_eq!(reached(&whole).0, Some(true));
        let mut missed = whole.clone();
        (missed.trials[1].sample, missed.trials[1].miss) =
            (None, Some(Miss::Failed { message: "no".into() }));
        let (verdict, measured) = reached(&missed);
        assert_eq!(verdict, Some(false));
        assert!(measured.ends_with("; 1 of 2 runs, then: no"), "{measured}");
        missed.trials.remove(0);
        assert_eq!(reached(&missed), (Some(false), "0 of 2 runs, then: no".into()));
        let mut fewer = whole.clone();
        fewer.trials.remove(0);
        assert_eq!(reached(&fewer).0, Some(false));
        for faults in [None, Some(1)] {
            let cell = CellRecord { faults, ..whole.clone() };
            assert_eq!(reached(&cell).0, Some(false), "{faults:?}");
        }
    }

    #[test]
    fn a_stall_that_only_the_client_saw_counts() {
        let mut cell = record("random-150", &[(Contender::VMIRROR, 20.0)]);
        cell.unmigrated = Some(Beats { sent: 9, lost: 0, longest_gap_ms: 3.0, heard_again: true });
        let judge = |cell: &CellRecord| judge(std::slice::from_ref(cell), "dirtying 150 %, incompressible");
        let heard = |cell: &mut CellRecord, longest_gap_ms, heard_again| {
            let sample = cell.trials[0].sample.as_mut().unwrap();
            let report = sample.report.as_mut().unwrap();
            report.rounds.retain(|round| round.n == 0);
            report.post_copy = Some(PostCopy {
                pages: 1000,
                faults: 10,
                longest_fault_ms: 2.0,
                mean_fault_ms: 1.0,
                duration_ms: 100.0,
                links: 1,
                counted: Counted::All,
            });
            sample.heartbeats = Some(Beats { sent: 9, lost: 0, longest_gap_ms, heard_again });
        };
        heard(&mut cell, 90.0, true);
        let (reached, measured) = judge(&cell);
        assert_eq!(reached, Some(true), "{measured}");
        assert!(
            measured.starts_with("longest stall 90.0 ms (worst 90.0 ms; not migrated, gap 3.00 ms), 1 pass")
        );
        cell.trials[0].sample.as_mut().unwrap().report.as_mut().unwrap().post_copy = None;
        assert_eq!(judge(&cell).0, Some(false), "it arrived in some other way");
        heard(&mut cell, 101.0, true);
        assert_eq!(judge(&cell).0, Some(false));
        heard(&mut cell, 5.0, false);
        assert_eq!(judge(&cell).0, Some(false));
    }

    #[test]
    fn bytes_are_those_of_the_link_and_memory_is_vmirrors() {
        let mut cell = record("idle-debian", &[(Contender::VMIRROR, 8.0), (DEFAULT, 40.0), (MULTIFD, 40.0)]);
        for (trial, bytes) in cell.trials.iter_mut().zip([30, 100, 40]) {
            trial.sample.as_mut().unwrap().link_bytes = Some(bytes << 20);
        }
        // QEMU's memory is not held against vmirror.
        cell.trials[1].overhead_bytes = Some(1 << 40);
        let cells = [cell.clone()];
        assert_eq!((judge(&cells, "bytes, Debian").0, judge(&cells, "ledger").0), (Some(true), Some(true)));
        cell.trials[0].sample.as_mut().unwrap().link_bytes = None;
        assert_eq!(judge(&[cell], "bytes, Debian").0, None);
    }

    #[test]
    fn throughput_is_judged_by_one_stream_against_iperf3() {
        for (plain, reached) in [(2.1e9, true), (1.9e9, false)] {
            let through = |streams| Through { streams, iperf3: 4e9, plain, tls: plain / 2.0 };
            let through = vec![through(1), through(2)];
            let engine = Engine { measured_unix_s: 1_700_000_000, memcpy: 8e9, through };
            let goals = of(&[], Some(&engine));
            let goal = goals.iter().find(|goal| goal.case.starts_with("throughput")).unwrap();
            assert!(goal.measured.ends_with(&format!("({})", date(&engine))));
            assert_eq!(goal.reached, Some(reached));
        }
    }
}
