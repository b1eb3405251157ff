//! Goals about guests without a disk: how long they stand still, how soon they are there, and what that takes.

use micro::Engine;
use readable::measured_ms as ms;
use session::report::Round;

use super::judged::{Case, Goal, find};
use crate::contender::Contender;
use crate::measure::bytes;
use crate::outcome::CellRecord;
use crate::record::{Measure, Method, Miss, Sample};

const OWN: Contender = Contender::VMIRROR;
const DEFAULT: Contender = Contender::DEFAULT;
const MULTIFD: Contender = Contender::plain(Method::QemuMultifd);

/// Each of them.
pub(super) fn of(cells: &[CellRecord], engine: Option<&Engine>) -> Vec<Goal> {
    let case = |name, cell| Case::of(cells, name, cell);
    vec![
        downtime(case("idle, unshaped", "idle"), 10.0, 0.4),
        downtime(case("dirtying 75 % of 1 Gbit/s", "random-75"), 30.0, 0.2),
        private(case("private memory, idle, unshaped", "idle-private")),
        by_deltas(case("dirtying 150 %, small counters", "counters-150")),
        by_deltas(case("dirtying 400 %, small counters", "counters-400")),
        by_post_copy(case("dirtying 150 %, incompressible, post-copy", "random-150")),
        by_post_copy(case("dirtying 400 %, incompressible, post-copy", "random-400")),
        total_time(case("total time, idle, unshaped, TLS", "idle")),
        bytes_sent(case("bytes, Debian userland, 1 Gbit/s", "idle-debian")),
        throughput(engine),
        slowdown(case("guest slowdown while mirrored, dirtying 100 MiB/s", "steady-100m")),
        slowdown(case(
            "guest slowdown while mirrored, private memory, dirtying 100 MiB/s",
            "steady-100m-private",
        )),
        overhead(cells),
    ]
}

/// The contender with the smallest median, of some.
fn best(cell: &CellRecord, measure: Measure, among: fn(&Contender) -> bool) -> Option<(f64, Contender)> {
    let others = Contender::ALL.into_iter().filter(|other| *other != OWN).filter(among);
    others.filter_map(|other| Some((cell.median(other, measure)?, other))).min_by(|a, b| a.0.total_cmp(&b.0))
}

/// A downtime, by itself and as a part of QEMU's.
fn downtime(case: Case<'_>, limit: f64, part: f64) -> Goal {
    case.goal(format!("downtime ≤ {limit} ms, ≤ {part} of QEMU's default"), |cell| {
        let own = cell.median(OWN, Sample::DOWNTIME)?;
        Some(match cell.median(DEFAULT, Sample::DOWNTIME) {
            Some(qemu) => {
                let ratio = own / qemu;
                (format!("{}; {ratio:.2} of QEMU's {}", ms(own), ms(qemu)), own <= limit && ratio <= part)
            }
            None => (format!("{}; QEMU: {}", ms(own), cell.missed(DEFAULT)?), own <= limit),
        })
    })
}

/// The downtime of a guest with private memory, as a part of QEMU's and beside that of one whose memory is a file.
fn private(case: Case<'_>) -> Goal {
    const OF_SHARED: f64 = 1.2;
    const OF_QEMU: f64 = 0.4;
    let shared = find(case.cells, "idle");
    case.goal(
        format!("downtime ≤ {OF_SHARED} of that with shared memory, ≤ {OF_QEMU} of QEMU's default"),
        |cell| {
            let own = cell.median(OWN, Sample::DOWNTIME)?;
            let (shared, qemu) =
                (shared?.median(OWN, Sample::DOWNTIME)?, cell.median(DEFAULT, Sample::DOWNTIME)?);
            let (of_shared, of_qemu) = (own / shared, own / qemu);
            let measured = format!(
                "{}; {of_shared:.2} of {} with shared memory; {of_qemu:.2} of QEMU's {}",
                ms(own),
                ms(shared),
                ms(qemu)
            );
            Some((measured, of_shared <= OF_SHARED && of_qemu <= OF_QEMU))
        },
    )
}

