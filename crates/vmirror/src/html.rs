//! A report as one page to look at: no script, and nothing from elsewhere.

mod timeline;

use std::fmt::Write as _;

use readable::html::{self, escape, figure, section};
use readable::{bytes, count, moment, ms, rate};
use session::report::{Counted, Verdict};
use session::{Outcome, Report};

use crate::summary::{headline, outcome, predicted, verdict};

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let title = format!("Migration of {} to {}", report.vm, report.destination);
    let pause = if report.outcome == Outcome::Completed { timeline::pause(report) } else { String::new() };
    let parts = [
        header(report),
        reasons(report),
        figures(report),
        section("Phases", &timeline::phases(report)),
        section("The pause", &pause),
        section("Rounds", &if report.rounds.is_empty() { String::new() } else { rounds(report) }),
        section("Verification", &verification(report)),
        section("Disks", &if report.disks.is_empty() { String::new() } else { disks(report) }),
        footer(report),
    ];
    html::page(&title, &parts)
}

/// Appends; a `String` takes everything.
fn put(page: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = page.write_fmt(text);
}

fn header(report: &Report) -> String {
    format!(
        "<header>\n<p class=\"kicker\">{} <span class=\"arrow\">→</span> {}</p>\n\
         <h1>{}</h1>\n<p class=\"badge {outcome}\">{outcome}</p>\n</header>\n",
        escape(&report.source),
        escape(&report.destination),
        escape(&headline(report)),
        outcome = outcome(report.outcome),
    )
}

fn reasons(report: &Report) -> String {
    let Some(failure) = &report.error else { return String::new() };
    let mut list = String::from("<ul class=\"reasons\">\n");
    for finding in std::iter::once(&failure.finding).chain(&failure.more) {
        put(
            &mut list,
            format_args!(
                "<li><strong>{}</strong><br>{}</li>\n",
                escape(&finding.message),
                escape(&finding.hint)
            ),
        );
    }
    list + "</ul>\n"
}

fn figures(report: &Report) -> String {
    let mut all = String::new();
    if report.outcome == Outcome::Completed {
        let note =
            format!("{} asked, {} predicted", ms(report.downtime_asked_ms), ms(report.downtime_predicted_ms));
        all += &figure(ms(report.downtime_ms), "downtime", &note);
    }
    let held = if report.tracking_hold_ms > 0.0 {
        format!("{} held when tracking began", ms(report.tracking_hold_ms))
    } else {
        String::new()
    };
    all += &figure(ms(report.total_ms), "total time", &held);
    let memory = &report.memory;
    if memory.pages > 0 {
        let guest = memory.pages.saturating_mul(memory.page_size);
        all += &figure(bytes(guest), "guest memory", &format!("{} pages", count(memory.pages)));
        let share = memory.wire_bytes as f64 / memory.raw_bytes.max(1) as f64 * 100.0;
        let share = if share < 1.0 { "less than 1".to_owned() } else { format!("{share:.0}") };
        all += &figure(bytes(memory.wire_bytes), "sent", &format!("{share} % of what was read"));
    }
    if let Some(late) = report.post_copy.as_ref().filter(|late| late.counted != Counted::Nothing) {
        let note = format!(
            "the longest of {} waits for one of {} pages that came after the hand-over",
            count(late.faults),
            count(late.pages)
        );
        all += &figure(ms(late.longest_fault_ms), "waited for memory", &note);
    }
    if let Some(health) = &report.health {
        let value = format!("{}/{}", health.vcpus_progressing, health.vcpus);
        all += &figure(value, "vCPUs in progress", &format!("watched for {}", ms(health.watched_ms)));
    }
    html::figures(&all)
}

