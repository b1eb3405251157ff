//! A run on a terminal: what it is about, and the figures against the goals.

use readable::measured_ms as ms;

use crate::figures::{Figure, Goal};
use crate::measure::Spread;
use crate::record::{Method, Record, Sample};

/// Paints words, or does not.
#[derive(Clone, Copy, Debug)]
pub struct Paint(pub bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    fn verdict(self, held: Option<bool>, text: &str) -> String {
        match held {
            Some(true) => self.with("32", text),
            Some(false) => self.with("31", text),
            None => self.dim(text),
        }
    }
}

/// The words for a goal's end.
pub(crate) fn verdict(goal: &Goal) -> &'static str {
    match goal.reached {
        Some(true) => "reached",
        Some(false) => "not reached",
        None => "not judged",
    }
}

/// What came of a migration, in a few words.
pub(crate) fn in_words(sample: &Sample) -> String {
    let beats = sample.heartbeats.map_or_else(String::new, |beats| match beats.gap_ms() {
        Some(gap) => format!(", heartbeat gap {}, {} lost", ms(gap), beats.lost),
        None => ", not heard again by its client".to_owned(),
    });
    format!(
        "downtime {}, total {}, CPU {}{beats}",
        ms(sample.downtime_ms),
        ms(sample.total_ms),
        ms(sample.cpu_source_ms + sample.cpu_destination_ms)
    )
}

/// What the run is about, before it begins.
pub fn opening(paint: Paint) -> String {
    format!(
        "\n{}\n{}\n\n",
        paint.bold("vmirror: a running guest moves to another host and back"),
        paint.dim("measured in turns with QEMU's own migration of an equal guest over the same link")
    )
}

/// Everything after the run.
pub fn summary(record: &Record, figures: &[Figure], paint: Paint) -> String {
    let parts =
        [about(record, paint), table(record, figures, paint), typical(record, paint), checks(record, paint)];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    format!("\n{}\n", parts.join("\n"))
}

fn about(record: &Record, paint: Paint) -> String {
    let machine = &record.surroundings;
    let mut lines = vec![("machine", machine.machine())];
    lines.push(("programs", format!("vmirror {}, QEMU {}", machine.vmirror, machine.qemu)));
    if let Some(guest) = &record.guest {
        let free = guest.memory_mib.saturating_sub(guest.fill_mib);
        lines.push((
            "guests",
            format!(
                "{} MiB of memory, of which {} MiB are filled and the other {free} MiB hold the guest's system or nothing; {} vCPU \
                 ({}), idle but for checking itself",
                guest.memory_mib, guest.fill_mib, guest.cpus, guest.accelerator
            ),
        ));
    }
    let network = if record.network {
        "two hosts, a switch and a client in network namespaces; links not shaped"
    } else {
        "two agents on loopback; guests without network (as root there is one)"
    };
    lines.push(("network", network.to_owned()));
    lines.iter().map(|(name, text)| format!("  {}  {text}\n", paint.dim(&format!("{name:8}")))).collect()
}

/// The cells of a figure's row that are the same on paper and on the page.
pub(crate) fn cells(figure: &Figure) -> [String; 3] {
    figure.by.map(|spread: Option<Spread>| {
        spread.map_or_else(|| "-".to_owned(), |spread| figure.unit.show(spread.median))
    })
}

fn table(record: &Record, figures: &[Figure], paint: Paint) -> String {
    let runs = Method::DEMO.map(|method| record.by(method).count());
    if runs[0] == 0 {
        return String::new();
    }
    let [vmirror, default, tuned] = Method::DEMO.map(Method::name);
    let head = format!("  {:36}{vmirror:>11}{default:>16}{tuned:>14}   {:38}", "medians", "goal of vmirror");
    let mut out = format!("{}\n  {}\n", paint.bold(head.trim_end()), paint.dim(&"─".repeat(124)));
    for figure in figures {
        let [vmirror, default, tuned] = cells(figure);
        let row = format!("  {:36}{vmirror:>11}{default:>16}{tuned:>14}", figure.name);
        let beside = figure
            .unmigrated
            .map(|value| format!("   {}", paint.dim(&format!("not moved: {}", figure.unit.show(value)))));
        let mut goals = figure
            .goals
            .iter()
            .map(|goal| format!("   {:41}{}", goal.text, paint.verdict(goal.reached, verdict(goal))));
        out += &row;
        out += &goals.next().or(beside).unwrap_or_default();
        out += "\n";
        for goal in goals {
            out += &format!("{:79}{goal}\n", "");
        }
    }
    out + &paint.dim(&format!(
        "  {}, {} and {} migrations. Downtime: from STOP at the source until it runs at the destination. vmirror's total time \
         includes\n  the start of the destination's QEMU, encryption, verification, proof and clean-up; QEMU's has none of them. \
         CPU: both agents with\n  all that they do; of QEMU the threads that send and load.\n",
        runs[0], runs[1], runs[2]
    ))
}

