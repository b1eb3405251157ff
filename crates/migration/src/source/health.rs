//! What the destination has seen of a machine that has just resumed there, judged.

use protocol::wire;

/// Whether a machine that was watched is well; otherwise what is wrong with it, in words.
pub(super) fn judge(health: &wire::Health) -> Result<(), String> {
    if health.status != "running" {
        return Err(format!("is now {}", health.status));
    }
    if health.vcpus > 0 && health.progressing == 0 {
        return Err(format!("has not made any progress for {:.0} ms", health.watched_ms));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(status: &str, vcpus: u32, progressing: u32) -> wire::Health {
        wire::Health {
            watched_ms: 200.0,
            vcpus,
            progressing,
            status: status.to_owned(),
            problems: Vec::new(),
            frames_dropped: 0,
        }
    }

    #[test]
    fn a_machine_that_stands_still_or_has_panicked_is_not_well() {
        assert_eq!(judge(&health("running", 4, 1)), Ok(()));
        assert!(judge(&health("running", 4, 0)).is_err_and(|why| why.contains("progress")));
        for status in ["guest-panicked", "paused", "gone", "shutdown"] {
            assert!(judge(&health(status, 4, 4)).is_err_and(|why| why.contains(status)));
        }
    }
}
