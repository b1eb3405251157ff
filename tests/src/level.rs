//! Whether what a process takes stays level.

use std::fs;
use std::time::{Duration, Instant};

use testbed::Host;

/// What the agents of a pair of hosts take together, looked at again and again.
///
/// Together, because what an agent takes depends on how many machines it has, and there are always as many in all.
#[derive(Debug, Default)]
pub struct Level {
    begun: Option<Instant>,
    looks: Vec<Look>,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Duration,
    bytes: f64,
    descriptors: f64,
}

/// How it went on, by the line that fits best (least squares).
#[derive(Debug, Clone, Copy)]
pub struct Trend {
    /// How often it was looked.
    pub looks: usize,
    /// Over how long.
    pub over: Duration,
    /// Resident memory on average, in MiB, and by how much it grew along that line.
    pub mib: f64,
    /// See there.
    pub mib_grown: f64,
    /// Descriptors on average, and by how many they grew along that line.
    pub descriptors: f64,
    /// See there.
    pub descriptors_grown: f64,
}

impl Level {
    /// Looks at the agents. Nothing is noted while one of them does not run.
    pub fn look(&mut self, hosts: [&Host; 2]) {
        let at = self.begun.get_or_insert_with(Instant::now).elapsed();
        let [Some(a), Some(b)] = hosts.map(|host| host.agent_pid().and_then(taken)) else { return };
        self.looks.push(Look { at, bytes: a.0 + b.0, descriptors: a.1 + b.1 });
    }

    /// The trend of all looks but the first part of them, in which everything takes what it needs.
    #[must_use]
    pub fn trend(&self) -> Trend {
        let warm = &self.looks[self.looks.len() / 4..];
        let mean = |of: fn(&Look) -> f64| warm.iter().map(of).sum::<f64>() / warm.len().max(1) as f64;
        let over = match warm {
            [first, .., last] => last.at - first.at,
            _ => Duration::ZERO,
        };
        let at = mean(|look| look.at.as_secs_f64());
        let spread: f64 = warm.iter().map(|look| (look.at.as_secs_f64() - at).powi(2)).sum();
        let grown = |of: fn(&Look) -> f64| {
            let mean = mean(of);
            let along: f64 = warm.iter().map(|look| (look.at.as_secs_f64() - at) * (of(look) - mean)).sum();
            if spread > 0.0 { along / spread * over.as_secs_f64() } else { 0.0 }
        };
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        Trend {
            looks: warm.len(),
            over,
            mib: mib(mean(|look| look.bytes)),
            mib_grown: mib(grown(|look| look.bytes)),
            descriptors: mean(|look| look.descriptors),
            descriptors_grown: grown(|look| look.descriptors),
        }
    }
}

impl Trend {
    /// Asserts that neither has grown by more than chance: a tenth and 8 MiB of memory, two descriptors.
    ///
    /// # Panics
    /// If one has.
    pub fn is_level(&self) {
        assert!(self.looks >= 8, "looked too seldom: {self:?}");
        assert!(self.mib_grown < self.mib / 10.0 + 8.0, "the agents' memory grows: {self:?}");
        assert!(self.descriptors_grown < 2.0, "the agents' descriptors grow: {self:?}");
    }
}

/// Resident bytes and open descriptors of a process.
fn taken(pid: i32) -> Option<(f64, f64)> {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: f64 = pages.split(' ').nth(1)?.parse().ok()?;
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some((pages * crate::PAGE as f64, descriptors as f64))
}
