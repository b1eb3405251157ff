//! The figures of a run, held against the goals.
//!
//! Everything is judged by its median. Where a goal is relative to QEMU's own migration, the better of its two settings
//! counts, unless the goal names one.

use serde::Serialize;
use session::Report;

use crate::measure::Spread;
use crate::record::{Measure, Method, Record, Sample};

/// Most downtime of an idle guest of 1 GiB, in milliseconds.
const DOWNTIME_MS: f64 = 15.0;
/// Most downtime as a part of that of QEMU's defaults.
const DOWNTIME_OF_QEMU: f64 = 0.5;
/// Longest hold of QEMU's main thread when tracking begins, in milliseconds.
const HOLD_MS: f64 = 2.0;
/// Longest scan of a GiB of clean memory, in milliseconds.
const SCAN_MS: f64 = 1.0;
/// Most CPU time as a part of that of QEMU's migration threads.
const CPU_OF_QEMU: f64 = 1.3;
/// Memory counts as clean when a scan finds at most this part of it written.
const CLEAN: f64 = 0.01;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Bytes.
    Bytes,
    /// Things.
    Count,
}

impl Unit {
    /// A number of it, for people.
    pub fn show(self, number: f64) -> String {
        match self {
            Unit::Ms => readable::measured_ms(number),
            Unit::Bytes => readable::bytes(number as u64),
            Unit::Count => readable::count(number.round() as u64),
        }
    }
}

/// What a figure is held against.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// In words.
    pub text: String,
    /// The most that vmirror's median may be; none where what it is relative to was not measured.
    pub limit: Option<f64>,
    /// Whether it is; none where one of both was not measured.
    pub reached: Option<bool>,
}

/// One figure, by method.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// What it counts.
    pub unit: Unit,
    /// By method, in the order of [`Method::DEMO`]; none where the method has no such figure.
    pub by: [Option<Spread>; 3],
    /// The same without any migration.
    pub unmigrated: Option<f64>,
    /// What it is held against.
    pub goals: Vec<Goal>,
}

impl Figure {
    fn new(name: &str, unit: Unit, by: [Option<Spread>; 3]) -> Self {
        Self { name: name.to_owned(), unit, by, unmigrated: None, goals: Vec::new() }
    }

    /// A figure that only vmirror has.
    fn own(name: &str, unit: Unit, values: impl IntoIterator<Item = f64>) -> Self {
        Self::new(name, unit, [Spread::of(values), None, None])
    }

    fn goal(mut self, text: String, limit: Option<f64>) -> Self {
        let reached = self.median(Method::Vmirror).zip(limit).map(|(median, limit)| median <= limit);
        self.goals.push(Goal { text, limit, reached });
        self
    }

    fn at_most(self, limit: f64) -> Self {
        let text = format!("≤ {}", short(self.unit, limit));
        self.goal(text, Some(limit))
    }

    fn at_most_of(self, part: f64, words: &str, limit: Option<f64>) -> Self {
        let limit = limit.map(|limit| limit * part);
        let shown = limit.map_or_else(|| "not measured".to_owned(), |limit| self.unit.show(limit));
        self.goal(format!("≤ {words} ({shown})"), limit)
    }

    /// The median by one method.
    pub fn median(&self, method: Method) -> Option<f64> {
        self.by[method as usize].map(|spread| spread.median)
    }

    fn better_qemu(&self) -> Option<f64> {
        let medians = [self.median(Method::QemuDefault), self.median(Method::QemuTuned)];
        medians.into_iter().flatten().min_by(f64::total_cmp)
    }
}

/// A limit without digits that say nothing: `15 ms`.
fn short(unit: Unit, limit: f64) -> String {
    match unit {
        Unit::Ms => format!("{limit} ms"),
        Unit::Bytes | Unit::Count => unit.show(limit),
    }
}

