use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::wire::{Audited, Holds, Lacking, Missing, Neighbour, Nothing, Pages, Resume, Running};

fn part(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    [bytes, content.to_vec()].concat()
}

fn refused(reply: Reply) -> String {
    reply.bounded().expect_err("beyond its limits")
}

fn refused_of_source(request: Request) -> String {
    request.bounded().expect_err("beyond its limits")
}

#[test]
fn a_short_message_that_would_be_a_long_one_in_memory_is_not_decoded() {
    let many = part(1, &[]).repeat(MOST_PARTS + 1);
    // Reasons, disks, taps, interfaces and connections of two bytes each.
    assert!(!Reply::fits(&part(2, &many)) && !Reply::fits(&part(7, &many)));
    assert!(!Request::fits(&part(1, &many)));
    assert!(!Request::fits(&part(12, &many)));
    assert!(!Request::fits(&part(12, &part(2, &many))));
    assert!(!Request::fits(&many), "nor one of many messages");
    // What is bytes is not looked into.
    assert!(Request::fits(&part(3, &many)) && Request::fits(&part(11, &many)));
}

#[test]
fn the_largest_messages_that_make_sense_are_heard() {
    let flow = network::conntrack::wire::Flow { labels: vec![1; 16], ..Default::default() };
    let flows = network::conntrack::wire::Flows { flows: vec![flow; 4096], more: true };
    let addresses = vec!["fe80::1234:5678:9abc:def0".to_owned(); MOST_ADDRESSES];
    let netdev = "hostnet0".to_owned();
    let neighbour = Neighbour { netdev, mac: "52:54:00:aa:bb:cc".to_owned(), addresses };
    let known = Known { neighbours: vec![neighbour; 100], flows: Some(flows) };
    let argv = (0..2000).map(|n| format!("-device e1000,id=n{n}")).collect();
    let reserve = Reserve { argv, session: vec![1; 16], secret: vec![1; 192], ..Reserve::default() };
    for request in
        [Request::Known(known), Request::Reserve(reserve), Request::DeviceState(vec![0; LONGEST_PART])]
    {
        let bytes = ToDestination::from(request.clone()).encode_to_vec();
        assert!(bytes.len() < 1 << 20 && Request::fits(&bytes), "{request}: {} bytes", bytes.len());
        assert_eq!(request.clone().bounded().as_ref(), Ok(&request));
    }
    let hashes = vec![1; HOLDS_HASHES * 16];
    for reply in [
        Reply::Holds(Holds { disk: 3, first: 1 << 30, hashes, last: false }),
        Reply::Missing(Missing { first: 64, bits: vec![1; MISSING_BYTES], more: true }),
        Reply::Mismatch(Pages { pages: (0..100_000).collect() }),
        Reply::Reserved(Reserved { mirrored: (0..64).collect(), known: vec![0, 63], ..Reserved::default() }),
    ] {
        let bytes = ToSource::from(reply.clone()).encode_to_vec();
        assert!(bytes.len() < 1 << 20 && Reply::fits(&bytes), "{reply}: {} bytes", bytes.len());
        assert_eq!(reply.clone().bounded().as_ref(), Ok(&reply));
    }
}

#[test]
fn words_of_a_peer_can_be_shown() {
    let words = "\u{1b}[31mred\u{7}\r\nerror: faked\u{202e}".to_owned();
    let finding = Finding { kind: words.clone(), message: words.repeat(1000), hint: words.clone() };
    let failed = Findings { findings: vec![finding; 1000], cpu_features: vec![words], ..Findings::default() };
    let Ok(Reply::Failed(heard)) = Reply::Failed(failed).bounded() else { panic!("it is heard") };
    assert_eq!(heard.findings.len(), MOST_FINDINGS);
    let Finding { kind, message, hint } = &heard.findings[0];
    for text in [kind, message, hint, &heard.cpu_features[0]] {
        assert!(
            text.contains("red") && !text.contains(|c: char| c.is_control() || c == '\u{202e}'),
            "{text:?}"
        );
        assert!(text.chars().count() <= LONGEST_WORDS + 1);
    }
    assert!(message.ends_with('…'), "one sees that it was shortened");
}

