//! A disk that bypasses the page cache writes guest memory behind the tracking, and not a page of it may be left behind.

use std::io::Write;
use std::path::PathBuf;

use end_to_end::{Guest, Pair, report_adds_up, until};
use guest::reader;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Status, root_or_skip};

/// Blocks of the disk: 64 MiB.
const BLOCKS: u64 = 16_384;

/// A guest that reads its disk all the time, and notices what it had read becoming something else.
fn reading(pair: &Pair) -> (Guest, Status) {
    let image: PathBuf = pair.a().shared_dir().join("vm.raw");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&image).unwrap());
    for number in 0..BLOCKS {
        file.write_all(&reader::block(number)).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
    let spec = GuestSpec {
        fill_mib: 32,
        rate: 500,
        pattern: Pattern::Random,
        direct_disk: Some(image),
        ..pair.spec("vm", 256)
    };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    (guest, before)
}

#[test]
fn what_a_device_reads_into_memory_around_the_page_cache_is_not_left_behind() {
    const NAME: &str = "what_a_device_reads_into_memory_around_the_page_cache_is_not_left_behind";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let (guest, before) = reading(&pair);
    let mut hosts = [pair.a(), pair.b()];
    for _ in 0..4 {
        let report = pair.migrate("vm", hosts[0], hosts[1], &[]);
        report_adds_up(&report, &guest);
        let quiesced = report.quiesced.unwrap();
        assert!(quiesced.stops >= 2 && quiesced.longest_ms > 0.0, "{quiesced:?}");
        eprintln!("downtime {:.1} ms, {quiesced:?}", report.downtime_ms);
        pair.holds_nothing(hosts[0]);
        hosts.reverse();
    }
    guest.sound_since(&before);
}

#[test]
fn an_agent_that_is_killed_between_the_stops_of_its_scans_leaves_the_guest_running() {
    const NAME: &str = "an_agent_that_is_killed_between_the_stops_of_its_scans_leaves_the_guest_running";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let (guest, before) = reading(&pair);
    for _ in 0..5 {
        let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
        pair.a().kill_agent().unwrap();
        pair.a().start_agent().unwrap();
        until("it runs", || pair.runs_on("vm", pair.a()));
        guest.runs_on();
        pair.holds_nothing(pair.b());
    }
    let _ = guest.sane_since(&before);
}
