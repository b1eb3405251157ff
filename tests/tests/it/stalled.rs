//! A destination that is there and does not do its part must not hold a migration up for ever, nor the guest.

use std::io::Read as _;
use std::sync::mpsc;
use std::thread;

use end_to_end::{Guest, Pair, Said, report_adds_up};
use link::{DataReceiver, Deadlines, Endpoint, Identity, Incoming, Listener};
use protocol::wire::{Nothing, Pages, Reply, Request, Reserved, ToDestination, ToSource};
use session::Outcome;
use testbed::fault;
use testbed::guest_spec::{Content, GuestSpec};
use tokio::sync::oneshot;

/// What a destination does with a machine that it has promised to take.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// It never reads a data stream.
    ReadsNothing,
    /// It reads them all, and never acknowledges anything.
    AcknowledgesNothing,
    /// It asks for pages again that were never sent, without end.
    AsksWithoutEnd,
}

/// Does something while such a destination, with the certificate of host B, is in the place of its agent.
fn with_impostor<T>(pair: &Pair, manner: Manner, act: impl FnOnce() -> T) -> T {
    let host = pair.b();
    host.stop_agent().unwrap();
    let certificates = pair.testbed().certificates();
    let file = |part: &str| certificates.join(format!("{}{part}.pem", host.name()));
    let identity = Identity::load(&certificates.join("ca.pem"), &file(""), &file("-key")).unwrap();
    let endpoint = Endpoint::new(&identity, Deadlines::default()).unwrap();
    let (listens, listening) = mpsc::channel();
    thread::scope(|scope| {
        // It ends when this is dropped, however that comes.
        let (_ends, end) = oneshot::channel::<()>();
        scope.spawn(move || {
            let serving = host.on_network(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let listener = Listener::bind(&endpoint, &host.listen().to_string()).await.unwrap();
                    listens.send(()).unwrap();
                    tokio::select! {
                        () = serve(listener, manner) => {}
                        _ = end => {}
                    }
                });
            });
            serving.unwrap();
        });
        listening.recv().unwrap();
        act()
    })
}

async fn serve(listener: Listener, manner: Manner) {
    let mut streams: Vec<DataReceiver> = Vec::new();
    loop {
        match listener.accept().await {
            Ok(Incoming::Control(control, _)) => {
                tokio::spawn(async move {
                    let (mut out, mut from) = control.split();
                    while let Ok(ToDestination { request: Some(request) }) = from.receive().await {
                        let reply = match request {
                            Request::Reserve(_) => Reply::Reserved(Reserved::default()),
                            Request::Cancel(_) => Reply::Cancelled(Nothing {}),
                            _ => continue,
                        };
                        if out.send(&ToSource::from(reply)).await.is_err() {
                            return;
                        }
                        if matches!(manner, Manner::AsksWithoutEnd) {
                            let ask = || ToSource::from(Reply::Mismatch(Pages { pages: vec![1; 10_000] }));
                            while out.send(&ask()).await.is_ok() {}
                            return;
                        }
                    }
                });
            }
            Ok(Incoming::Data(mut stream, ..)) => match manner {
                Manner::ReadsNothing => streams.push(stream),
                Manner::AcknowledgesNothing | Manner::AsksWithoutEnd => {
                    thread::spawn(move || {
                        let mut buffer = vec![0; 1 << 20];
                        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
                    });
                }
            },
            Err(_) => return,
        }
    }
}

/// More than what the network's buffers take.
fn guest(pair: &Pair) -> Guest {
    let spec = GuestSpec { fill_mib: 96, rate: 200, content: Some(Content::Noise), ..pair.spec("vm", 192) };
    pair.run(pair.a(), "vm", &spec)
}

/// Asserts that it failed, and says as what kind.
fn failed(said: &Said) -> String {
    assert_eq!(said.code, Some(1), "{said:?}");
    let report = said.report();
    assert_eq!(report.outcome, Outcome::Failed, "{report:#?}");
    report.error.unwrap().finding.kind
}

#[test]
fn a_destination_that_does_not_do_its_part_is_not_waited_for_for_ever() {
    let pair = Pair::start();
    let guest = guest(&pair);
    let before = guest.status();
    let held = pair.a().inventory().unwrap();
    for (manner, options, kinds) in [
        (Manner::ReadsNothing, &[][..], &["mirror"][..]),
        (Manner::ReadsNothing, &["--timeout", "5s"], &["timeout"]),
        (Manner::AcknowledgesNothing, &["--timeout", "5s"], &["timeout"]),
        (Manner::AsksWithoutEnd, &[], &["protocol", "link"]),
    ] {
        let said = with_impostor(&pair, manner, || pair.try_migrate("vm", pair.a(), pair.b(), options));
        let kind = failed(&said);
        assert!(kinds.contains(&&*kind), "{manner:?}: {said:?}\n{}", pair.logs());
        guest.runs_on();
        assert!(pair.runs_on("vm", pair.a()));
        pair.holds_but_for_growth(pair.a(), &held);
    }
    pair.b().start_agent().unwrap();
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    guest.sound_since(&before);
}

#[test]
fn a_destination_agent_that_hangs_is_given_up_and_takes_the_guest_when_it_is_back() {
    let pair = Pair::start();
    let guest = guest(&pair);
    let before = guest.status();
    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "4MiB/s"]);
    migration.shows("pages to flow", |progress| progress["wire_bytes"].as_u64() > Some(1 << 20));
    let hangs = fault::pause(pair.b().agent_pid().unwrap());
    let said = migration.ended();
    assert_eq!(failed(&said), "link", "{said:?}\n{}", pair.logs());
    guest.runs_on();
    drop(hangs);
    pair.holds_nothing(pair.b());
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    guest.sound_since(&before);
}
