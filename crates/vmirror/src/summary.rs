//! A migration's report in words: short at its end, in full when asked for.

use readable::{bytes, count, moment, ms, rate};
use session::report::{Counted, Disk, DiskMode, Round, Verdict, Verification};
use session::{Engine, Outcome, Report};

use crate::table::Table;

/// Enough of an id to name it.
pub(crate) fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// The name of an outcome.
pub(crate) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Completed => "completed",
        Outcome::Failed => "failed",
        Outcome::Cancelled => "cancelled",
        Outcome::Uncertain => "uncertain",
    }
}

/// The name of a verdict.
pub(crate) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Match => "match",
        Verdict::Mismatch => "MISMATCH",
        Verdict::NotMade => "not made",
    }
}

/// Where the machine runs, in a sentence.
pub(crate) fn headline(report: &Report) -> String {
    let Report { vm, source, destination, .. } = report;
    match report.outcome {
        Outcome::Completed => format!("{vm} now runs on {destination}"),
        Outcome::Failed => format!("{vm} was not moved to {destination}; it runs on {source} as before"),
        Outcome::Cancelled => format!("the migration of {vm} was cancelled; it runs on {source} as before"),
        // It was handed over long before.
        Outcome::Uncertain if report.verification.proof == Verdict::Mismatch => {
            format!("{vm} runs on {destination}, and is not what it was on {source}")
        }
        Outcome::Uncertain => format!("nobody can tell whether {vm} should run on {source} or {destination}"),
    }
}

/// A few lines at the end of a migration; `to` is the address that was asked for.
pub(crate) fn of(report: &Report, to: Option<&str>) -> String {
    let mut text = headline(report);
    if let (Outcome::Completed, Some(to)) = (report.outcome, to) {
        text.push_str(&format!(" ({to})"));
    }
    text.push('\n');
    for (name, fact) in facts(report) {
        text.push_str(&format!("  {name:<9} {fact}\n"));
    }
    text.push_str(&format!("  report    vmirror report {}", short(&report.id)));
    text
}

/// What matters, one fact a line. A migration that did not come to something has no fact about it.
fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    if report.outcome == Outcome::Completed {
        facts.push((
            "downtime",
            format!(
                "{}{} ({} asked, {} predicted)",
                ms(report.downtime_ms),
                if report.downtime_ms > report.downtime_asked_ms { ", LONGER than asked" } else { "" },
                ms(report.downtime_asked_ms),
                ms(report.downtime_predicted_ms)
            ),
        ));
    }
    facts.push(("total", ms(report.total_ms)));
    let memory = &report.memory;
    if memory.pages > 0 {
        let guest = memory.pages.saturating_mul(memory.page_size);
        let rounds = report.rounds.len();
        facts.push((
            "memory",
            format!(
                "{} in {rounds} round{}, {} sent",
                bytes(guest),
                if rounds == 1 { "" } else { "s" },
                bytes(memory.wire_bytes)
            ),
        ));
    }
    let mirrored = || report.disks.iter().filter(|disk| disk.mode == DiskMode::Mirrored);
    if let disks @ 1.. = mirrored().count() {
        let sum = |part: fn(&Disk) -> u64| mirrored().map(part).sum();
        facts.push((
            "disks",
            format!(
                "{} in {disks} mirrored, {} read, {} sent",
                bytes(sum(|disk| disk.size)),
                bytes(sum(|disk| disk.raw_bytes)),
                bytes(sum(|disk| disk.wire_bytes))
            ),
        ));
    }
    if report.device_state_bytes > 0 {
        facts.push(("devices", bytes(report.device_state_bytes)));
    }
    let found = &report.verification;
    if found.gate == Verdict::NotMade && found.audited_pages > 0 {
        facts.push(("audited", audited(found)));
    } else if found.gate != Verdict::NotMade {
        let proof = match found.proof {
            Verdict::NotMade => "proof not made".to_owned(),
            Verdict::Match => {
                format!("proof match over {}", pages_and_blocks(found.proof_pages, found.proof_blocks))
            }
            Verdict::Mismatch => format!(
                "proof MISMATCH in {} of {}",
                mismatched(found),
                pages_and_blocks(found.proof_pages, found.proof_blocks)
            ),
        };
        facts.push(("verified", format!("gate {}, {proof}; {}", verdict(found.gate), audited(found))));
    }
    if report.engine == Engine::Qemu.name() && report.outcome == Outcome::Completed {
        facts.push(("verified", "nothing: QEMU's own stream carried the memory".to_owned()));
    }
    if let Some(late) = &report.post_copy {
        facts.push((
            "post-copy",
            format!(
                "{} pages came after the hand-over, within {}; the guest waited for {}",
                count(late.pages),
                ms(late.duration_ms),
                count(late.faults)
            ),
        ));
    }
    let network = &report.network;
    for problem in &network.problems {
        facts.push(("problem", format!("{}; {}", problem.message, problem.hint)));
    }
    if let Some(forwarding) = &network.forwarding {
        let to = forwarding.to.map(|to| format!(" to {to}")).unwrap_or_default();
        let interfaces = forwarding.interfaces.join(", ");
        facts.push((
            "forwarding",
            format!(
                "what comes for the VM here goes on{to} ({interfaces}) until `vmirror release {}`",
                report.vm
            ),
        ));
    }
    if network.frames_forwarded + network.frames_dropped > 0 {
        facts.push((
            "network",
            format!(
                "{} frames forwarded, {} dropped",
                count(network.frames_forwarded),
                count(network.frames_dropped)
            ),
        ));
    }
    if let Some(health) = &report.health {
        facts.push((
            "health",
            format!(
                "{} of {} vCPUs made progress in {}",
                health.vcpus_progressing,
                health.vcpus,
                ms(health.watched_ms)
            ),
        ));
    } else if report.outcome == Outcome::Completed {
        facts.push(("health", "nothing was heard of it at the destination: look at the VM there".to_owned()));
    }
    facts
}

