//! Names that say whose a thing is: `vmirror-test-PID-N`, N counting the testbeds of process PID.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// What every name begins with.
pub(crate) const PREFIX: &str = "vmirror-test-";
/// The environment variable that marks every process of a testbed with the name of its host.
pub(crate) const MARK: &str = "VMIRROR_TESTBED";

/// The next name of this process.
pub(crate) fn next() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed))
}

/// The process that made the thing of that name, if it is one of ours.
pub(crate) fn creator(name: &str) -> Option<i32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_say_whose_they_are() {
        let (a, b) = (next(), next());
        assert_ne!(a, b);
        assert_eq!(creator(&format!("{a}-switch")), Some(std::process::id() as i32));
        assert_eq!(creator("vmirror-test-x-1"), None);
        assert_eq!(creator("vmirror-test--1"), None);
        assert_eq!(creator("other-1-1"), None);
    }
}
