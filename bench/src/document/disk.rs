//! The table of a cell whose guests have a disk that moves with them.

use super::{row_of, spread, tried};
use crate::contender::Contender;
use crate::measure::Spread;
use crate::number::{bytes, count, ms};
use crate::record::Sample;
use crate::throughput::Throughput;
use crate::trial::{CellRecord, Trial};

/// All of it.
pub(super) fn table(cell: &CellRecord) -> String {
    let mut text = "| | copying | running there | total | on the link | CPU source, s | CPU destination, s | downtime | disk, of it | gap | \
                    blocks written per second: before / copying / copied / after |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for contender in tried(cell) {
        text += &row(cell, contender);
    }
    text
}

fn row(cell: &CellRecord, contender: Contender) -> String {
    let samples: Vec<&Sample> = cell.samples(contender).collect();
    let trials: Vec<&Trial> = cell.by(contender).collect();
    let name = match row_of(&trials, &samples, contender) {
        Ok(name) => name,
        Err(missed) => return format!("| {} | {missed} | | | | | | | | | |\n", contender.name()),
    };
    let show = |value: &dyn Fn(&Sample) -> Option<f64>, unit: fn(f64) -> String| {
        spread(Spread::of(samples.iter().filter_map(|sample| value(sample))), unit)
    };
    let speed = |value: fn(&Throughput) -> Option<f64>| {
        let speeds = Spread::of(trials.iter().filter_map(|trial| value(&trial.throughput)));
        speeds.map_or_else(|| "-".to_owned(), |speeds| count(speeds.median.round() as u64))
    };
    let seconds = |seconds: f64| format!("{seconds:.2}");
    format!(
        "| {name} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} / {} / {} / {} |\n",
        show(&|sample| Some(sample.disk?.took_ms()), ms),
        show(&|sample| Some(sample.until_running_ms), ms),
        show(&|sample| Some(sample.total_ms), ms),
        show(&|sample| Some(sample.link_bytes? as f64), bytes),
        show(&|sample| Some(sample.cpu_source_ms / 1e3), seconds),
        show(&|sample| Some(sample.cpu_destination_ms / 1e3), seconds),
        show(&|sample| Some(sample.downtime_ms), ms),
        show(&crate::goals::pause_of_disks, ms),
        show(&|sample| sample.heartbeats.and_then(|beats| beats.gap_ms()), ms),
        speed(|speed| speed.before),
        speed(|speed| speed.during),
        speed(|speed| speed.copied),
        speed(|speed| speed.after),
    )
}