/// Every figure of a run, in the order to show them.
pub fn of(record: &Record) -> Vec<Figure> {
    let by = |name, unit, measure: Measure| {
        let of = |method| Spread::of(record.by(method).filter_map(measure));
        Figure::new(name, unit, Method::DEMO.map(of))
    };
    let downtime = by("downtime", Unit::Ms, Sample::DOWNTIME);
    let of_default = downtime.median(Method::QemuDefault);
    let hold = Figure::own("tracking hold", Unit::Ms, record.reports().map(|report| report.tracking_hold_ms));
    let scans = |paused| record.reports().flat_map(move |report| clean_scans(report, paused));
    let total = by("total time", Unit::Ms, Sample::TOTAL);
    let qemu_total = total.better_qemu();
    let cpu = by("CPU time of both sides", Unit::Ms, Sample::CPU);
    let qemu_cpu = cpu.better_qemu();
    let mut figures = vec![
        downtime.at_most(DOWNTIME_MS).at_most_of(DOWNTIME_OF_QEMU, "half of QEMU's default", of_default),
        hold.at_most(HOLD_MS),
        Figure::own("scan of a clean GiB, guest running", Unit::Ms, scans(false)).at_most(SCAN_MS),
        Figure::own("scan of a clean GiB, guest paused", Unit::Ms, scans(true)).at_most(SCAN_MS),
        total.at_most_of(1.0, "QEMU's own", qemu_total),
        cpu.at_most_of(CPU_OF_QEMU, "QEMU's + 30 %", qemu_cpu),
    ];
    if record.network {
        let mut gap = by("longest heartbeat gap", Unit::Ms, Sample::GAP);
        gap.unmigrated = record.unmigrated.and_then(|beats| beats.gap_ms());
        let mut lost = by("heartbeats lost", Unit::Count, Sample::HEARTBEATS_LOST);
        lost.unmigrated = record.unmigrated.map(|beats| beats.lost as f64);
        figures.extend([gap, lost]);
    }
    figures.extend([
        by("until it runs there", Unit::Ms, Sample::UNTIL_RUNNING),
        by("CPU time at the source", Unit::Ms, Sample::CPU_SOURCE),
        by("CPU time at the destination", Unit::Ms, Sample::CPU_DESTINATION),
        by("bytes on the link", Unit::Bytes, Sample::LINK_BYTES),
        by("memory sent, own count", Unit::Bytes, Sample::SENT_BYTES),
        by("downtime as QEMU counts it", Unit::Ms, Sample::DOWNTIME_OF_QEMU),
    ]);
    figures
}

/// Times of the scans that found memory clean, for each GiB of it, in milliseconds. The first scan is of everything and
/// finds everything.
fn clean_scans(report: &Report, paused: bool) -> impl Iterator<Item = f64> {
    let pages = report.memory.pages as f64;
    let gib = pages * report.memory.page_size as f64 / f64::from(1 << 30);
    report
        .rounds
        .iter()
        .filter(move |round| {
            round.n > 0 && round.paused == paused && gib > 0.0 && round.dirty_pages as f64 <= pages * CLEAN
        })
        .map(move |round| round.scan_ms / gib)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::run as record;

    fn goals<'a>(figures: &'a [Figure], name: &str) -> &'a [Goal] {
        &figures.iter().find(|figure| figure.name == name).unwrap().goals
    }

    #[test]
    fn goals_are_judged_by_medians_and_by_the_better_of_qemus_settings() {
        let figures = of(&record());
        let downtime = goals(&figures, "downtime");
        assert_eq!(downtime.iter().map(|goal| goal.reached).collect::<Vec<_>>(), [Some(true), Some(true)]);
        assert_eq!(downtime[1].limit, Some(17.5));
        assert_eq!(goals(&figures, "total time")[0].limit, Some(1050.0));
        assert_eq!(goals(&figures, "total time")[0].reached, Some(true));
        // 1500 against 1000 + 30 %.
        assert_eq!(goals(&figures, "CPU time of both sides")[0].reached, Some(false));
        assert_eq!(goals(&figures, "tracking hold")[0].reached, Some(true));
    }

    #[test]
    fn only_scans_of_clean_memory_count_and_paused_ones_apart() {
        let figures = of(&record());
        assert_eq!(goals(&figures, "scan of a clean GiB, guest running")[0].reached, Some(true));
        assert_eq!(goals(&figures, "scan of a clean GiB, guest paused")[0].reached, Some(false));
        let report = record().samples[0].report.clone().unwrap();
        assert_eq!(clean_scans(&report, false).collect::<Vec<_>>(), [0.5]);
    }

    #[test]
    fn nothing_is_claimed_that_was_not_measured() {
        let mut record = record();
        record.samples.retain(|sample| sample.method == Method::Vmirror);
        let figures = of(&record);
        assert_eq!(goals(&figures, "total time")[0].reached, None);
        assert_eq!(goals(&figures, "total time")[0].text, "≤ QEMU's own (not measured)");
        assert_eq!(goals(&figures, "downtime")[0].reached, Some(true));
        assert!(
            of(&Record::default()).iter().flat_map(|figure| &figure.goals).all(|goal| goal.reached.is_none())
        );
    }
}
