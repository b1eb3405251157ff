//! A limit of bandwidth must not outlive its reason, and mirrors that share one must not starve each other.

use std::time::{Duration, Instant};

use end_to_end::{PATIENCE, Pair, report_adds_up, vmirror};
use testbed::Testbed;
use testbed::guest_spec::{Content, GuestSpec, Pattern};

/// What no compression makes smaller, so that a mirror's length is known.
fn noise(pair: &Pair, name: &str) -> GuestSpec {
    GuestSpec {
        fill_mib: 64,
        content: Some(Content::Noise),
        pattern: Pattern::Random,
        ..pair.spec(name, 160)
    }
}

#[test]
fn a_migration_that_a_limit_holds_up_is_let_go_by_asking_again() {
    let pair = Pair::start();
    let guest = pair.run(pair.a(), "vm", &noise(&pair, "vm"));
    let before = guest.status();
    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "64KiB/s"]);
    migration.shows("pages to flow", |progress| progress["wire_bytes"].as_u64() > Some(0));

    // What is no change of the limit of this migration is refused, and changes nothing.
    let elsewhere = "127.0.0.1:1";
    let to = pair.b().listen().to_string();
    for (to, options, words) in [
        (elsewhere, &["--bandwidth", "unlimited"][..], "is being migrated to"),
        (&to, &[], "only --bandwidth can be changed"),
        (&to, &["--bandwidth", "unlimited", "--streams", "1"], "only --bandwidth can be changed"),
    ] {
        let arguments = [&["migrate", "vm", "--to", to, "--json"], options].concat();
        let error = vmirror(pair.a(), &arguments).refusal();
        assert_eq!(error["kind"], "in-migration");
        assert!(error.to_string().contains(words), "{error}");
    }
    let low = vmirror(pair.a(), &["migrate", "vm", "--to", &to, "--json", "--bandwidth", "1"]);
    assert_eq!(low.refusal()["kind"], "bad-option");
    assert!(!migration.has_ended());

    let changed = pair.try_migrate("vm", pair.a(), pair.b(), &["--bandwidth", "unlimited"]).done().json();
    assert_eq!((&changed["vm"], &changed["bandwidth"]), (&"vm".into(), &serde_json::Value::Null));
    let report = migration.ended().done().report();
    assert_eq!(changed["id"], report.id.as_str());
    report_adds_up(&report, &guest);
    // At the limit it began with it would have taken a quarter of an hour: longer than anything is waited for.
    assert!(report.memory.wire_bytes > 64 << 20, "{:?}", report.memory);
    guest.sound_since(&before);
}

#[test]
fn mirrors_that_share_a_limit_get_equal_parts_of_it_however_many_streams_they_have() {
    const LIMIT: f64 = (12 << 20) as f64;
    let testbed =
        if testbed::root_or_skip("namespaces") { Testbed::new() } else { Testbed::rootless() }.unwrap();
    testbed.a().configure(|config| drop(config.insert("bandwidth".into(), "12MiB/s".into()))).unwrap();
    let pair = Pair::of(testbed);
    let names = ["one", "four"];
    let guests = names.map(|name| pair.run(pair.a(), name, &noise(&pair, name)));
    let before = guests.each_ref().map(end_to_end::Guest::status);

    let start = Instant::now();
    let [one, four] = [("one", "1"), ("four", "4")].map(|(name, streams)| {
        pair.begin(name, pair.a(), pair.b(), &["--streams", streams, "--compress", "off"])
    });
    // From when both send until one has sent so much: in between both always have something to send.
    let sent = || {
        let sessions = vmirror(pair.a(), &["status", "--json"]).done().json();
        names.map(|name| {
            let of = sessions.as_array().unwrap().iter().find(|session| session["vm"] == name);
            of.and_then(|session| session["wire_bytes"].as_f64()).unwrap_or_default()
        })
    };
    let when = |what: &str, holds: &dyn Fn([f64; 2]) -> bool| loop {
        let now = sent();
        if holds(now) {
            return now;
        }
        assert!(start.elapsed() < PATIENCE, "waited for {what}: {now:?}\n{}", pair.logs());
        std::thread::sleep(Duration::from_millis(20));
    };
    const MIB: f64 = (1 << 20) as f64;
    let first = when("both to send", &|now| now.iter().all(|sent| *sent > MIB));
    let last = when("one to be half-way", &|now| now.iter().any(|sent| *sent > 36.0 * MIB));
    let parts = [0, 1].map(|which| last[which] - first[which]);
    let ratio = parts[0] / parts[1];
    assert!((0.8..1.25).contains(&ratio), "{parts:?} of {first:?} to {last:?}");

    let reports = [one, four].map(|migration| migration.ended().done().report());
    let took = start.elapsed().as_secs_f64();
    for (guest, (report, before)) in guests.iter().zip(reports.iter().zip(&before)) {
        report_adds_up(report, guest);
        guest.sound_since(before);
    }
    let sent: u64 = reports.iter().map(|report| report.memory.wire_bytes).sum();
    assert!(sent as f64 / took <= LIMIT * 1.01, "{sent} bytes in {took} s");
}
