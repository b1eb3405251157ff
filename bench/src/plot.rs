//! Dots on a logarithmic scale: a row for each cell, in it a dot for each contender, the spread as a line.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::cell::Cell;
use crate::contender::Contender;
use crate::error::BenchError;
use crate::outcome::{self, CellRecord};
use crate::record::{Measure, Method, Sample};

/// A figure that is plotted: its file's name without the ending, what it is with its unit, what is measured, and how much of that
/// is one of the unit.
pub type Plotted = (&'static str, &'static str, Measure, fn(&Cell) -> f64);

/// All that are plotted.
pub const ALL: [Plotted; 5] = [
    ("downtime", "downtime, ms", Sample::DOWNTIME, |_| 1.0),
    ("gap", "longest heartbeat gap, ms", Sample::GAP, |_| 1.0),
    ("total", "total time, s", Sample::TOTAL, |_| 1e3),
    ("bytes", "bytes on the link, MiB", Sample::LINK_BYTES, |_| f64::from(1 << 20)),
    ("cpu", "CPU time of both sides, s per GiB of RAM", Sample::CPU, |cell| 1e3 * cell.gib()),
];

/// A page's width, so that a document shows it as large as it is, in pixels.
const WIDTH: i32 = 920;
/// What is left of the scale, names of cells, and the scale.
const NAMES: i32 = 160;
const PLOT: i32 = 720;
/// Height of a contender's place in a row, and what is free between rows.
const PLACE: i32 = 7;
const BETWEEN: i32 = 12;
/// Height of the title, of a line of the legend, and of the scale.
const TITLE: i32 = 36;
const LINE: i32 = 20;
const SCALE: i32 = 26;
/// Contenders in a line of the legend.
const IN_LINE: usize = 4;
const FONT: &str = "sans-serif";
const GREY: RGBColor = RGBColor(110, 110, 110);
const LIGHT: RGBColor = RGBColor(215, 215, 215);
const SHADE: RGBColor = RGBColor(245, 245, 243);

/// Colours that are told apart by those who see few, too (Okabe and Ito); the darkest is vmirror's.
fn colour(method: Method) -> RGBColor {
    match method {
        Method::Vmirror => RGBColor(0, 0, 0),
        Method::QemuDefault => RGBColor(230, 159, 0),
        Method::QemuTuned => RGBColor(86, 180, 233),
        Method::QemuMultifdPlain => RGBColor(0, 158, 115),
        Method::QemuMultifd => RGBColor(213, 94, 0),
        Method::QemuPostCopy => RGBColor(204, 121, 167),
        Method::QemuNbd => RGBColor(0, 114, 178),
    }
}

/// A full dot; a ring where QEMU encrypts.
fn is_ring(contender: Contender) -> bool {
    contender.tls && contender != Contender::VMIRROR
}

