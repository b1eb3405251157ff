//! A source that keeps to the protocol up to each message and then lies must not harm the destination: its own VMs run on untouched, its
//! agent's memory stays bounded, nothing of the attempt is left, and the next migration is served.

use std::thread;
use std::time::{Duration, Instant};

use super::liar::{Lies, Raw, Say, before, endpoint, field, is_asked_for, resident};
use compression::Encoding;
use end_to_end::{Guest, PATIENCE, Pair, Said, until, vmirror};
use mirror::hash::ContentHash;
use mirror::layout::{PAGE_SIZE, PageIndex};
use mirror::memory::codec::{self, Entry};
use protocol::wire::{
    Commit, Disk, Known, Neighbour, Nothing, RamBlock, Request, Reserve, Resume, Sums, Tap, ToDestination,
    ToSource,
};
use testbed::guest_spec::GuestSpec;

/// The most that the destination's agent may ever take.
const MOST_MIB: u64 = 500;
const ESCAPES: &str = "\u{1b}[31mred\u{7}\r\nfaked";

/// A lie: in the place of which request, what is said, and what the destination's log has of it.
struct Lie {
    name: &'static str,
    at: fn(&Request) -> bool,
    says: fn(Request) -> Vec<Say>,
    logged: &'static str,
}

fn is_reserve(request: &Request) -> bool {
    matches!(request, Request::Reserve(_))
}

fn is_device_state(request: &Request) -> bool {
    matches!(request, Request::DeviceState(_))
}

fn is_load(request: &Request) -> bool {
    matches!(request, Request::Load(_))
}

fn one(request: Request) -> Vec<Say> {
    vec![Say::Request(request)]
}

fn reserve(request: Request, change: impl FnOnce(&mut Reserve)) -> Vec<Say> {
    let Request::Reserve(mut reserve) = request else { panic!("{request}") };
    change(&mut reserve);
    one(Request::Reserve(reserve))
}

fn commit() -> Commit {
    Commit { session: vec![7; 16], name: "vm".to_owned(), generation: 1 }
}