/// A guest that outruns the link, mirrored by deltas alone, where QEMU does not come to an end.
fn by_deltas(case: Case<'_>) -> Goal {
    const LIMIT_MS: f64 = 50.0;
    const WAITED_MS: f64 = 300_000.0;
    let goal =
        format!("by deltas alone, downtime ≤ {LIMIT_MS} ms; QEMU's pre-copy does not converge in 5 minutes");
    case.goal(goal, |cell| {
        let own = cell.median(OWN, Sample::DOWNTIME)?;
        let mut reports = cell.samples(OWN).filter_map(|sample| sample.report.as_ref());
        let alone = reports.all(|report| report.throttle.is_none() && report.post_copy.is_none());
        let long_enough =
            |miss: &Miss| matches!(miss, Miss::NotConverged { after_ms } if *after_ms >= WAITED_MS);
        let diverged = cell.by(DEFAULT).filter_map(|trial| trial.miss.as_ref()).any(long_enough);
        let how = if alone { "" } else { " and slowed the guest" };
        let qemu = match cell.median(DEFAULT, Sample::DOWNTIME) {
            Some(downtime) => format!("downtime {}", ms(downtime)),
            None => cell.missed(DEFAULT)?.to_string(),
        };
        // Told, not judged: the goal is about QEMU as it is, and one of its settings may get there all the same.
        let is_setting =
            |other: &Contender| !matches!(other.method, Method::QemuDefault | Method::QemuPostCopy);
        let best = best(cell, Sample::DOWNTIME, is_setting).map_or_else(String::new, |(downtime, other)| {
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
    Some(Sample::GAP(sample)?.max(fault).max(report.downtime_ms))
}

/// A guest that outruns the link, handed over before its memory was complete.
fn by_post_copy(case: Case<'_>) -> Goal {
    const LIMIT_MS: f64 = 100.0;
    case.goal(format!("switched within one pass, longest stall ≤ {LIMIT_MS} ms"), |cell| {
        // Whoever was not heard again stood still for longer than anything that was measured.
        let stall = cell.spread(OWN, |sample| Some(stall_ms(sample).unwrap_or(f64::INFINITY)))?;
        let reports: Vec<_> = cell.samples(OWN).filter_map(|sample| sample.report.as_ref()).collect();
        // Those that withhold, or found nothing to withhold, and the one in the pause are none.
        let is_pass = |round: &&Round| !round.paused && round.withheld == 0 && round.dirty_pages > 0;
        let passes = reports.iter().map(|report| report.rounds.iter().filter(is_pass).count()).max()?;
        let used = reports.iter().filter(|report| report.post_copy.is_some()).count();
        let floor = cell.unmigrated.and_then(|beats| beats.gap_ms()).unwrap_or(f64::NAN);
        let measured = format!(
            "longest stall {} (worst {}; not migrated, gap {}), {passes} pass{}, post-copy in {used} of {}",
            ms(stall.median),
            ms(stall.most),
            ms(floor),
            if passes == 1 { "" } else { "es" },
            reports.len()
        );
        Some((measured, stall.median <= LIMIT_MS && passes == 1 && used == stall.count))
    })
}

/// The total time, against the best of QEMU's settings with TLS.
fn total_time(case: Case<'_>) -> Goal {
    const PART: f64 = 0.7;
    case.goal(format!("≤ {PART} of QEMU's best setting with TLS"), |cell| {
        let own = cell.median(OWN, Sample::TOTAL)?;
        let (qemu, which) = best(cell, Sample::TOTAL, |other| other.tls)?;
        let ratio = own / qemu;
        Some((format!("{}; {ratio:.2} of {} ({})", ms(own), ms(qemu), which.name()), ratio <= PART))
    })
}

/// The bytes that went over the link.
fn bytes_sent(case: Case<'_>) -> Goal {
    const OF_DEFAULT: f64 = 0.4;
    const OF_MULTIFD: f64 = 0.9;
    case.goal(format!("≤ {OF_DEFAULT} of QEMU's default, ≤ {OF_MULTIFD} of multifd with zstd"), |cell| {
        let sent = |contender| cell.median(contender, Sample::LINK_BYTES);
        let (own, default, multifd) = (sent(OWN)?, sent(DEFAULT)?, sent(MULTIFD)?);
        let of = |other| format!("{:.2} of {}", own / other, bytes(other));
        let measured = format!("{}; {}, {}", bytes(own), of(default), of(multifd));
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
    let goal = format!("≥ {:.0} % of iperf3 over the same veth pair, one stream", PART * 100.0);
    Goal::new("throughput, incompressible, unshaped, TLS off", goal, found)
}

/// When the engine was measured.
fn date(engine: &Engine) -> String {
    let time = jiff::Timestamp::from_second(engine.measured_unix_s).unwrap_or_default();
    time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M %Z").to_string()
}

/// What a mirrored guest loses of its speed.
fn slowdown(case: Case<'_>) -> Goal {
    const LIMIT: f64 = 0.05;
    case.goal(format!("≤ {:.0} %", LIMIT * 100.0), |cell| {
        let lost = 1.0 - cell.speed(OWN, |speed| speed.kept())?;
        let dirtied = bytes(cell.dirtied.unwrap_or_default());
        Some((format!("{:.1} % at {dirtied}/s", lost * 100.0), lost <= LIMIT))
    })
}

/// What vmirror takes of a host's memory, in the cell where it is most beyond what is allowed.
fn overhead(cells: &[CellRecord]) -> Goal {
    let allowed = |cell: &CellRecord| (cell.cell.memory_mib << 20) as f64 / 100.0 + f64::from(128 << 20);
    let taken = |cell: &CellRecord| cell.most_overhead(OWN).map(|most| most as f64);
    let worst = cells
        .iter()
        .filter_map(|cell| Some((taken(cell)? / allowed(cell), cell)))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, cell)| cell);
    let case = Case { name: "ledger and caches", cells, cell: worst };
    case.goal("≤ 1 % of guest RAM plus 128 MiB", |cell| {
        let (most, allowed) = (taken(cell)?, allowed(cell));
        let measured = format!("at most {} of {} in {}", bytes(most), bytes(allowed), cell.cell.name);
        Some((measured, most <= allowed))
    })
}
