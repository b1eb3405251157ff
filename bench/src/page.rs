//! A run as one page to look at: no script, and nothing from elsewhere.

mod drawing;

use readable::html::{self, escape, figure, section};
use readable::{count, measured_ms as ms};

use crate::course::Course;
use crate::figures::{Figure, Unit};
use crate::present::{cells, pause_parts, verdict};
use crate::record::{Check, Measure, Method, Record, Sample, Step};

/// The page.
pub fn page(course: &Course, figures: &[Figure]) -> String {
    let record = &course.record;
    let typical = record.typical();
    let parts = [
        header(record),
        tiles(record, figures),
        section("The goals", &goals(figures)),
        section("Every migration", &drawings(record, figures)),
        typical.map_or_else(String::new, |report| {
            let title = format!("Where {} of downtime went", ms(report.downtime_ms));
            section(&title, &drawing::stack(&pause_parts(report)))
        }),
        section("Figures", &table(figures)),
        section("What had to hold", &checks(record)),
        section("The course", &steps(record)),
        migrations(&course.pages),
        footer(record),
    ];
    html::page("vmirror beside QEMU's own migration", &parts)
}

fn header(record: &Record) -> String {
    let guest = record.guest.as_ref().map_or_else(String::new, |guest| {
        format!(
            "A guest of {} MiB, {} MiB of them filled with pages that it checks itself, idle otherwise ({}). ",
            guest.memory_mib, guest.fill_mib, guest.accelerator
        )
    });
    let (class, word) =
        if record.succeeded() { ("good", "everything held") } else { ("bad", "not everything held") };
    let failure = record.failure.as_ref().map_or_else(String::new, |failure| {
        format!("<ul class=\"reasons\">\n<li>{}</li>\n</ul>\n", escape(failure))
    });
    format!(
        "<header>\n<p class=\"kicker\">vmirror</p>\n<h1>A running guest moves to another host and back</h1>\n\
         <p class=\"lead\">{}Measured in turns with QEMU's own migration of an equal guest over the same link.</p>\n\
         <p class=\"badge {class}\">{word}</p>\n{failure}</header>\n",
        escape(&guest)
    )
}

fn tiles(record: &Record, figures: &[Figure]) -> String {
    let tile = |name: &str| {
        let of = figures.iter().find(|figure| figure.name == name)?;
        let qemu = of.median(Method::QemuDefault);
        let beside = qemu.map_or_else(String::new, |qemu| format!("QEMU's default: {}", of.unit.show(qemu)));
        Some(figure(of.unit.show(of.median(Method::Vmirror)?), name, &beside))
    };
    let proved: u64 = record.reports().map(|report| report.verification.proof_pages).sum();
    let all = ["downtime", "total time", "CPU time of both sides", "longest heartbeat gap"];
    let all: String = all.into_iter().filter_map(tile).collect();
    if all.is_empty() {
        return all;
    }
    let migrations = format!("in {} migrations", record.by(Method::Vmirror).count());
    html::figures(&(all + &figure(count(proved), "pages proved equal", &migrations)))
}

fn goals(figures: &[Figure]) -> String {
    let mut rows = String::new();
    for figure in figures {
        for goal in &figure.goals {
            let class = match goal.reached {
                Some(true) => "good",
                Some(false) => "bad",
                None => "open",
            };
            rows += &format!(
                "<tr><td class=\"text\">{}<td>{}<td class=\"text\">{}<td class=\"text\"><em class=\"{class}\">{}</em></tr>\n",
                escape(&figure.name),
                cells(figure)[0],
                escape(&goal.text),
                verdict(goal)
            );
        }
    }
    html::table("<th class=\"text\">figure<th>vmirror, median<th class=\"text\">goal<th>", &rows)
        + "<p class=\"note\">Where a goal is relative to QEMU, its better setting counts unless one is named. A figure that was not \
           measured is not judged.</p>\n"
}

/// The figures worth a picture: those that every method has.
fn drawings(record: &Record, figures: &[Figure]) -> String {
    if record.samples.is_empty() {
        return String::new();
    }
    let drawn = |name: &str, measure: Measure| {
        let figure = figures.iter().find(|figure| figure.name == name)?;
        let limit = figure.goals.iter().filter_map(|goal| goal.limit).min_by(f64::total_cmp);
        let rows = Method::DEMO
            .map(|method| (method.name(), record.by(method).filter_map(measure).collect::<Vec<f64>>()));
        Some(drawing::dots(name, &rows, limit))
    };
    let all = [
        ("downtime", Sample::DOWNTIME),
        ("longest heartbeat gap", Sample::GAP),
        ("total time", Sample::TOTAL),
        ("CPU time of both sides", Sample::CPU),
    ];
    let all: String = all.into_iter().filter_map(|(name, measure)| drawn(name, measure)).collect();
    all + "<p class=\"note\">Each dot is a migration, each tall line a median; the dashed line is the strictest goal.</p>\n"
}