const LIES: &[Lie] = &[
    Lie {
        name: "another message first",
        at: is_reserve,
        says: |_| one(Request::HoldDevices(Nothing {})),
        logged: "began with HoldDevices",
    },
    Lie {
        name: "a file that nobody wants",
        at: is_reserve,
        says: |_| one(Request::FilePart(vec![1; 200 << 10])),
        logged: "began with FilePart",
    },
    Lie {
        name: "a message of parts without number",
        at: is_reserve,
        says: |_| vec![Say::Bytes(field(1, &field(9, &[]).repeat(500_000)))],
        logged: "made of too many parts",
    },
    Lie {
        name: "connections without number",
        at: is_reserve,
        says: |_| vec![Say::Bytes(field(12, &field(2, &field(1, &[]).repeat(500_000))))],
        logged: "made of too many parts",
    },
    Lie {
        name: "no message",
        at: is_reserve,
        says: |_| vec![Say::Bytes(vec![0xff; 100_000])],
        logged: "cannot be decoded",
    },
    Lie {
        name: "a message of a kind that is none",
        at: is_reserve,
        says: |_| vec![Say::Bytes(field(900, b"new"))],
        logged: "a message of an unknown kind",
    },
    Lie {
        name: "a name that is a path",
        at: is_reserve,
        says: |request| reserve(request, |it| it.name = "../../etc/passwd".to_owned()),
        logged: "cannot name a VM",
    },
    Lie {
        name: "a name without end",
        at: is_reserve,
        says: |request| reserve(request, |it| it.name = ESCAPES.repeat(10_000)),
        logged: "tells a name of",
    },
    Lie {
        name: "an identity that is none",
        at: is_reserve,
        says: |request| reserve(request, |it| it.session = vec![1; 3]),
        logged: "session",
    },
    Lie {
        name: "streams without number",
        at: is_reserve,
        says: |request| reserve(request, |it| it.streams = u32::MAX),
        logged: "data streams",
    },
    Lie {
        name: "no stream",
        at: is_reserve,
        says: |request| reserve(request, |it| it.streams = 0),
        logged: "stream",
    },
    Lie {
        name: "more memory than there is anywhere",
        at: is_reserve,
        says: |request| {
            let ram = |id: &str| RamBlock { id: id.to_owned(), size: !4095, huge_page: 0 };
            reserve(request, |it| it.ram = vec![ram("a"), ram("b")])
        },
        logged: "RAM blocks",
    },
    Lie {
        name: "disks without number",
        at: is_reserve,
        says: |request| {
            let disk = Disk { nonce: vec![1; 16], size: 1 << 60, ..Disk::default() };
            reserve(request, |it| it.disks = vec![disk; 3000])
        },
        logged: "disks",
    },
    Lie {
        name: "interfaces without number",
        at: is_reserve,
        says: |request| reserve(request, |it| it.taps = vec![Tap::default(); 3000]),
        logged: "interfaces",
    },
    Lie {
        name: "a generation beyond which there is none",
        at: is_reserve,
        says: |request| reserve(request, |it| it.generation = u64::MAX),
        logged: "a generation",
    },
    Lie {
        name: "a key of another length",
        at: is_reserve,
        says: |request| reserve(request, |it| it.secret = vec![1; 7]),
        logged: "192",
    },
    Lie {
        name: "a hand-over of what is not here",
        at: is_reserve,
        says: |_| one(Request::Commit(commit())),
        logged: "knows nothing of that copy",
    },
    Lie {
        name: "the rest of what was not begun",
        at: is_reserve,
        says: |_| one(Request::Resume(Resume { commit: Some(commit()), secret: vec![1; 192] })),
        logged: "no complete copy",
    },
    Lie {
        name: "a reservation in a reservation",
        at: is_device_state,
        says: |_| one(Request::Reserve(Reserve::default())),
        logged: "sent Reserve out of order",
    },
    Lie {
        name: "a hand-over before there is anything to hand over",
        at: is_device_state,
        says: |_| one(Request::Commit(commit())),
        logged: "sent Commit out of order",
    },
    Lie {
        name: "a part longer than any",
        at: is_device_state,
        says: |_| one(Request::DeviceState(vec![1; 900 << 10])),
        logged: "bytes in a part",
    },
    Lie {
        name: "device state that is none",
        at: is_device_state,
        says: |_| one(Request::DeviceState(vec![0xa5; 1000])),
        logged: "Not a migration stream",
    },
    Lie {
        name: "sums of something else",
        at: is_load,
        says: |_| one(Request::Load(Sums { sums: vec![3; 64], disks: vec![0; 64], ..Sums::default() })),
        logged: "not equal to the original",
    },
    Lie {
        name: "sums without end",
        at: is_load,
        says: |_| one(Request::Load(Sums { sums: vec![3; 1 << 19], ..Sums::default() })),
        logged: "bytes of sums",
    },
];

/// A guest on each host: the one that is to move, and the one that must not notice.
fn guests(pair: &Pair) -> (Guest, Guest) {
    let spec = |name| GuestSpec { fill_mib: 16, rate: 100, ..pair.spec(name, 96) };
    (pair.run(pair.a(), "vm", &spec("vm")), pair.run(pair.b(), "other", &spec("other")))
}

fn migrate(pair: &Pair, address: &str) -> Said {
    vmirror(pair.a(), &["migrate", "vm", "--to", address, "--json", "--timeout", "20s"])
}

