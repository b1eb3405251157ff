//! A destination that keeps to the protocol up to each message and then lies must not harm the source: its VM runs on untouched, its
//! agent's memory stays bounded and serves the next migration, and the operator is told who did what.

use super::liar::{Lies, Say, before, field, is_asked_for, resident};
use end_to_end::{Guest, Pair, Said, image, vmirror, write_noise};
use protocol::wire::{
    Audited, Belongs, Finding, Findings, Health, Holds, Lacking, Missing, Nothing, Pages, Reply, Request,
    Reserved, Running, Sums, Supplied, WrongBlocks,
};
use session::Outcome;
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, TestDisk};
use testbed::root_or_skip;

/// The most that the source's agent may ever take: several times what a migration of such a VM takes, and a fraction of what is sent.
const MOST_MIB: u64 = 400;
/// Bytes of the guest's disk, where it has one.
const DISK: u64 = 8 << 20;
/// What would be shown as red, and a line that was never said.
const ESCAPES: &str = "\u{1b}[31mred\u{7}\r\nerror: faked\u{202e}";

/// A lie: in the place of which reply, what is said, and what the operator is told of it.
struct Lie {
    name: &'static str,
    at: fn(&Reply) -> bool,
    says: fn(Reply) -> Vec<Say>,
    told: &'static [&'static str],
}

fn is_reserved(reply: &Reply) -> bool {
    matches!(reply, Reply::Reserved(_))
}

fn is_barrier(reply: &Reply) -> bool {
    matches!(reply, Reply::Barrier(_))
}

fn is_ready(reply: &Reply) -> bool {
    matches!(reply, Reply::Ready(_))
}

fn barrier(reply: &Reply) -> Sums {
    match reply {
        Reply::Barrier(sums) => sums.clone(),
        other => panic!("{other}"),
    }
}

fn one(reply: Reply) -> Vec<Say> {
    vec![Say::Reply(reply)]
}

fn reserved(change: impl FnOnce(&mut Reserved)) -> Vec<Say> {
    let mut reserved = Reserved::default();
    change(&mut reserved);
    one(Reply::Reserved(reserved))
}

fn findings(count: usize, text: &str) -> Findings {
    let finding = Finding { kind: text.to_owned(), message: text.to_owned(), hint: text.to_owned() };
    Findings { findings: vec![finding; count], ..Findings::default() }
}

