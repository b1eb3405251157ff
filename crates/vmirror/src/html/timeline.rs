//! Phases and the parts of the pause as drawings of time (SVG).

use readable::html::{drawing, escape};
use readable::ms;
use session::{Phase, Report};

use super::put;
use crate::summary;

/// Width of a drawing, in its own units; the page scales it.
const WIDTH: f64 = 1000.0;
/// Where bars begin: names stand before that.
const LEFT: f64 = 150.0;
/// Room for a length of time behind a bar.
const RIGHT: f64 = 110.0;
/// Height of a row and of the bar in it.
const ROW: f64 = 30.0;
const BAR: f64 = 16.0;
/// Height of the scale.
const SCALE: f64 = 26.0;
/// Least width of a bar, for one of no width is not seen.
const LEAST: f64 = 2.0;

/// One bar.
struct Bar<'a> {
    name: &'a str,
    class: &'a str,
    start: f64,
    length: f64,
}

/// All phases on one scale.
pub(super) fn phases(report: &Report) -> String {
    let bars = report.phases.iter().map(|phase| Bar {
        name: phase.name.name(),
        class: match phase.name {
            Phase::Synchronize => "live",
            Phase::SwitchOver => "hot",
            _ => "cool",
        },
        start: phase.start_ms,
        length: phase.duration_ms,
    });
    draw(&bars.collect::<Vec<_>>(), report.total_ms)
}

/// What the downtime was spent on, each part from the end of the one before.
pub(super) fn pause(report: &Report) -> String {
    let mut before = 0.0_f64;
    let bars = summary::pause(report).map(|(name, at)| {
        // Devices are saved while the last pages travel.
        let beside = at == report.pause.device_state_ms && at <= report.pause.last_round_ms;
        let start = if beside { report.pause.stopped_ms.min(at) } else { before.min(at) };
        before = at.max(before);
        Bar { name, class: "hot", start, length: at - start }
    });
    draw(&bars, report.downtime_ms)
}

fn draw(bars: &[Bar<'_>], total: f64) -> String {
    let sane = |time: f64| if time.is_finite() && time > 0.0 { time } else { 0.0 };
    let last = bars.iter().map(|bar| sane(bar.start) + sane(bar.length)).fold(sane(total), f64::max);
    // A nanosecond is less than anything that is drawn, and more than nothing to divide by.
    let scale = (WIDTH - LEFT - RIGHT) / last.max(1e-6);
    let height = ROW.mul_add(bars.len() as f64, SCALE);
    let mut svg = String::new();
    for tick in ticks(last) {
        let x = tick.mul_add(scale, LEFT);
        put(
            &mut svg,
            format_args!(
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{SCALE}\" x2=\"{x:.1}\" y2=\"{height}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"14\">{}</text>\n",
                if tick == 0.0 { "0".to_owned() } else { short(tick) }
            ),
        );
    }
    for (row, bar) in bars.iter().enumerate() {
        let middle = ROW.mul_add(row as f64 + 0.5, SCALE);
        let (start, width) = (sane(bar.start).mul_add(scale, LEFT), (sane(bar.length) * scale).max(LEAST));
        put(
            &mut svg,
            format_args!(
                "<text class=\"name\" x=\"{}\" y=\"{:.1}\">{}</text>\
             <rect class=\"{}\" x=\"{start:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"3\"/>\
             <text class=\"length\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
                LEFT - 12.0,
                middle + 4.5,
                escape(bar.name),
                bar.class,
                middle - BAR / 2.0,
                start + width + 8.0,
                middle + 4.5,
                ms(bar.length),
            ),
        );
    }
    drawing(WIDTH, height, &svg)
}

/// A round number without digits that say nothing: `200 ms`, `1.5 s`.
fn short(tick: f64) -> String {
    if tick >= 1000.0 { format!("{} s", round(tick / 1e3)) } else { format!("{} ms", round(tick)) }
}

/// To a thousandth: sums of tenths are not quite tenths.
fn round(number: f64) -> f64 {
    (number * 1e3).round() / 1e3
}

/// Four to nine round numbers from 0 up to `last`.
fn ticks(last: f64) -> Vec<f64> {
    if last <= 0.0 {
        return vec![0.0];
    }
    let power = 10_f64.powf((last / 4.0).log10().floor());
    let steps = [5.0, 2.0, 1.0].map(|step| step * power);
    let step = steps.into_iter().find(|step| last / step >= 4.0).unwrap_or(power);
    (0..).map(|n| f64::from(n) * step).take_while(|tick| *tick <= last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_has_a_few_round_numbers() {
        assert_eq!(ticks(1790.0), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0, 1200.0, 1400.0, 1600.0]);
        assert_eq!(ticks(8.0), [0.0, 2.0, 4.0, 6.0, 8.0]);
        for last in [0.001, 0.7, 3.0, 42.0, 999.0, 1e4, 3.6e6] {
            assert!((4..=11).contains(&ticks(last).len()), "{last}: {:?}", ticks(last));
        }
        assert_eq!(ticks(0.0), [0.0]);
        assert_eq!((short(0.1 + 0.2), short(1500.0)), ("0.3 ms".to_owned(), "1.5 s".to_owned()));
    }

    #[test]
    fn times_that_make_no_sense_draw_nothing_wild() {
        let bars = [Bar { name: "a", class: "cool", start: f64::NAN, length: f64::INFINITY }];
        let svg = draw(&bars, -1.0);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
