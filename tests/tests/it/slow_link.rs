//! A link that is slower than the guest writes must not keep it from moving where less needs to be sent.

use end_to_end::{PAGE, Pair, report_adds_up};
use session::Report;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::root_or_skip;

const MBIT: u64 = 1_000_000;

/// Two hosts with so slow a link between them, in bits per second.
fn pair(bits_per_second: u64) -> Pair {
    let pair = Pair::start();
    pair.link_carries(bits_per_second);
    pair
}

/// Bytes sent for each page that was sent whole.
fn bytes_per_page(report: &Report) -> f64 {
    let plain: u64 = report.rounds.iter().map(|round| round.plain).sum();
    report.memory.wire_bytes as f64 / plain as f64
}

#[test]
fn a_guest_that_outruns_the_link_with_small_changes_still_arrives() {
    const NAME: &str = "a_guest_that_outruns_the_link_with_small_changes_still_arrives";
    if !root_or_skip(NAME) {
        return;
    }
    let link = 100 * MBIT;
    let pair = pair(link);
    let rate = link / 8 * 3 / 2 / PAGE;
    let spec = GuestSpec {
        fill_mib: 32,
        working_set_mib: Some(16),
        rate,
        pattern: Pattern::Counter,
        ..pair.spec("vm", 128)
    };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let report = pair.migrate("vm", pair.a(), pair.b(), &["--downtime", "200ms", "--max-downtime", "300ms"]);
    report_adds_up(&report, &guest);
    let (mut deltas, mut plain) = (0, 0);
    for round in &report.rounds[2..] {
        deltas += round.delta;
        plain += round.plain;
    }
    assert!(deltas > plain, "{deltas} deltas, {plain} whole pages: {:#?}", report.rounds);
    guest.sound_since(&before);
}

#[test]
fn a_slow_link_is_not_made_to_carry_what_compression_can_spare_it() {
    const NAME: &str = "a_slow_link_is_not_made_to_carry_what_compression_can_spare_it";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = pair(100 * MBIT);
    let spec = GuestSpec { fill_mib: 32, rate: 10, pattern: Pattern::Random, ..pair.spec("vm", 128) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let mut hosts = [pair.a(), pair.b()];
    let sent = ["off", "lz4", "zstd", "auto"].map(|compress| {
        let report = pair.migrate("vm", hosts[0], hosts[1], &["--compress", compress]);
        report_adds_up(&report, &guest);
        hosts.reverse();
        bytes_per_page(&report)
    });
    let [off, lz4, zstd, auto] = sent;
    assert!(off >= PAGE as f64, "{sent:?}");
    assert!(lz4 < 0.9 * off && zstd < lz4, "{sent:?}");
    assert!(auto < 0.9 * off, "{sent:?}");
    guest.sound_since(&before);
}