/// Before anything is sent, while the guest runs, and while it is paused: each message out of place or out of bounds.
const LIES: &[Lie] = &[
    Lie {
        name: "another message in the place of a reservation",
        at: is_reserved,
        says: |_| one(Reply::Ready(Nothing {})),
        told: &["answered a reservation with Ready"],
    },
    Lie {
        name: "a disk that there is not",
        at: is_reserved,
        says: |_| reserved(|it| it.mirrored = vec![7]),
        told: &["wants a disk that there is not"],
    },
    Lie {
        name: "the same disk again and again",
        at: is_reserved,
        says: |_| reserved(|it| it.mirrored = vec![0; 200]),
        told: &["tells mirrored disks twice"],
    },
    Lie {
        name: "an index beyond any list",
        at: is_reserved,
        says: |_| reserved(|it| it.known = vec![u32::MAX]),
        told: &["knows a disk that it does not mirror"],
    },
    Lie {
        name: "a file of the source's",
        at: is_reserved,
        says: |_| one(Reply::Lacking(Lacking { paths: vec!["/etc/shadow".to_owned()] })),
        told: &["wants a file that was not announced"],
    },
    Lie {
        name: "that it is worked on, again and again, and then whose the VM is",
        at: is_reserved,
        says: |_| {
            let working = vec![Say::Reply(Reply::Working(Nothing {})); 3000];
            [working, one(Reply::Belongs(Belongs { owner: 77 }))].concat()
        },
        told: &["answered a reservation with Belongs"],
    },
    Lie {
        name: "what no image can hold",
        at: is_reserved,
        says: |reply| {
            let beyond = Holds { disk: 9, first: u64::MAX, hashes: vec![7; 320], last: false };
            vec![Say::Reply(reply), Say::Reply(Reply::Holds(beyond))]
        },
        told: &["said Holds instead of reaching barrier"],
    },
    Lie {
        name: "a message of parts without number",
        at: is_reserved,
        says: |_| vec![Say::Bytes(field(2, &field(1, &[]).repeat(500_000)))],
        told: &["made of too many parts"],
    },
    Lie {
        name: "no message",
        at: is_reserved,
        says: |_| vec![Say::Bytes(vec![0xff; 1000])],
        told: &["cannot be decoded"],
    },
    Lie {
        name: "a message of a kind that is none",
        at: is_barrier,
        says: |_| vec![Say::Bytes(field(900, b"new"))],
        told: &["a message of an unknown kind"],
    },
    Lie {
        name: "another barrier",
        at: is_barrier,
        says: |reply| one(Reply::Barrier(Sums { barrier: 999, ..barrier(&reply) })),
        told: &["said Barrier instead of reaching barrier"],
    },
    Lie {
        name: "sums of another number of streams",
        at: is_barrier,
        says: |reply| one(Reply::Barrier(Sums { sums: vec![1; 7], ..barrier(&reply) })),
        told: &["sums for another number of streams"],
    },
    Lie {
        name: "more sums than streams",
        at: is_barrier,
        says: |reply| one(Reply::Barrier(Sums { sums: vec![1; 1 << 19], ..barrier(&reply) })),
        told: &["bytes of sums"],
    },
    Lie {
        name: "a count beyond any",
        at: is_barrier,
        says: |reply| one(Reply::Barrier(Sums { audited: u64::MAX, ..barrier(&reply) })),
        told: &["counts up to 18446744073709551615"],
    },
    Lie {
        name: "blocks of disks that there are not",
        at: is_barrier,
        says: |reply| {
            let wrong = WrongBlocks { blocks: vec![u64::MAX; 8], checked: false };
            vec![Say::Reply(Reply::WrongBlocks(wrong)), Say::Reply(reply)]
        },
        told: &["finds blocks wrong that there are not"],
    },
    Lie {
        name: "pages that there are not",
        at: is_barrier,
        says: |reply| vec![mismatch(&[0, u64::MAX]), Say::Reply(reply)],
        told: &["finds pages wrong that there are not"],
    },
    Lie {
        name: "pages without end",
        at: is_barrier,
        says: |_| {
            let pages: Vec<u64> = (0..500_000).map(|page| page % 100).collect();
            vec![Say::Reply(Reply::Mismatch(Pages { pages })); 20]
        },
        told: &["says more than"],
    },
    Lie {
        name: "thousands of large replies",
        at: is_barrier,
        says: |_| {
            let hashes = vec![7; 500 << 10];
            vec![Say::Reply(Reply::Holds(Holds { disk: 0, first: 0, hashes, last: false })); 150]
        },
        told: &["the destination sa"],
    },
    Lie {
        name: "words of a post-copy that is none",
        at: is_barrier,
        says: |_| one(Reply::Missing(Missing { first: 1, bits: vec![1; 9], more: true })),
        told: &["said Missing instead of reaching barrier"],
    },
    Lie {
        name: "that nothing of the copy is left, unasked",
        at: is_barrier,
        says: |_| one(Reply::Cancelled(Nothing {})),
        told: &["said Cancelled instead of reaching barrier"],
    },
    Lie {
        name: "that QEMU waits for pages, unasked",
        at: is_barrier,
        says: |_| one(Reply::PostCopyReady(Nothing {})),
        told: &["said PostCopyReady instead of reaching barrier"],
    },
    Lie {
        name: "pages that a guest waits for which runs here",
        at: is_barrier,
        says: |_| one(Reply::Wanted(Pages { pages: vec![0, u64::MAX] })),
        told: &["said Wanted instead of reaching barrier"],
    },
    Lie {
        name: "a failure with escapes in it",
        at: is_barrier,
        says: |_| one(Reply::Failed(findings(100, ESCAPES))),
        told: &["red"],
    },
    Lie {
        name: "a failure without a reason",
        at: is_barrier,
        says: |_| one(Reply::Failed(Findings::default())),
        told: &["the destination failed"],
    },
    Lie {
        name: "an audit that nobody asked for, in the pause",
        at: is_ready,
        says: |_| {
            let most = u64::MAX;
            one(Reply::Audited(Audited {
                pages: most,
                differing: most,
                blocks: most,
                differing_blocks: most,
            }))
        },
        told: &["counts up to"],
    },
    Lie {
        name: "that it runs, before it was handed over",
        at: is_ready,
        says: |_| one(Reply::Running(Running::default())),
        told: &["said Running instead of being ready"],
    },
];

/// While the guest is paused: each said at the first such reply after HoldDevices.
const LIES_IN_THE_PAUSE: &[Lie] = &[
    Lie {
        name: "that it runs, in the pause",
        at: is_barrier,
        says: |_| one(Reply::Running(Running::default())),
        told: &["said Running instead of reaching barrier"],
    },
    Lie {
        name: "pages that are as they should be, in the pause",
        at: is_barrier,
        says: |reply| vec![mismatch(&[0, 1]), Say::Reply(reply)],
        told: &["not equal to the original"],
    },
    Lie {
        name: "pages that there are not, in the pause",
        at: is_barrier,
        says: |reply| vec![mismatch(&[1 << 39]), Say::Reply(reply)],
        told: &["finds pages wrong that there are not"],
    },
    Lie {
        name: "that nothing is missing, in the pause",
        at: is_ready,
        says: |_| one(Reply::Supplied(Supplied::default())),
        told: &["said Supplied instead of being ready"],
    },
    Lie {
        name: "that a network has ended which was not begun, in the pause",
        at: is_ready,
        says: |_| one(Reply::ForwardingEnded(Nothing {})),
        told: &["said ForwardingEnded instead of being ready"],
    },
];

