//! Dots on a logarithmic scale: a row for each cell, in it a dot for each contender, the spread as a line.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::BenchError;
use crate::contender::Contender;
use crate::document::PlottedFigure;
use crate::measure::Spread;
use crate::record::Method;
use crate::trial::CellRecord;

/// A page's width, so that a document shows it as large as it is, in pixels.
const WIDTH: u32 = 920;
/// What is left of the scale, names of cells, and the scale.
const NAMES: i32 = 160;
const PLOT: i32 = 720;
/// Height of a contender's place in a row, and what is free between rows.
const PLACE: i32 = 7;
const BETWEEN: i32 = 12;
/// Height of the title, of a line of the legend, and of the scale.
const TITLE: u32 = 36;
const LINE: u32 = 20;
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

struct Dot {
    cell: usize,
    /// Where in its row, by the contenders that have a place.
    place: usize,
    contender: Contender,
    spread: Spread,
}

/// Draws a figure of all cells as SVG.
///
/// # Errors
/// Where it cannot be drawn.
pub fn dots(figure: PlottedFigure, cells: &[CellRecord]) -> Result<String, BenchError> {
    let mut svg = String::new();
    draw(figure, cells, &mut svg).map_err(|error| {
        BenchError::file(format!("{}.svg", figure.file))(std::io::Error::other(error.to_string()))
    })?;
    Ok(svg)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(figure: PlottedFigure, cells: &[CellRecord], svg: &mut String) -> Drawn {
    let spread = |record: &CellRecord, contender| {
        let values = record.samples(contender).filter_map(|sample| (figure.value)(&record.cell, sample));
        Spread::of(values.filter(|value| *value > 0.0))
    };
    let shown: Vec<Contender> = Contender::ALL
        .into_iter()
        .filter(|contender| cells.iter().any(|record| record.by(*contender).next().is_some()))
        .collect();
    let mut found = Vec::new();
    for (cell, record) in cells.iter().enumerate() {
        for (place, contender) in shown.iter().copied().enumerate() {
            found.extend(spread(record, contender).map(|spread| Dot { cell, place, contender, spread }));
        }
    }
    let rows = u32::try_from(cells.len().max(1))?;
    let places = i32::try_from(shown.len().max(2))?;
    let lines = u32::try_from(shown.len().div_ceil(IN_LINE))?;
    let row = u32::try_from(places * PLACE + BETWEEN)?;
    let above = TITLE + lines * LINE;
    // The scale stands above the rows and below them: with many cells one of both is far away.
    let scales = u32::try_from(2 * SCALE)?;
    let height = above + rows * row + scales + 8;

    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(figure.name, (8, 8), (FONT, 18)))?;
    let how = "median, smallest to largest; x: none came to its end";
    area.draw(&Text::new(how, (i32::try_from(WIDTH)? - 330, 12), (FONT, 12).into_font().color(&GREY)))?;
    legend(&area, &shown)?;
    let (_, below) = area.split_vertically(above);
    rows_of(&below, figure, cells, &found, row)?;
    crosses(&below, cells, &shown, row)?;
    area.present()?;
    Ok(())
}

fn legend(area: &DrawingArea<SVGBackend<'_>, Shift>, shown: &[Contender]) -> Drawn {
    let width = i32::try_from(WIDTH / u32::try_from(IN_LINE)?)?;
    for (number, contender) in shown.iter().enumerate() {
        let x = 14 + i32::try_from(number % IN_LINE)? * width;
        let y = i32::try_from(TITLE + u32::try_from(number / IN_LINE)? * LINE)? + 8;
        mark(area, *contender, (x, y))?;
        area.draw(&Text::new(contender.name(), (x + 10, y - 5), (FONT, 13)))?;
    }
    Ok(())
}

/// Who has no figure in a cell for not having come to its end, at the end of the row.
fn crosses(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    cells: &[CellRecord],
    shown: &[Contender],
    row: u32,
) -> Drawn {
    for (number, record) in cells.iter().enumerate() {
        for (place, contender) in shown.iter().copied().enumerate() {
            if record.by(contender).next().is_some() && record.samples(contender).next().is_none() {
                let y = SCALE + i32::try_from(number)? * i32::try_from(row)? + middle_of(place)?;
                let style = colour(contender.method).stroke_width(2);
                area.draw(&Cross::new((NAMES + PLOT + 14, y), 3, style))?;
            }
        }
    }
    Ok(())
}

