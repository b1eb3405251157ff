//! Bars on a logarithmic scale: a group for each cell, a bar for each contender, the spread as a line.

use plotters::prelude::*;

use crate::BenchError;
use crate::cell::Contender;
use crate::measure::Spread;
use crate::results::PlottedFigure;
use crate::trial::CellRecord;

/// Colours that are told apart by those who see few, too (Okabe and Ito); the darkest is vmirror's.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(240, 228, 66),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(204, 121, 167),
];
/// Width of a group, height of the picture, and what is left and right of the groups, in pixels.
const GROUP: u32 = 110;
const HEIGHT: u32 = 420;
const MARGIN: u32 = 250;

struct Bar {
    cell: usize,
    contender: usize,
    spread: Spread,
}

/// Draws a figure of all cells as SVG.
///
/// # Errors
/// Where it cannot be drawn.
pub fn bars(figure: PlottedFigure, cells: &[CellRecord]) -> Result<String, BenchError> {
    let mut svg = String::new();
    draw(figure, cells, &mut svg).map_err(|error| {
        BenchError::file(format!("{}.svg", figure.file))(std::io::Error::other(error.to_string()))
    })?;
    Ok(svg)
}

fn draw(
    figure: PlottedFigure,
    cells: &[CellRecord],
    svg: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut found = Vec::new();
    for (cell, record) in cells.iter().enumerate() {
        for (contender, who) in Contender::ALL.into_iter().enumerate() {
            let values = record.samples(who).filter_map(figure.value).filter(|value| *value > 0.0);
            if let Some(spread) = Spread::of(values) {
                found.push(Bar { cell, contender, spread });
            }
        }
    }
    let least = found.iter().map(|bar| bar.spread.least).fold(f64::INFINITY, f64::min);
    let most = found.iter().map(|bar| bar.spread.most).fold(0.0, f64::max);
    // A whole power of ten below and above, and something to draw where there is nothing.
    let (bottom, top) = if found.is_empty() {
        (1.0, 10.0)
    } else {
        (10f64.powf(least.log10().floor()), 10f64.powf((most * 1.01).log10().ceil()))
    };
    let groups = cells.len().max(1);
    let width = MARGIN + GROUP * u32::try_from(groups)?;
    let area = SVGBackend::with_string(svg, (width, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(figure.name, ("sans-serif", 18))
        .margin(8)
        .margin_right(MARGIN - 70)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0f64..groups as f64, (bottom..top).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_label_formatter(&|value: &f64| format!("{value}"))
        .draw()?;
    let bar_width = 0.86 / COLOURS.len() as f64;
    for bar in &found {
        let left = bar.cell as f64 + 0.07 + bar.contender as f64 * bar_width;
        let middle = left + bar_width / 2.0;
        let corners = [(left, bottom), (left + bar_width * 0.9, bar.spread.median)];
        chart.draw_series([Rectangle::new(corners, COLOURS[bar.contender].filled())])?;
        let range = vec![(middle, bar.spread.least), (middle, bar.spread.most)];
        chart.draw_series([PathElement::new(range, RGBColor(110, 110, 110).stroke_width(2))])?;
    }
    for (cell, record) in cells.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(cell as f64 + 0.1, bottom));
        area.draw(&Text::new(record.cell.name, (x, y + 10), ("sans-serif", 12)))?;
    }
    let mut y = 40;
    for (contender, who) in Contender::ALL.into_iter().enumerate() {
        if !found.iter().any(|bar| bar.contender == contender) {
            continue;
        }
        let x = i32::try_from(width - MARGIN + 85)?;
        area.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], COLOURS[contender].filled()))?;
        area.draw(&Text::new(who.name(), (x + 18, y), ("sans-serif", 13)))?;
        y += 20;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_shows_every_cell_and_contender_that_has_figures() {
        let figure = PlottedFigure {
            file: "downtime",
            name: "downtime, ms",
            value: |sample| Some(sample.downtime_ms),
        };
        let cell =
            crate::goals::tests::record("idle", &[(Contender::VMIRROR, 8.0), (Contender::ALL[1], 40.0)]);
        let svg = bars(figure, &[cell]).unwrap();
        for part in ["<svg", "downtime, ms", "idle", "vmirror, TLS", "QEMU, defaults"] {
            assert!(svg.contains(part), "{part}");
        }
        assert!(!svg.contains("multifd"));
        assert!(bars(figure, &[]).unwrap().contains("<svg"));
    }
}