fn table(figures: &[Figure]) -> String {
    let mut rows = String::new();
    for figure in figures {
        let spread = |at: usize| match figure.by[at] {
            Some(spread) if spread.count > 1 && figure.unit != Unit::Bytes => format!(
                "{}<small>{} to {}</small>",
                figure.unit.show(spread.median),
                figure.unit.show(spread.least),
                figure.unit.show(spread.most)
            ),
            _ => cells(figure)[at].clone(),
        };
        let beside = figure.unmigrated.map_or_else(String::new, |value| figure.unit.show(value));
        rows += &format!(
            "<tr><td class=\"text\">{}<td>{}<td>{}<td>{}<td>{beside}</tr>\n",
            escape(&figure.name),
            spread(0),
            spread(1),
            spread(2)
        );
    }
    let [vmirror, default, tuned] = Method::DEMO.map(Method::name);
    let heads =
        format!("<th class=\"text\">median, least to most<th>{vmirror}<th>{default}<th>{tuned}<th>not moved");
    html::table(&heads, &rows)
        + "<p class=\"note\">Downtime: from STOP at the source until the guest runs at the destination. vmirror's total time includes \
           the start of the destination's QEMU, encryption, verification, proof and clean-up; QEMU's has none of them. CPU \
           time: both agents with all that they do; of QEMU the threads that send and load.</p>\n"
}

fn checks(record: &Record) -> String {
    let check = |check: &Check| {
        let class = if check.held { "good" } else { "bad" };
        format!(
            "<li class=\"{class}\"><b>{}</b><span>{}</span></li>\n",
            escape(&check.name),
            escape(&check.found)
        )
    };
    if record.checks.is_empty() {
        return String::new();
    }
    format!("<ul class=\"held\">\n{}</ul>\n", record.checks.iter().map(check).collect::<String>())
}

fn steps(record: &Record) -> String {
    let step = |step: &Step| {
        format!("<li><time>{:.1} s</time><span>{}</span></li>\n", step.at_ms / 1e3, escape(&step.text))
    };
    format!("<ol class=\"steps\">\n{}</ol>\n", record.steps.iter().map(step).collect::<String>())
}

/// vmirror's own pages, each in a frame of its own, for they bring their own style.
fn migrations(pages: &[String]) -> String {
    let frame = |(number, page): (usize, &String)| {
        format!(
            "<details><summary>vmirror's report of migration {}</summary>\n<iframe sandbox title=\"migration {0}\" srcdoc=\"{}\">\
             </iframe></details>\n",
            number + 1,
            escape(page)
        )
    };
    section("Reports", &pages.iter().enumerate().map(frame).collect::<String>())
}

fn footer(record: &Record) -> String {
    let machine = &record.surroundings;
    format!(
        "<footer>{} · took {} · {} · vmirror {} · QEMU {}</footer>\n",
        escape(&record.started),
        ms(record.took_ms),
        escape(&machine.machine()),
        escape(&machine.vmirror),
        escape(&machine.qemu)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures;
    use crate::fixtures::run as record;

    fn shown(record: Record) -> String {
        let figures = figures::of(&record);
        page(&Course { record, pages: vec!["<script>alert(1)</script>".into()] }, &figures)
    }

    #[test]
    fn a_page_has_every_part_and_loads_nothing() {
        let page = shown(record());
        for text in ["The goals", "not reached", "<svg", "Where 8.00 ms of downtime went", "QEMU, tuned"] {
            assert!(page.contains(text), "{text}");
        }
        for loading in ["<script", " src=", "href=", "url(", "@import", "http"] {
            assert!(!page.contains(loading), "{loading}");
        }
    }

    #[test]
    fn a_run_that_failed_is_not_shown_as_one_that_held() {
        let mut record = record();
        record.failure = Some("<b>no room</b>".into());
        let page = shown(record);
        assert!(page.contains("not everything held") && page.contains("&lt;b&gt;no room"));
        assert!(shown(Record::default()).contains("not everything held"));
    }
}