fn mark(area: &DrawingArea<SVGBackend<'_>, Shift>, contender: Contender, at: (i32, i32)) -> Drawn {
    let colour = colour(contender.method);
    if is_ring(contender) {
        area.draw(&Circle::new(at, 4, WHITE.filled()))?;
        area.draw(&Circle::new(at, 4, colour.stroke_width(2)))?;
    } else {
        area.draw(&Circle::new(at, 4, colour.filled()))?;
    }
    Ok(())
}

fn rows_of(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    figure: PlottedFigure,
    cells: &[CellRecord],
    found: &[Dot],
    row: u32,
) -> Drawn {
    let least = found.iter().map(|dot| dot.spread.least).fold(f64::INFINITY, f64::min);
    let most = found.iter().map(|dot| dot.spread.most).fold(0.0, f64::max);
    // Something to draw where there is nothing.
    let ticks = if found.is_empty() { ticks(1.0, 10.0) } else { ticks(least, most) };
    let (Some(&left), Some(&right)) = (ticks.first(), ticks.last()) else { return Ok(()) };
    let place = PLOT as f64 / (right / left).log10();
    let x = |value: f64| NAMES + ((value / left).log10() * place).round() as i32;
    let top = |cell: usize| {
        Ok::<i32, std::num::TryFromIntError>(SCALE + i32::try_from(cell)? * i32::try_from(row)?)
    };
    let bottom = top(cells.len().max(1))?;

    for (number, record) in cells.iter().enumerate() {
        let y = top(number)?;
        if number.is_multiple_of(2) {
            area.draw(&Rectangle::new([(0, y), (NAMES + PLOT, y + i32::try_from(row)?)], SHADE.filled()))?;
        }
        let middle = y + i32::try_from(row)? / 2;
        area.draw(&Text::new(record.cell.name, (8, middle - 7), (FONT, 13)))?;
    }
    let unit = figure.name.rsplit_once(", ").map_or("", |(_, unit)| unit);
    let unit = unit.split(' ').next().unwrap_or_default();
    for tick in &ticks {
        let x = x(*tick);
        area.draw(&PathElement::new(vec![(x, SCALE), (x, bottom)], LIGHT.stroke_width(1)))?;
        let label = format!("{tick} {unit}");
        // Letters are about 6 pixels wide.
        let at = x - 3 * i32::try_from(label.len())?;
        for y in [SCALE - 16, bottom + 5] {
            area.draw(&Text::new(label.clone(), (at, y), (FONT, 12)))?;
        }
    }
    for dot in found {
        let y = top(dot.cell)? + middle_of(dot.place)?;
        let range = vec![(x(dot.spread.least), y), (x(dot.spread.most), y)];
        area.draw(&PathElement::new(range, GREY.stroke_width(1)))?;
        mark(area, dot.contender, (x(dot.spread.median), y))?;
    }
    Ok(())
}

/// Where in a row.
fn middle_of(place: usize) -> Result<i32, std::num::TryFromIntError> {
    Ok(BETWEEN / 2 + i32::try_from(place)? * PLACE + PLACE / 2)
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
    use std::collections::HashSet;

    const FIGURE: PlottedFigure =
        PlottedFigure { file: "downtime", name: "downtime, ms", value: |_, sample| Some(sample.downtime_ms) };

    #[test]
    fn a_plot_shows_every_cell_and_contender_that_has_figures() {
        let encrypted = Contender::encrypted(Method::QemuDefault);
        let cell = crate::goals::tests::record("idle", &[(Contender::VMIRROR, 8.0), (encrypted, 40.0)]);
        let svg = dots(FIGURE, &[cell]).unwrap();
        for part in ["<svg", "downtime, ms", "idle", "vmirror, TLS", "QEMU, defaults, TLS", "10 ms"] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
        assert!(!svg.contains("multifd"));
        assert!(dots(FIGURE, &[]).unwrap().contains("<svg"));
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
        let cell = &crate::results::tests::results().cells[0];
        let whole = crate::goals::tests::record("idle", &[(Contender::VMIRROR, 8.0)]);
        let lines =
            |cell: &CellRecord| dots(FIGURE, std::slice::from_ref(cell)).unwrap().matches("<line").count();
        assert_eq!(lines(cell), lines(&whole) + 2);
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
