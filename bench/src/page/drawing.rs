//! Measurements as drawings (SVG).

use readable::html::{drawing, escape};
use readable::measured_ms as ms;

use crate::measure::Spread;

/// Width of a drawing, in its own units; the page scales it.
const WIDTH: f64 = 1000.0;
/// Where the scale begins: names stand before that.
const LEFT: f64 = 150.0;
/// Room for a number behind the last dot.
const RIGHT: f64 = 120.0;
/// Height of a row.
const ROW: f64 = 34.0;

/// One row per method, one dot per migration, a line at each median, and a dashed one at the goal.
pub(super) fn dots(title: &str, rows: &[(&str, Vec<f64>)], limit: Option<f64>) -> String {
    let most = rows.iter().flat_map(|(_, values)| values).copied().chain(limit).fold(0.0, f64::max);
    let x = |value: f64| LEFT + value / most.max(1e-6) * (WIDTH - LEFT - RIGHT);
    let height = ROW * rows.len() as f64;
    let mut svg = format!("<line class=\"grid\" x1=\"{LEFT}\" y1=\"0\" x2=\"{LEFT}\" y2=\"{height}\"/>\n");
    if let Some(limit) = limit {
        let at = x(limit);
        svg += &format!("<line class=\"goal\" x1=\"{at:.1}\" y1=\"0\" x2=\"{at:.1}\" y2=\"{height}\"/>\n");
    }
    for (row, (name, values)) in rows.iter().enumerate() {
        let middle = (row as f64 + 0.5) * ROW;
        let class = if row == 0 { "hot" } else { "cool" };
        svg += &format!(
            "<text class=\"name\" x=\"{}\" y=\"{:.1}\">{}</text>\n",
            LEFT - 14.0,
            middle + 4.5,
            escape(name)
        );
        let Some(spread) = Spread::of(values.iter().copied()) else { continue };
        let (from, to) = (x(spread.least), x(spread.most));
        svg += &format!(
            "<line class=\"range {class}\" x1=\"{from:.1}\" y1=\"{middle}\" x2=\"{to:.1}\" y2=\"{middle}\"/>\n"
        );
        for value in values {
            svg += &format!("<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{middle}\" r=\"5\"/>\n", x(*value));
        }
        let at = x(spread.median);
        svg += &format!(
            "<line class=\"median {class}\" x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\"/>\n\
             <text class=\"length\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            middle - 12.0,
            middle + 12.0,
            to + 14.0,
            middle + 4.5,
            ms(spread.median)
        );
    }
    format!("<h3>{}</h3>\n{}", escape(title), drawing(WIDTH, height, &svg))
}

/// The parts of a whole, one after the other, each with its length in milliseconds.
pub(super) fn stack(parts: &[(&str, f64)]) -> String {
    const BAR: f64 = 38.0;
    let whole: f64 = parts.iter().map(|(_, length)| length.max(0.0)).sum::<f64>().max(1e-6);
    let (mut svg, mut legend) = (String::new(), String::new());
    let mut at = 0.0;
    for (number, (name, length)) in parts.iter().enumerate() {
        let width = length.max(0.0) / whole * WIDTH;
        svg += &format!(
            "<rect class=\"part{number}\" x=\"{at:.1}\" y=\"0\" width=\"{width:.1}\" height=\"{BAR}\"/>\n"
        );
        legend +=
            &format!("<li><i class=\"part{number}\"></i>{} <b>{}</b></li>\n", escape(name), ms(*length));
        at += width;
    }
    format!("{}<ul class=\"legend\">\n{legend}</ul>\n", drawing(WIDTH, BAR, &svg))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_is_a_dot_and_nothing_is_drawn_outside() {
        let svg = dots("downtime", &[("a", vec![1.0, 2.0]), ("b", vec![])], Some(4.0));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("class=\"goal\" x1=\"880.0\""), "{svg}");
        for svg in [dots("none", &[], None), stack(&[]), dots("zero", &[("a", vec![0.0])], Some(0.0))] {
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn parts_fill_the_whole() {
        let svg = stack(&[("a", 1.0), ("b", 3.0)]);
        assert!(svg.contains("x=\"250.0\" y=\"0\" width=\"750.0\""), "{svg}");
    }
}