/// Has a liar pass a migration on, which must not come to its end, and looks at what that has done to the destination.
fn harmless(pair: &Pair, name: &str, lies: Lies, logged: &str) {
    let log = || std::fs::read_to_string(pair.b().agent_log()).unwrap();
    let (agent, so_far) = (pair.b().agent_pid().unwrap(), log().len());
    let said = before(pair, lies, |address| migrate(pair, address));
    assert!(matches!(said.code, Some(1 | 2)), "{name}: {said:?}\n{}", pair.logs());
    assert_eq!(pair.b().agent_pid(), Some(agent), "{name}");
    let said_by = Instant::now() + PATIENCE;
    while !log()[so_far..].contains(logged) {
        assert!(Instant::now() < said_by, "{name}: not {logged:?}, but {}", &log()[so_far..]);
        thread::sleep(Duration::from_millis(50));
    }
    let said = &log()[so_far..];
    assert!(said.contains("host-a"), "{name}: {said}");
    assert!(!said.contains(['\u{7}', '\r']) && !said.contains("\u{1b}[31m"), "{name}: {said:?}");
    assert!(said.len() < 1 << 20, "{name}: {} bytes of log", said.len());
    until("nothing is left of it", || pair.show("vm", pair.b()).is_none());
    assert!(pair.runs_on("vm", pair.a()) && pair.runs_on("other", pair.b()), "{name}\n{}", pair.logs());
    let (most, now) = resident(agent);
    assert!(most < MOST_MIB, "{name}: the agent took {most} MiB, and has {now} now");
    eprintln!("{name}: {most} MiB");
}

#[test]
fn a_source_that_lies_is_named_and_nothing_of_it_is_left() {
    let pair = Pair::start();
    let (guest, other) = guests(&pair);
    let (first, others) = (guest.status(), other.status());
    for Lie { name, at, says, logged } in LIES.iter().filter(|lie| is_asked_for(lie.name)) {
        harmless(&pair, name, Lies::once_for_request(*at, *says), logged);
    }
    other.sound_since(&others);
    guest.sound_since(&first);
    pair.migrate("vm", pair.a(), pair.b(), &[]);
    guest.sound_since(&first);
}

/// A frame of pages with this payload.
fn frame(entries: &[Entry], encoding: Encoding, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode_pages(&mut bytes, 1, entries, encoding, payload.len());
    [bytes, payload.to_vec()].concat()
}

fn wrong(page: u64) -> Entry {
    Entry::Plain { page: PageIndex(page), hash: ContentHash::from_bits(7) }
}

/// Begins the first stream with this, again and again, up to so many times; nothing else comes by it any more.
fn instead_of_data(frame: Vec<u8>, times: usize) -> Lies {
    let mut left = times;
    let data = move |stream: u16, bytes: &[u8]| {
        if stream != 0 {
            return bytes.to_vec();
        }
        let now = left.min(1 + (1 << 20) / frame.len());
        left -= now;
        frame.repeat(now)
    };
    Lies { data: Box::new(data), ..Lies::default() }
}

#[test]
fn data_streams_that_lie_write_nothing_and_fill_nothing() {
    let pair = Pair::start();
    let (guest, other) = guests(&pair);
    let (first, others) = (guest.status(), other.status());
    let page = vec![1; PAGE_SIZE];
    let all_wrong: Vec<Entry> = (0..256).map(wrong).collect();
    let mut absent = Vec::new();
    codec::encode_absent(&mut absent, 1, &[]);
    let mut blocks = Vec::new();
    mirror::storage::codec::encode_blocks(&mut blocks, &[], Encoding::None, 0);
    let bomb = bomb();
    for (name, bytes, times, logged) in [
        ("noise", vec![0x5a; 4096], 1, "carries what it must not"),
        ("zeros", vec![0; 4096], 1, "carries what it must not"),
        (
            "a page of another stream",
            frame(&[wrong(512)], Encoding::None, &page),
            1,
            "carries what it must not",
        ),
        (
            "a page outside of memory",
            frame(&[wrong(1 << 39)], Encoding::None, &page),
            1,
            "carries what it must not",
        ),
        ("less than was told", frame(&[wrong(1)], Encoding::Zstd, &[]), 1, "carries what it must not"),
        ("a bomb", frame(&all_wrong, Encoding::Zstd, &bomb), 1, "carries what it must not"),
        ("pages that are to be absent", absent, 1, "post-copy was not announced"),
        ("blocks of disks that there are not", blocks, 1, "of which there are none"),
    ] {
        harmless(&pair, name, instead_of_data(bytes, times), logged);
    }
    other.sound_since(&others);
    guest.sound_since(&first);
    pair.migrate("vm", pair.a(), pair.b(), &[]);
    guest.sound_since(&first);
}