/// About what it was asked to read back, of a guest that is paused.
const LIES_OF_AN_AUDIT: &[Lie] = &[
    Lie {
        name: "an audit of nothing",
        at: is_audited,
        says: |_| one(Reply::Audited(Audited::default())),
        told: &["was to audit ", " pages and has audited 0"],
    },
    Lie {
        name: "an audit of more than there is",
        at: is_audited,
        says: |_| one(Reply::Audited(Audited { pages: 1 << 50, ..Audited::default() })),
        told: &["has audited more than there is"],
    },
    Lie {
        name: "an audit that has found something and does not say what",
        at: is_audited,
        says: |reply| {
            let Reply::Audited(audited) = reply else { panic!("{reply}") };
            one(Reply::Audited(Audited { differing: 1, ..audited }))
        },
        told: &["not equal to the original"],
    },
];

/// No word any more holds nobody beyond the timeout.
const SILENCE: &[Lie] = &[Lie { name: "silence", at: is_barrier, says: |_| Vec::new(), told: &["5s"] }];

/// About disks that are mirrored.
const LIES_OF_DISKS: &[Lie] = &[
    Lie {
        name: "hashes of blocks that there are not",
        at: is_reserved,
        says: |reply| known(reply, Holds { disk: 0, first: u64::MAX, hashes: vec![7; 16], last: false }),
        told: &["says what no disk can hold"],
    },
    Lie {
        name: "hashes of more blocks than there are",
        at: is_reserved,
        says: |reply| known(reply, Holds { disk: 0, first: 0, hashes: vec![7; 16 * 1000], last: false }),
        told: &["says more than once what its images hold"],
    },
    Lie {
        name: "another word in the place of hashes",
        at: is_reserved,
        says: |reply| {
            [known(reply, Holds::default())[..1].to_vec(), one(Reply::Working(Nothing {}))].concat()
        },
        told: &["said Working instead of what its images hold"],
    },
];

/// The same, in the pause.
const LIES_OF_DISKS_IN_THE_PAUSE: &[Lie] = &[Lie {
    name: "blocks that are as they should be, in the pause",
    at: is_barrier,
    says: |reply| vec![wrong_blocks(&[0, 1]), Say::Reply(reply)],
    told: &["not equal to the original"],
}];

fn mismatch(pages: &[u64]) -> Say {
    Say::Reply(Reply::Mismatch(Pages { pages: pages.to_vec() }))
}

fn wrong_blocks(blocks: &[u64]) -> Say {
    Say::Reply(Reply::WrongBlocks(WrongBlocks { blocks: blocks.to_vec(), checked: false }))
}

fn is_audited(reply: &Reply) -> bool {
    matches!(reply, Reply::Audited(_))
}

/// That the first disk was there before, and holds that.
fn known(reply: Reply, holds: Holds) -> Vec<Say> {
    let Reply::Reserved(reserved) = reply else { panic!("{reply}") };
    [one(Reply::Reserved(Reserved { known: vec![0], ..reserved })), one(Reply::Holds(holds))].concat()
}

fn guest(pair: &Pair) -> Guest {
    pair.run(pair.a(), "vm", &spec(pair))
}

fn spec(pair: &Pair) -> GuestSpec {
    GuestSpec { fill_mib: 16, rate: 100, ..pair.spec("vm", 96) }
}

/// A guest with a disk of its own.
fn guest_with_disk(pair: &Pair) -> Guest {
    let path = image(pair.a(), "d.raw");
    disk::create(&path, Format::Raw, DISK).unwrap();
    write_noise(&path, 0, DISK / 4);
    let disk = TestDisk::new(pair.a().local_dir().join("d.raw"), Format::Raw, "d");
    pair.run(pair.a(), "vm", &GuestSpec { disks: vec![disk], ..spec(pair) })
}

fn migrate(pair: &Pair, address: &str, options: &[&str]) -> Said {
    vmirror(pair.a(), &[&["migrate", "vm", "--to", address], options].concat())
}

fn unshowable(text: &str) -> Option<char> {
    text.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}')
}

