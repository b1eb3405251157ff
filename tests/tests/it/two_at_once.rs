//! Guests that move at the same time must not get in each other's way.

use end_to_end::{Pair, report_adds_up};
use testbed::guest_spec::{GuestSpec, Pattern};

#[test]
fn two_guests_that_move_at_once_both_arrive_whole() {
    let pair = Pair::start();
    let guest = |name: &str, host| {
        let spec = GuestSpec { rate: 1000, pattern: Pattern::Random, ..pair.spec(name, 192) };
        let guest = pair.run(host, name, &spec);
        let before = guest.status();
        (guest, before)
    };
    // One each way, and one more.
    let guests = [("here", pair.a()), ("there", pair.b()), ("too", pair.a())]
        .map(|(name, from)| (guest(name, from), from));
    let other = |host: &testbed::Host| if host.name() == pair.a().name() { pair.b() } else { pair.a() };
    std::thread::scope(|scope| {
        for ((guest, _), from) in &guests {
            let (pair, other) = (&pair, &other);
            scope.spawn(move || report_adds_up(&pair.migrate(&guest.name, from, other(from), &[]), guest));
        }
    });
    for ((guest, before), from) in &guests {
        assert!(pair.runs_on(&guest.name, other(from)) && pair.show(&guest.name, from).is_none());
        guest.sound_since(before);
    }
}

#[test]
fn the_same_memory_is_not_promised_to_two_guests() {
    let pair = Pair::start();
    let one = pair.run(pair.a(), "one", &pair.spec("one", 192));
    let two = pair.run(pair.a(), "two", &pair.spec("two", 192));
    let before = [one.status(), two.status()];
    pair.b()
        .configure(|config| config["allow"]["max_memory"] = toml::Value::String("256MiB".into()))
        .unwrap();
    pair.b().stop_agent().unwrap();
    pair.b().start_agent().unwrap();

    let said = std::thread::scope(|scope| {
        let moves = ["one", "two"].map(|name| {
            let pair = &pair;
            scope.spawn(move || pair.try_migrate(name, pair.a(), pair.b(), &[]))
        });
        moves.map(|moved| moved.join().unwrap())
    });
    let mut codes = said.each_ref().map(|said| said.code);
    codes.sort();
    assert_eq!(codes, [Some(0), Some(2)], "{said:?}");
    let refused = said.iter().find(|said| said.code == Some(2)).unwrap().report();
    assert_eq!(refused.error.unwrap().finding.kind, "memory-limit");
    for (guest, before) in [one, two].iter().zip(&before) {
        let places = [pair.a(), pair.b()].map(|host| pair.runs_on(&guest.name, host));
        assert_eq!(places.iter().filter(|&&runs| runs).count(), 1, "{places:?}");
        guest.sound_since(before);
    }
}