/// A Zstandard frame of zeros that says to be 1 GiB long.
fn bomb() -> Vec<u8> {
    // Magic, a descriptor with a content size of 8 bytes and one segment, the size; blocks of 128 KiB of one byte each; the last.
    let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
    bytes.extend_from_slice(&(1u64 << 30).to_le_bytes());
    for block in 0..8192u32 {
        let head = u32::from(block == 8191) | 1 << 1 | (128 << 10) << 3;
        bytes.extend_from_slice(&head.to_le_bytes()[..3]);
        bytes.push(0);
    }
    bytes
}

#[test]
fn a_source_that_repeats_itself_without_end_is_not_heard_without_end() {
    let pair = Pair::start();
    let (guest, other) = guests(&pair);
    let (first, others) = (guest.status(), other.status());
    // Each message once more for as long as it is taken, after the reservation.
    let again = |request: Request, times: usize| vec![Say::Request(request); times];
    let neighbours = || {
        let addresses = vec!["10.0.0.1".to_owned(); 60];
        vec![Neighbour { netdev: "n".to_owned(), mac: String::new(), addresses }; 200]
    };
    let known = Request::Known(Known { neighbours: neighbours(), flows: None });
    let lies = Lies::once_for_request(is_device_state, move |_| again(known.clone(), 1000));
    harmless(&pair, "what is known, too early", lies, "sent Known out of order");
    let lies = Lies::once_for_request(is_device_state, move |request| {
        let hold = Say::Request(Request::HoldDevices(Nothing {}));
        [
            vec![hold],
            vec![Say::Request(request); 100],
            vec![Say::Request(Request::DeviceState(vec![0; 256 << 10])); 1100],
        ]
        .concat()
    });
    harmless(&pair, "device state without end", lies, "device state");
    let lies = Lies { connections: 60, ..Lies::default() };
    harmless(&pair, "data streams without number", lies, "opened a data stream too many");
    other.sound_since(&others);
    guest.sound_since(&first);
    pair.migrate("vm", pair.a(), pair.b(), &[]);
    guest.sound_since(&first);
}

#[test]
fn connections_that_say_nothing_or_something_else_hold_no_session() {
    let pair = Pair::start();
    let as_a = endpoint(&pair, pair.a());
    let to = pair.b().listen().to_string();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let talk = || {
        runtime.block_on(async {
            let mut open = Vec::new();
            for number in 0..40u8 {
                let (mut sender, receiver) = as_a.connect(&to).await.unwrap().split();
                if number % 2 == 0 {
                    sender.send(&Raw(vec![number; 9000])).await.unwrap();
                }
                open.push((sender, receiver));
            }
            let mut heard = 0;
            for (_, receiver) in &mut open {
                let answer =
                    tokio::time::timeout(Duration::from_secs(40), receiver.receive::<ToSource>()).await;
                heard += usize::from(answer.expect("it is ended, one way or the other").is_ok());
            }
            assert_eq!(heard, 20, "who has said something is told what was wrong with it");
            let (mut sender, mut receiver) = as_a.connect(&to).await.unwrap().split();
            sender.send(&ToDestination { request: Some(Request::Whose(commit())) }).await.unwrap();
            assert!(receiver.receive::<ToSource>().await.unwrap().reply.is_some(), "others are served");
        });
    };
    pair.a().on_network(talk).unwrap();
    pair.holds_nothing(pair.b());
}