/// Draws a figure of all cells as SVG.
pub fn dots(figure: Plotted, cells: &[CellRecord]) -> Result<String, BenchError> {
    let mut svg = String::new();
    draw(figure, cells, &mut svg).map_err(|error| {
        BenchError::file(format!("{}.svg", figure.0))(std::io::Error::other(error.to_string()))
    })?;
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(figure: Plotted, cells: &[CellRecord], svg: &mut String) -> Drawn {
    let shown: Vec<Contender> = outcome::tried(cells).collect();
    let row = shown.len().max(2) as i32 * PLACE + BETWEEN;
    let above = TITLE + shown.len().div_ceil(IN_LINE) as i32 * LINE;
    // The scale stands above the rows and below them: with many cells one of both is far away.
    let height = above + cells.len().max(1) as i32 * row + 2 * SCALE + 8;

    let area = SVGBackend::with_string(svg, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(figure.1, (8, 8), (FONT, 18)))?;
    let how = "median, smallest to largest; x: none came to its end";
    area.draw(&Text::new(how, (WIDTH - 330, 12), (FONT, 12).into_font().color(&GREY)))?;
    for (number, contender) in shown.iter().enumerate() {
        let x = 14 + (number % IN_LINE) as i32 * (WIDTH / IN_LINE as i32);
        let y = TITLE + (number / IN_LINE) as i32 * LINE + 8;
        mark(&area, *contender, (x, y))?;
        area.draw(&Text::new(contender.name(), (x + 10, y - 5), (FONT, 13)))?;
    }
    let (_, below) = area.split_vertically(above);
    rows(&below, figure, cells, &shown, row)?;
    area.present()?;
    Ok(())
}

fn mark(area: &Area<'_>, contender: Contender, at: (i32, i32)) -> Drawn {
    let colour = colour(contender.method);
    if is_ring(contender) {
        area.draw(&Circle::new(at, 4, WHITE.filled()))?;
        area.draw(&Circle::new(at, 4, colour.stroke_width(2)))?;
    } else {
        area.draw(&Circle::new(at, 4, colour.filled()))?;
    }
    Ok(())
}

fn rows(area: &Area<'_>, figure: Plotted, cells: &[CellRecord], shown: &[Contender], row: i32) -> Drawn {
    let top = |cell: usize| SCALE + cell as i32 * row;
    let (_, name, measure, unit) = figure;
    let (mut dots, mut crosses) = (Vec::new(), Vec::new());
    for (cell, record) in cells.iter().enumerate() {
        for (place, contender) in shown.iter().copied().enumerate() {
            let y = top(cell) + BETWEEN / 2 + place as i32 * PLACE + PLACE / 2;
            let value = |sample: &Sample| Some(measure(sample)? / unit(&record.cell));
            let spread = record.spread(contender, |sample| value(sample).filter(|value| *value > 0.0));
            dots.extend(spread.map(|spread| (y, contender, spread)));
            if record.by(contender).next().is_some() && record.samples(contender).next().is_none() {
                crosses.push((y, contender));
            }
        }
    }
    let least = dots.iter().map(|(.., spread)| spread.least).fold(f64::INFINITY, f64::min);
    let most = dots.iter().map(|(.., spread)| spread.most).fold(0.0, f64::max);
    // Something to draw where there is nothing.
    let ticks = if dots.is_empty() { ticks(1.0, 10.0) } else { ticks(least, most) };
    let (Some(&left), Some(&right)) = (ticks.first(), ticks.last()) else { return Ok(()) };
    let place = PLOT as f64 / (right / left).log10();
    let x = |value: f64| NAMES + ((value / left).log10() * place).round() as i32;
    let bottom = top(cells.len().max(1));

    for (number, record) in cells.iter().enumerate() {
        let y = top(number);
        if number.is_multiple_of(2) {
            area.draw(&Rectangle::new([(0, y), (NAMES + PLOT, y + row)], SHADE.filled()))?;
        }
        area.draw(&Text::new(record.cell.name.clone(), (8, y + row / 2 - 7), (FONT, 13)))?;
    }
    let unit = name.rsplit_once(", ").map_or("", |(_, unit)| unit);
    let unit = unit.split(' ').next().unwrap_or_default();
    for tick in &ticks {
        let x = x(*tick);
        area.draw(&PathElement::new(vec![(x, SCALE), (x, bottom)], LIGHT.stroke_width(1)))?;
        let label = format!("{tick} {unit}");
        // Letters are about 6 pixels wide.
        let at = x - 3 * label.len() as i32;
        for y in [SCALE - 16, bottom + 5] {
            area.draw(&Text::new(label.clone(), (at, y), (FONT, 12)))?;
        }
    }
    for (y, contender, spread) in dots {
        let range = vec![(x(spread.least), y), (x(spread.most), y)];
        area.draw(&PathElement::new(range, GREY.stroke_width(1)))?;
        mark(area, contender, (x(spread.median), y))?;
    }
    // Who has no figure in a cell for not having come to its end, at the end of the row.
    for (y, contender) in crosses {
        let style = colour(contender.method).stroke_width(2);
        area.draw(&Cross::new((NAMES + PLOT + 14, y), 3, style))?;
    }
    Ok(())
}

/// Ones, twos and fives (only ones where there would be many) that hold a range, from below it to above it.
fn ticks(least: f64, most: f64) -> Vec<f64> {
    const MANY: f64 = 3e3;
    let steps: &[f64] = if most / least > MANY { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let first = least.log10().floor() as i32 - 1;
    let last = most.log10().ceil() as i32 + 1;
    // Divided where they are small: 0.1 is no sum of powers of two, and 1/10 is the number that is written so.
    let power = |exponent: i32| {
        move |step: &f64| {
            if exponent < 0 { step / 10f64.powi(-exponent) } else { step * 10f64.powi(exponent) }
        }
    };
    let all: Vec<f64> = (first..=last).flat_map(|exponent| steps.iter().map(power(exponent))).collect();
    let from = all.iter().rposition(|tick| *tick < least * 0.99).unwrap_or(0);
    let to = all.iter().position(|tick| *tick > most * 1.01).unwrap_or(all.len() - 1);
    all[from..=to].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::cell;
    use crate::results::tests::results;
    use std::collections::HashSet;

    #[test]
    fn a_plot_shows_every_cell_and_contender_that_has_figures() {
        let encrypted = Contender::encrypted(Method::QemuDefault);
        let both = cell("idle", &[(Contender::VMIRROR, 8.0), (encrypted, 40.0)]);
        let svg = dots(ALL[0], &[both]).unwrap();
        for part in ["<svg", "downtime, ms", "idle", "vmirror, TLS", "QEMU, defaults, TLS", "10 ms"] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
        assert!(!svg.contains("multifd"));
        assert!(dots(ALL[0], &[]).unwrap().contains("<svg"));
    }

    #[test]
    fn a_scale_holds_what_is_measured_and_is_written_in_round_numbers() {
        assert_eq!(ticks(3.0, 45.0), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(ticks(0.15, 0.9), [0.1, 0.2, 0.5, 1.0]);
        assert_eq!(ticks(10.0, 10.0), [5.0, 10.0, 20.0]);
        assert_eq!(ticks(0.5, 3e4), [0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
    }

    #[test]
    fn who_did_not_come_to_an_end_is_shown_so() {
        let missed = &results().cells[0];
        let whole = cell("idle", &[(Contender::VMIRROR, 8.0)]);
        let lines =
            |cell: &CellRecord| dots(ALL[0], std::slice::from_ref(cell)).unwrap().matches("<line").count();
        assert_eq!(lines(missed), lines(&whole) + 2);
    }

    #[test]
    fn contenders_look_different() {
        let looks: HashSet<_> = Contender::ALL
            .iter()
            .map(|one| (colour(one.method).0, colour(one.method).1, is_ring(*one)))
            .collect();
        assert_eq!(looks.len(), Contender::ALL.len());
    }
}
