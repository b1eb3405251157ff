//! A guest that moves again and again must not lose a page, a second or its soul.

use std::time::Instant;

use end_to_end::{Pair, report_adds_up};
use testbed::guest_spec::{GuestSpec, Pattern};

/// Migrations in a row.
const HOPS: usize = 20;

#[test]
fn no_page_is_lost_in_twenty_migrations_in_a_row() {
    let pair = Pair::start();
    let spec = GuestSpec { rate: 2000, pattern: Pattern::Random, ..pair.spec("vm", 512) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let first = guest.status();
    let mut hosts = [pair.a(), pair.b()];
    for hop in 1..=HOPS {
        let [from, to] = hosts;
        let before = guest.status();
        let start = Instant::now();
        let report = pair.migrate("vm", from, to, &[]);
        report_adds_up(&report, &guest);
        assert_eq!((report.source.as_str(), report.destination.as_str()), (from.name(), to.name()));
        pair.holds_nothing(from);
        assert!(pair.runs_on("vm", to) && pair.show("vm", from).is_none());
        let after = guest.sound_since(&before);
        assert!(after.writes > before.writes, "{after:?}, was {before:?}");
        eprintln!(
            "hop {hop:2}: downtime {:6.2} ms, {:4.0} ms in all, {} rounds, {:.1?} with the checks",
            report.downtime_ms,
            report.total_ms,
            report.rounds.len(),
            start.elapsed()
        );
        hosts.reverse();
    }
    guest.sound_since(&first);
    let history = end_to_end::vmirror(pair.a(), &["history", "--json", "--vm", "vm"]).done().json();
    assert_eq!(history.as_array().unwrap().len(), HOPS / 2, "{history}");
}