#[test]
fn numbers_that_are_none_or_beyond_any_are_not_heard() {
    let health = |watched_ms, vcpus, progressing| {
        Reply::Health(Health {
            watched_ms,
            vcpus,
            progressing,
            status: "running".to_owned(),
            ..Health::default()
        })
    };
    assert!(health(200.0, 4, 4).bounded().is_ok());
    for watched in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 1e300] {
        assert!(refused(health(watched, 4, 4)).contains("ms"), "{watched}");
    }
    assert!(refused(health(200.0, 4, 5)).contains("5 of 4 vCPUs"));
    assert!(refused(health(200.0, u32::MAX, 5)).contains("vCPUs"));
    let audited = Audited { pages: u64::MAX, ..Audited::default() };
    assert!(refused(Reply::Audited(audited)).contains("counts up to 18446744073709551615"));
    let sums = Sums { audited_blocks: u64::MAX, ..Sums::default() };
    assert!(refused(Reply::Barrier(sums)).contains("counts"));
    let supplied = Supplied { longest_us: u64::MAX, ..Supplied::default() };
    assert!(refused(Reply::Supplied(supplied.clone())).contains("counts"));
    let running = Running { supplied: Some(supplied), lacked: false };
    assert!(refused(Reply::Running(running)).contains("counts"));
}

#[test]
fn lists_that_are_too_long_or_in_no_order_are_not_heard() {
    let reserved = |mirrored: Vec<u32>, known: Vec<u32>| {
        refused(Reply::Reserved(Reserved { mirrored, known, ..Reserved::default() }))
    };
    assert!(reserved(vec![0, 0], vec![]).contains("mirrored disks twice"));
    assert!(reserved(vec![1, 0], vec![]).contains("mirrored disks"));
    assert!(reserved(vec![3], vec![1]).contains("knows a disk that it does not mirror"));
    assert!(reserved((0..300).collect(), vec![]).contains("300 disks"));
    let holds = Holds { hashes: vec![0; HOLDS_HASHES * 16 + 16], ..Holds::default() };
    assert!(refused(Reply::Holds(holds)).contains("bytes of hashes"));
    let missing = Missing { bits: vec![0; MISSING_BYTES + 8], ..Missing::default() };
    assert!(refused(Reply::Missing(missing)).contains("bytes of bits"));
    let lacking = Lacking { paths: vec!["/k".to_owned(); 100] };
    assert!(refused(Reply::Lacking(lacking)).contains("100 files"));
    let failed = Findings { keeper: vec![0; 17], ..Findings::default() };
    assert!(refused(Reply::Failed(failed)).contains("identity"));
}

#[test]
fn what_a_source_names_is_as_long_as_names_are() {
    let reserve = |change: fn(&mut Reserve)| {
        let mut reserve = Reserve::default();
        change(&mut reserve);
        refused_of_source(Request::Reserve(reserve))
    };
    let long = || "x".repeat(1 << 19);
    assert!(reserve(|it| it.name = "x".repeat(1 << 19)).contains("a name of 524288 bytes"));
    assert!(reserve(|it| it.disks = vec![Disk::default(); 3000]).contains("3000 disks"));
    assert!(reserve(|it| it.taps = vec![Tap::default(); 3000]).contains("3000 interfaces"));
    assert!(reserve(|it| it.boot_files = vec![BootFile::default(); 99]).contains("99 files"));
    assert!(reserve(|it| it.secret = vec![0; 1 << 19]).contains("bytes of a secret"));
    assert!(
        reserve(|it| it.disks = vec![Disk { path: "/".repeat(5000), ..Disk::default() }]).contains("a path")
    );
    assert!(reserve(|it| it.abandoned = Some(vec![0; 65 * 16])).contains("1040 bytes of identities"));
    let commit = Commit { name: long(), ..Commit::default() };
    assert!(refused_of_source(Request::Commit(commit.clone())).contains("a name"));
    let resume = Resume { commit: Some(commit), secret: Vec::new() };
    assert!(refused_of_source(Request::Resume(resume)).contains("a name"));
    assert!(refused_of_source(Request::DeviceState(vec![0; LONGEST_PART + 1])).contains("bytes in a part"));
    let neighbour = Neighbour { addresses: vec![String::new(); 65], ..Neighbour::default() };
    let known = Known { neighbours: vec![neighbour], flows: None };
    assert!(refused_of_source(Request::Known(known)).contains("65 addresses"));
    assert!(Request::HoldDevices(Nothing {}).bounded().is_ok());
}

proptest! {
    #[test]
    fn whatever_bytes_come_they_are_looked_at(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = (Request::fits(&bytes), Reply::fits(&bytes));
    }
}