fn rounds(report: &Report) -> String {
    let most = report.rounds.iter().map(|round| round.dirty_pages).max().unwrap_or(0).max(1);
    let mut rows = String::new();
    for round in &report.rounds {
        // The least width of a bar must not show pages where there are none.
        let shown = if round.dirty_pages == 0 { "hidden" } else { "visible" };
        let width = round.dirty_pages as f64 / most as f64 * 100.0;
        let paused = if round.paused { " class=\"paused\" title=\"while the guest was paused\"" } else { "" };
        put(
            &mut rows,
            format_args!(
                "<tr{paused}><td>{}<td>{}<td class=\"bar\"><i style=\"width:{width:.2}%;visibility:{shown}\"></i><td>{}<td>{}<td>{}<td>{}\
             <td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>\n",
                round.n,
                count(round.dirty_pages),
                count(round.zero),
                count(round.unchanged),
                count(round.delta),
                count(round.duplicate),
                count(round.plain),
                count(round.withheld),
                bytes(round.wire_bytes),
                ms(round.scan_ms),
                ms(round.duration_ms),
                round.estimate.as_ref().map_or_else(String::new, |estimate| rate(estimate.dirty_rate)),
                predicted(round).map_or_else(String::new, ms),
            ),
        );
    }
    let note = if report.rounds.iter().any(|round| round.paused) {
        "<p class=\"note\">Highlighted rounds were made while the guest was paused.</p>\n"
    } else {
        ""
    };
    let heads = "<th>round<th>dirty pages<th class=\"bar\"><th>zero<th>same<th>delta\
                 <th>copy<th>plain<th>left out<th>sent<th>scan<th>took<th>dirtied<th>pause foreseen";
    html::table(heads, &rows) + note
}

fn verification(report: &Report) -> String {
    let found = &report.verification;
    let card = |name: &str, result: Verdict, text: String| {
        let class = match result {
            Verdict::Match => "match",
            Verdict::Mismatch => "mismatch",
            Verdict::NotMade => "not-made",
        };
        format!("<div class=\"check {class}\"><b>{name}</b><em>{}</em><p>{text}</p></div>\n", verdict(result))
    };
    let audit = match (found.audited_pages, found.repaired_pages) {
        (0, _) => Verdict::NotMade,
        _ => Verdict::Match,
    };
    let proof = match found.proof {
        Verdict::Mismatch => {
            format!("{} of {} pages differ", count(found.mismatches), count(found.proof_pages))
        }
        _ => format!("{} pages of the frozen source hashed again after the pause", count(found.proof_pages)),
    };
    format!(
        "<div class=\"checks\">\n{}{}{}</div>\n",
        card(
            "Audit",
            audit,
            format!(
                "{} pages read back, {} repaired",
                count(found.audited_pages),
                count(found.repaired_pages)
            )
        ),
        card("Gate", found.gate, "both ledgers compared before the hand-over".to_owned()),
        card("Proof", found.proof, proof),
    )
}

fn disks(report: &Report) -> String {
    let mut rows = String::new();
    for disk in &report.disks {
        put(
            &mut rows,
            format_args!(
                "<tr><td class=\"text\">{}<td>{}<td>{}<td>{}<td>{}</tr>\n",
                escape(&disk.name),
                bytes(disk.size),
                disk.mode.name(),
                bytes(disk.raw_bytes),
                bytes(disk.wire_bytes)
            ),
        );
    }
    html::table("<th class=\"text\">disk<th>size<th>mode<th>read<th>sent", &rows)
}

fn footer(report: &Report) -> String {
    format!(
        "<footer>Migration {} · begun {} · engine {} · device state {}</footer>\n",
        escape(&report.id),
        moment(report.started_unix_ms),
        escape(&report.engine),
        bytes(report.device_state_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::{refused, report};

    #[test]
    fn names_cannot_become_markup() {
        let mut hostile = refused();
        hostile.vm = "<script>alert('vm')</script>".to_owned();
        hostile.destination = "\"><img src=x onerror=alert(1)>".to_owned();
        if let Some(failure) = &mut hostile.error {
            failure.finding.message = "</ul><b>&".to_owned();
        }
        let page = page(&hostile);
        for markup in ["<script", "<img", "</ul><b>"] {
            assert!(!page.contains(markup), "{markup}");
        }
        assert!(page.contains("&lt;script&gt;alert(&#39;vm&#39;)&lt;/script&gt;"));
        assert_eq!(escape("a&b<c>\"d'"), "a&amp;b&lt;c&gt;&quot;d&#39;");
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let page = page(&report());
        for loading in ["src=", "href=", "url(", "@import", "http"] {
            assert!(!page.contains(loading), "{loading}");
        }
    }

    #[test]
    fn a_page_has_every_phase_and_round_and_the_verdicts() {
        let page = page(&report());
        for text in
            ["switch-over", "8.7 ms", "131,072", "Proof</b><em>match", "paused", "<svg", "loaded there"]
        {
            assert!(page.contains(text), "{text}");
        }
    }

    #[test]
    fn one_that_was_refused_shows_why_and_claims_nothing() {
        let page = page(&refused());
        assert!(page.contains("ram_dir of host-b has 1.0 GiB free"));
        assert!(!page.contains("The pause") && !page.contains("<em>match"), "{page}");
    }
}