/// Has each of these told in a migration of its own, which must fail and leave the VM where it runs.
fn untouched(pair: &Pair, lies: &[Lie], tell: fn(&Lie) -> Lies, options: &[&str]) {
    let agent = pair.a().agent_pid().unwrap();
    for lie in lies.iter().filter(|lie| is_asked_for(lie.name)) {
        let Lie { name, told, .. } = lie;
        let options = [&["--json"], options].concat();
        let said = before(pair, tell(lie), |address| migrate(pair, address, &options));
        assert_eq!(said.code, Some(1), "{name}: {said:?}\n{}", pair.logs());
        let report = said.report();
        assert_eq!((report.outcome, &*report.destination), (Outcome::Failed, "host-b"), "{name}: {report:?}");
        let Finding { kind, message, .. } = report.error.unwrap().finding.into();
        assert!(told.iter().all(|words| message.contains(words)), "{name}: {message}");
        assert!(kind != "protocol" || message.starts_with("host-b: the destination "), "{name}: {message}");
        assert_eq!(unshowable(&message), None, "{name}: {message:?}");
        assert!(message.len() < 10_000, "{name}: {} bytes", message.len());
        assert!(pair.runs_on("vm", pair.a()), "{name}: the VM does not run\n{}", pair.logs());
        let (most, now) = resident(agent);
        assert!(most < MOST_MIB, "{name}: the agent took {most} MiB, and has {now} now");
        eprintln!("{name}: {message} ({most} MiB)");
    }
}

fn once(lie: &Lie) -> Lies {
    Lies::once_for_reply(lie.at, lie.says)
}

fn in_the_pause(lie: &Lie) -> Lies {
    Lies::once_for_reply_after(|request| matches!(request, Request::HoldDevices(_)), lie.at, lie.says)
}

#[test]
fn a_destination_that_lies_is_named_and_the_vm_runs_on() {
    let has_disks = root_or_skip("lies about disks: hosts with storage of their own");
    let pair = if has_disks { Pair::with_local_disks() } else { Pair::start() };
    let guest = if has_disks { guest_with_disk(&pair) } else { guest(&pair) };
    let first = guest.status();
    untouched(&pair, LIES, once, &[]);
    untouched(&pair, LIES_IN_THE_PAUSE, in_the_pause, &[]);
    untouched(&pair, LIES_OF_AN_AUDIT, once, &["--verify", "strict"]);
    untouched(&pair, SILENCE, once, &["--timeout", "5s"]);
    if has_disks {
        untouched(&pair, LIES_OF_DISKS, once, &[]);
        untouched(&pair, LIES_OF_DISKS_IN_THE_PAUSE, in_the_pause, &[]);
    }
    guest.sound_since(&first);
    pair.holds_nothing(pair.b());
    // Whoever was lied to serves the next one; and once the VM was handed over no word that it is not there is followed.
    let lies = Lies::once_for_reply(
        |reply| matches!(reply, Reply::Running(_)),
        |_| one(Reply::Cancelled(Nothing {})),
    );
    let said = before(&pair, lies, |address| migrate(&pair, address, &["--json"]));
    assert_eq!(said.code, Some(0), "{said:?}\n{}", pair.logs());
    assert!(pair.runs_on("vm", pair.b()) && pair.show("vm", pair.a()).is_none(), "{}", pair.logs());
    guest.sound_since(&first);
}

#[test]
fn reasons_of_a_destination_cannot_write_to_a_terminal_what_they_like() {
    let pair = Pair::start();
    let _guest = guest(&pair);
    let refuse = |_| one(Reply::Refused(findings(300, ESCAPES)));
    let lies = Lies::once_for_reply(is_reserved, refuse);
    let said = before(&pair, lies, |address| migrate(&pair, address, &["--quiet"]));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("red"), "the reason is told: {said:?}");
    assert_eq!(unshowable(&said.stderr), None, "{said:?}");
    assert!(!said.stderr.lines().any(|line| line.starts_with("error: faked")), "{said:?}");
    assert!(pair.runs_on("vm", pair.a()));
}

#[test]
fn numbers_of_a_destination_that_are_none_do_not_spoil_the_report() {
    let pair = Pair::start();
    let guest = guest(&pair);
    let first = guest.status();
    let lie = |_| {
        let problems = findings(3, ESCAPES).findings;
        let health = Health {
            watched_ms: f64::NAN,
            vcpus: u32::MAX,
            progressing: 7,
            status: ESCAPES.to_owned(),
            problems,
            frames_dropped: u64::MAX,
        };
        one(Reply::Health(health))
    };
    let lies = Lies::once_for_reply(|reply| matches!(reply, Reply::Health(_)), lie);
    let said = before(&pair, lies, |address| migrate(&pair, address, &["--json"]));
    // It runs there; that nobody knows how it does is worth no alarm.
    assert_eq!(said.code, Some(0), "{said:?}\n{}", pair.logs());
    let report = said.report();
    assert!(report.health.is_none() && report.network.frames_dropped < 1 << 40, "{report:?}");
    let again = vmirror(pair.a(), &["report", &report.id, "--json"]).done().report();
    assert_eq!(again, report);
    assert!(pair.runs_on("vm", pair.b()));
    guest.sound_since(&first);
}