/// Everything, for reading.
pub(crate) fn in_full(report: &Report) -> String {
    let mut text = format!("{}\n", headline(report));
    if let Some(failure) = &report.error {
        for finding in std::iter::once(&failure.finding).chain(&failure.more) {
            text.push_str(&format!("  because   {}\n            {}\n", finding.message, finding.hint));
        }
    }
    text.push_str(&format!("  id        {}\n  begun     {}\n", report.id, moment(report.started_unix_ms)));
    text.push_str(&format!("  engine    {}\n", report.engine));
    for (name, fact) in facts(report) {
        text.push_str(&format!("  {name:<9} {fact}\n"));
    }
    if report.tracking_hold_ms > 0.0 {
        text.push_str(&format!("  held      {} when tracking began\n", ms(report.tracking_hold_ms)));
    }

    if !report.phases.is_empty() {
        let mut table = Table::new(&["PHASE", "BEGAN", "TOOK"], &[1, 2]);
        for phase in &report.phases {
            table.row([phase.name.name().to_owned(), ms(phase.start_ms), ms(phase.duration_ms)]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    if report.outcome == Outcome::Completed {
        let mut table = Table::new(&["IN THE PAUSE", "AT"], &[1]);
        for (name, at) in pause(report) {
            table.row([name.to_owned(), ms(at)]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    if !report.rounds.is_empty() {
        let headings = [
            "ROUND", "DIRTY", "ZERO", "SAME", "DELTA", "COPY", "PLAIN", "READ", "SENT", "SCAN", "TOOK",
            "DIRTIED", "PAUSE", "",
        ];
        let mut table = Table::new(&headings, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        for round in &report.rounds {
            table.row([
                round.n.to_string(),
                count(round.dirty_pages),
                count(round.zero),
                count(round.unchanged),
                count(round.delta),
                count(round.duplicate),
                count(round.plain),
                bytes(round.raw_bytes),
                bytes(round.wire_bytes),
                ms(round.scan_ms),
                ms(round.duration_ms),
                round.estimate.as_ref().map_or_else(String::new, |estimate| rate(estimate.dirty_rate)),
                predicted(round).map_or_else(String::new, |downtime| format!("~{}", ms(downtime))),
                match (round.withheld, round.paused) {
                    (0, false) => String::new(),
                    (0, true) => "paused".to_owned(),
                    (pages, paused) => {
                        format!("{}{} left out", if paused { "paused, " } else { "" }, count(pages))
                    }
                },
            ]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    if let Some(slowed) = &report.throttle {
        text.push_str(&format!(
            "\nslowed: the guest outran the mirror; its CPUs were stopped for up to {:.0} % of the time within {}, {} at a time \
             at most\n",
            slowed.highest_share * 100.0,
            ms(slowed.duration_ms),
            ms(slowed.longest_stop_ms),
        ));
    }
    if let Some(late) = &report.post_copy {
        let missing = format!("\npost-copy: {} pages were missing at the hand-over", count(late.pages));
        let since =
            if late.counted == Counted::Part { " since the agent there was last started" } else { "" };
        text.push_str(&match late.counted {
            Counted::Nothing => format!("{missing}, and nobody has said that all of them came\n"),
            Counted::All | Counted::Part => format!(
                "{missing} and came within {}; the guest waited for {} of them{since}, {} on average and {} at most\n",
                ms(late.duration_ms),
                count(late.faults),
                ms(late.mean_fault_ms),
                ms(late.longest_fault_ms),
            ),
        });
    }
    if !report.disks.is_empty() {
        let mut table = Table::new(&["DISK", "SIZE", "MODE", "READ", "SENT"], &[1, 3, 4]);
        for disk in &report.disks {
            let moved = |count| if disk.mode == DiskMode::Shared { "-".to_owned() } else { bytes(count) };
            table.row([
                disk.name.clone(),
                bytes(disk.size),
                disk.mode.name().to_owned(),
                moved(disk.raw_bytes),
                moved(disk.wire_bytes),
            ]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    text
}

/// How much differed.
fn mismatched(found: &Verification) -> String {
    match found.mismatched_blocks {
        0 => count(found.mismatches),
        blocks => pages_and_blocks(found.mismatches, blocks),
    }
}

/// What was compared while the machine ran.
pub(crate) fn audited(found: &Verification) -> String {
    let compared = pages_and_blocks(found.audited_pages, found.audited_blocks);
    format!("{compared} audited, {} repaired", count(found.repaired_pages + found.repaired_blocks))
}

/// So many pages of memory, and blocks of disks if there are any.
pub(crate) fn pages_and_blocks(pages: u64, blocks: u64) -> String {
    match blocks {
        0 => format!("{} pages", count(pages)),
        blocks => format!("{} pages and {} blocks of disks", count(pages), count(blocks)),
    }
}

/// The downtime that was foreseen after a round, in milliseconds.
pub(crate) fn predicted(round: &Round) -> Option<f64> {
    round.estimate.as_ref()?.downtime_ms
}

/// The parts of the downtime, each with when it was over.
pub(crate) fn pause(report: &Report) -> [(&'static str, f64); 7] {
    let pause = &report.pause;
    [
        ("stop seen", pause.stopped_ms),
        ("last pages there", pause.last_round_ms),
        ("device state saved", pause.device_state_ms),
        ("gate passed", pause.gate_ms),
        ("loaded there", pause.ready_ms),
        ("handed over", pause.handed_over_ms),
        ("runs there", pause.running_ms),
    ]
}

#[cfg(test)]
pub(crate) mod tests;
