//! A migration while it runs: a line that changes on a terminal, plain lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use readable::{bytes, ms, rate};
use session::{Goal, Phase, Progress};

use crate::output::Output;

/// Least time between two plain lines that do not begin a phase.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How often a warning is repeated while it lasts; its figures change with every round.
const WARN_EVERY: Duration = Duration::from_secs(30);

/// Shows progress where there is somebody to see it.
#[derive(Debug)]
pub(crate) struct Live {
    output: Output,
    bar: Option<ProgressBar>,
    told: Option<(Phase, bool, Instant)>,
    warned: Option<Instant>,
}

impl Live {
    pub(crate) fn new(output: Output) -> Live {
        let bar = output.draws().then(|| {
            let bar = ProgressBar::new(1);
            let style = ProgressStyle::with_template("{prefix:.bold}  {bar:24.cyan/blue}  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Live { output, bar, told: None, warned: None }
    }

    pub(crate) fn show(&mut self, progress: &Progress) {
        if let Some(warning) = &progress.warning
            && self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY)
        {
            self.warned = Some(Instant::now());
            self.say(&format!("warning: {warning}"));
        }
        if let Some(bar) = &self.bar {
            bar.set_length(progress.total_bytes.max(1));
            bar.set_position(progress.total_bytes.saturating_sub(progress.remaining_bytes));
            bar.set_prefix(format!("{} {}", progress.vm, stage(progress)));
            bar.set_message(figures(progress));
        } else if self.output.tells() {
            let due = self.told.is_none_or(|(phase, in_sync, at)| {
                (phase, in_sync) != (progress.phase, progress.in_sync) || at.elapsed() >= LINE_EVERY
            });
            if due {
                self.told = Some((progress.phase, progress.in_sync, Instant::now()));
                self.output.note(&format!("{}  {}", progress.vm, line(progress)));
            }
        }
    }

    /// Says something without tearing the line that changes.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.output.note(text)),
            None => self.output.note(text),
        }
    }

    /// Takes the line away.
    pub(crate) fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The phase; a mirror that stands is rather that than synchronizing.
pub(crate) fn stage(progress: &Progress) -> &'static str {
    match (progress.goal, progress.phase, progress.in_sync) {
        (Goal::Mirror, Phase::Synchronize, true) => "in sync",
        (_, phase, _) => phase.name(),
    }
}

/// One plain line about one machine.
pub(crate) fn line(progress: &Progress) -> String {
    let figures = figures(progress);
    let gap = if figures.is_empty() { "" } else { "  " };
    format!("{}{gap}{figures}", stage(progress))
}

/// What can be said in numbers; nothing before there is anything to count, nor once it counts no more.
fn figures(progress: &Progress) -> String {
    if progress.phase == Phase::Resume && progress.remaining_bytes > 0 {
        // Handed over before its memory was complete.
        let left = bytes(progress.remaining_bytes);
        return format!("post-copy: {left} still to come · {} sent", bytes(progress.wire_bytes));
    }
    if progress.raw_bytes == 0 || progress.phase >= Phase::Resume {
        return String::new();
    }
    let done = progress.total_bytes.saturating_sub(progress.remaining_bytes);
    let mut parts = vec![
        format!("{} of {}", bytes(done), bytes(progress.total_bytes)),
        format!("{} sent", bytes(progress.wire_bytes)),
        rate(progress.throughput),
        format!("dirty {}", rate(progress.dirty_rate)),
        format!("lag {}", bytes(progress.remaining_bytes)),
    ];
    parts.extend(disks(progress));
    if let Some(predicted) = progress.predicted_downtime_ms {
        parts.push(format!("pause ~{}", ms(predicted)));
    }
    if progress.throttle > 0.0 {
        parts.push(format!("guest slowed by {:.0} %", progress.throttle * 100.0));
    }
    if let Some(left) = progress.time_left_ms {
        parts.push(format!("{} left", ms(left)));
    }
    parts.join(" · ")
}

/// How far the disks are, as long as there is something left of them.
fn disks(progress: &Progress) -> Option<String> {
    let left: u64 = progress.disks.iter().map(|disk| disk.remaining_bytes).sum();
    let size: u64 = progress.disks.iter().map(|disk| disk.size).sum();
    (left > 0).then(|| format!("disks {} of {}", bytes(size.saturating_sub(left)), bytes(size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::progress;
    use session::DiskProgress;

    #[test]
    fn a_line_has_phase_bytes_rates_lag_and_time_left() {
        assert_eq!(
            line(&progress()),
            "synchronize  492.0 MiB of 512.0 MiB · 150.0 MiB sent · 1.1 GiB/s · dirty 19.1 MiB/s · lag 20.0 MiB · \
             pause ~12.5 ms · 800 ms left"
        );
    }

    #[test]
    fn nothing_is_counted_before_and_after_the_mirroring() {
        let before = Progress { raw_bytes: 0, phase: Phase::Reserve, ..progress() };
        assert_eq!(line(&before), "reserve");
        let after = Progress { phase: Phase::CleanUp, ..progress() };
        assert_eq!(line(&after), "clean-up");
    }

    #[test]
    fn it_shows_what_is_done_about_a_guest_that_outruns_its_mirror() {
        let slowed = Progress { throttle: 0.35, ..progress() };
        assert!(line(&slowed).contains(" · guest slowed by 35 % · "), "{}", line(&slowed));
        let supplied = Progress { phase: Phase::Resume, ..progress() };
        assert_eq!(line(&supplied), "resume  post-copy: 20.0 MiB still to come · 150.0 MiB sent");
    }

    #[test]
    fn disks_are_told_of_while_something_is_left_of_them() {
        let disk = |remaining_bytes| DiskProgress {
            name: "/disk".to_owned(),
            size: 4 << 30,
            remaining_bytes,
            raw_bytes: 1 << 30,
            wire_bytes: 1 << 29,
        };
        let copying = Progress { disks: vec![disk(3 << 30), disk(0)], ..progress() };
        assert!(line(&copying).contains(" · disks 5.0 GiB of 8.0 GiB · pause"), "{}", line(&copying));
        let copied = Progress { disks: vec![disk(0)], ..progress() };
        assert!(!line(&copied).contains("disks"), "{}", line(&copied));
    }

    #[test]
    fn a_mirror_that_stands_is_called_in_sync() {
        let standing = Progress { goal: Goal::Mirror, in_sync: true, ..progress() };
        assert_eq!(stage(&standing), "in sync");
        assert_eq!(stage(&Progress { in_sync: false, ..standing }), "synchronize");
    }
}