/// The parts of the pause, each with its length in milliseconds, in order of time.
pub fn pause_parts(report: &session::Report) -> Vec<(&'static str, f64)> {
    let pause = &report.pause;
    let mut marks = vec![
        ("guest stopped", pause.stopped_ms),
        ("last round", pause.last_round_ms),
        ("device state", pause.device_state_ms),
        ("gate", pause.gate_ms),
        ("loaded there", pause.ready_ms),
        ("handed over", pause.handed_over_ms),
        ("runs there", pause.running_ms),
    ];
    marks.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut before = 0.0;
    let length = |(name, at)| {
        let length = at - before;
        before = at;
        (name, length)
    };
    marks.into_iter().map(length).collect()
}

fn typical(record: &Record, paint: Paint) -> String {
    let Some(report) = record.typical() else { return String::new() };
    let list = |parts: Vec<(&str, f64)>| {
        let words: Vec<String> =
            parts.iter().map(|(name, length)| format!("{name} {}", ms(*length))).collect();
        words.join(" · ")
    };
    let phases = report.phases.iter().map(|phase| (phase.name.name(), phase.duration_ms)).collect();
    format!(
        "  {}\n  {}  {}\n  {}  {}\n",
        paint.bold("where the time of a typical migration by vmirror went"),
        paint.dim(&format!("{:14}", format!("pause {}", ms(report.downtime_ms)))),
        list(pause_parts(report)),
        paint.dim(&format!("{:14}", format!("all {}", ms(report.total_ms)))),
        list(phases)
    )
}

fn checks(record: &Record, paint: Paint) -> String {
    let mut out = String::new();
    for check in &record.checks {
        let mark = paint.verdict(Some(check.held), if check.held { "✓" } else { "✗" });
        out += &format!("  {mark} {}  {}\n", check.name, paint.dim(&check.found));
    }
    if let Some(failure) = &record.failure {
        out += &format!("  {} {failure}\n", paint.verdict(Some(false), "✗"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures;
    use crate::fixtures::run as record;

    #[test]
    fn the_table_has_every_goal_with_its_verdict() {
        let record = record();
        let table = table(&record, &figures::of(&record), Paint(false));
        let row = |name: &str| {
            let line = table.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row("downtime "), "downtime 9.00 ms 35.0 ms 12.0 ms ≤ 15 ms reached");
        assert_eq!(row("≤ half"), "≤ half of QEMU's default (17.5 ms) reached");
        assert_eq!(row("tracking"), "tracking hold 0.40 ms - - ≤ 2 ms reached");
        assert_eq!(
            row("CPU time of both"),
            "CPU time of both sides 1.50 s 1.10 s 1.00 s ≤ QEMU's + 30 % (1.30 s) not reached"
        );
        assert_eq!(row("longest"), "longest heartbeat gap 12.0 ms 38.0 ms 15.0 ms not moved: 2.50 ms");
    }

    #[test]
    fn the_parts_of_a_pause_add_up_to_it_in_order_of_time() {
        let mut report = record().typical().unwrap().clone();
        report.pause.device_state_ms = 1.0;
        let parts = pause_parts(&report);
        assert_eq!(parts[1].0, "device state");
        let sum: f64 = parts.iter().map(|(_, length)| length).sum();
        assert!((sum - report.downtime_ms).abs() < 1e-9, "{parts:?}");
    }

    #[test]
    fn a_run_that_failed_says_so() {
        let record = Record { failure: Some("interrupted".into()), ..Record::default() };
        let text = summary(&record, &figures::of(&record), Paint(false));
        assert!(text.contains("✗ interrupted") && !text.contains("reached"), "{text}");
    }
}
