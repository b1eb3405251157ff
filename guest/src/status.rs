//! What the guest says about itself, and the counters it comes from.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::disk::DiskStatus;
use serde::{Deserialize, Serialize};

/// One line of status: on the serial console behind [`PREFIX`], and as the answer to a status question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Milliseconds since the guest booted, by its own monotonic clock.
    pub uptime_ms: u64,
    /// Drawn at random at boot: another value means that the guest rebooted.
    pub boot_id: String,
    /// Pages of the filled area.
    pub pages: u64,
    /// Page writes by the workload, those that filled the area not counted.
    pub writes: u64,
    /// How many times the checker went through the entire area.
    pub passes: u64,
    /// Page checks.
    pub checked: u64,
    /// Torn pages found, each counted once per generation.
    pub torn: u64,
    /// Stale pages found, each counted once per generation.
    pub stale: u64,
    /// Lost pages found, each counted once per generation.
    pub lost: u64,
    /// The highest generation of any page.
    pub generation_max: u64,
    /// What became of its test disks; none where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DiskStatus>,
}

/// What every line of this guest on the serial console begins with, to tell it from the kernel's.
pub const PREFIX: &str = "vmirror-guest: ";
/// The line, after [`PREFIX`], that says that memory is filled and the ports answer.
pub const READY: &str = "ready";

impl Status {
    /// Torn, stale and lost pages together, and everything wrong with its test disks: zero for a sound guest.
    pub fn faults(&self) -> u64 {
        self.torn + self.stale + self.lost + self.disks.as_ref().map_or(0, |disks| disks.faults.total())
    }

    /// The status on that line of a serial log, if it has one.
    pub fn from_serial_line(line: &str) -> Option<Self> {
        let (_, json) = line.split_once(PREFIX)?;
        serde_json::from_str(json.trim_end()).ok()
    }

    /// The latest status in a serial log. A line still being written is not taken for one.
    pub fn latest_in(log: &str) -> Option<Self> {
        log.rsplit('\n').find_map(Self::from_serial_line)
    }
}

/// Counters shared by the guest's threads.
#[derive(Debug, Default)]
pub struct Counters {
    /// See [`Status::writes`].
    pub writes: AtomicU64,
    /// See [`Status::passes`].
    pub passes: AtomicU64,
    /// See [`Status::checked`].
    pub checked: AtomicU64,
    /// See [`Status::torn`].
    pub torn: AtomicU64,
    /// See [`Status::stale`].
    pub stale: AtomicU64,
    /// See [`Status::lost`].
    pub lost: AtomicU64,
    /// See [`Status::generation_max`].
    pub generation_max: AtomicU64,
}

impl Counters {
    /// The counters as a status of a guest with that boot, uptime and area, and without test disks.
    pub fn status(&self, boot_id: &str, uptime_ms: u64, pages: u64) -> Status {
        Status {
            uptime_ms,
            boot_id: boot_id.to_owned(),
            pages,
            writes: self.writes.load(Relaxed),
            passes: self.passes.load(Relaxed),
            checked: self.checked.load(Relaxed),
            torn: self.torn.load(Relaxed),
            stale: self.stale.load(Relaxed),
            lost: self.lost.load(Relaxed),
            generation_max: self.generation_max.load(Relaxed),
            disks: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_whole_line_of_a_serial_log_counts() {
        let counters = Counters::default();
        counters.writes.store(3, Relaxed);
        let old = serde_json::to_string(&counters.status("a", 1, 2)).unwrap();
        counters.torn.store(1, Relaxed);
        let new = counters.status("a", 9, 2);
        let new_line = serde_json::to_string(&new).unwrap();
        let log = format!(
            "[ 0.1] Linux\n{PREFIX}ready\r\n{PREFIX}{old}\r\n[ 2.0] {PREFIX}{new_line}\r\n{PREFIX}{{\"upti"
        );
        assert_eq!(Status::latest_in(&log), Some(new.clone()));
        assert_eq!(new.faults(), 1);
        assert_eq!(Status::latest_in("Linux\n"), None);
    }

    #[test]
    fn a_status_from_before_there_were_disks_is_one() {
        let line = format!(
            r#"{PREFIX}{{"uptime_ms":1,"boot_id":"a","pages":2,"writes":3,"passes":4,"checked":5,"torn":0,"stale":0,"lost":0,"generation_max":1}}"#
        );
        assert_eq!(Status::from_serial_line(&line).unwrap().disks, None);
    }

    #[test]
    fn faults_of_disks_are_faults() {
        let line = format!(
            r#"{PREFIX}{{"uptime_ms":1,"boot_id":"a","pages":2,"writes":3,"passes":4,"checked":5,"torn":1,"stale":0,"lost":0,"generation_max":1,"disks":{{"faults":{{"lost":2,"ahead":1}}}}}}"#
        );
        assert_eq!(Status::from_serial_line(&line).unwrap().faults(), 4);
    }
}
