//! What the fuzz targets in `fuzz/` are given of this crate beyond its interface. Compiled for nobody else.

use std::net::{Ipv4Addr, SocketAddr};

use prost::Message as _;

use crate::reservation::Request as Understood;
use protocol::wire::{Known, Reply, Request, ToDestination, ToSource};

/// Understands what a source says.
///
/// # Panics
/// If one that was understood is said in another way, or what is kept of it is beyond a limit.
pub fn request(bytes: &[u8]) {
    if !Request::fits(bytes) {
        return;
    }
    let Ok(message) = ToDestination::decode(bytes) else { return };
    let again = message.encode_to_vec();
    let second = ToDestination::decode(&again[..]).expect("our own");
    assert_eq!(second.encode_to_vec(), again);
    let Some(Ok(request)) = message.request.map(Request::bounded) else { return };
    assert!(request.vm().len() <= 256);
    match request {
        Request::Reserve(reserve) => {
            let (streams, size) = (reserve.streams, reserve.ram.iter().map(|block| block.size).max());
            let Ok(understood) = Understood::decode(reserve, &peer()) else { return };
            assert!(u32::from(understood.layout.streams()) == streams && streams <= 16);
            assert!(size.is_some_and(|size| size <= 1 << 44) && understood.layout.blocks().len() <= 256);
            let name = understood.name.to_string();
            assert!(!name.contains(['/', '\0']) && !name.starts_with('.') && name.len() <= 48, "{name:?}");
        }
        Request::Known(Known { flows: Some(flows), .. }) => {
            let mut taken = Vec::new();
            let _ = flows.add_to(&mut taken);
            assert!(taken.len() <= network::conntrack::MAX_FLOWS);
        }
        _ => {}
    }
}

/// Understands what a destination says.
///
/// # Panics
/// If one that was understood is said in another way, or names what is beyond the layout.
pub fn reply(bytes: &[u8]) {
    if !Reply::fits(bytes) {
        return;
    }
    let Ok(message) = ToSource::decode(bytes) else { return };
    let again = message.encode_to_vec();
    let second = ToSource::decode(&again[..]).expect("our own");
    // As bytes: a number that is none is not equal to itself.
    assert_eq!(second.encode_to_vec(), again);
    let Some(Ok(reply)) = message.reply.map(Reply::bounded) else { return };
    // What it takes is in proportion to what has come.
    assert!(reply.weight() <= 4096 + bytes.len() * 40, "{} bytes of {}", reply.weight(), bytes.len());
    if let Reply::Failed(findings) | Reply::Refused(findings) = &reply {
        let shown = |text: &String| !text.contains(char::is_control) && text.chars().count() <= 4097;
        let findings = &findings.findings;
        assert!(findings.iter().all(|it| shown(&it.kind) && shown(&it.message) && shown(&it.hint)));
    }
    match reply {
        Reply::Health(health) => assert!(health.watched_ms >= 0.0 && health.progressing <= health.vcpus),
        Reply::Barrier(sums) => {
            assert!(sums.decode(3).is_none_or(|sums| sums.len() == 3));
            assert!(sums.decode_disks(3).is_none_or(|sums| sums.len() == 3));
        }
        Reply::Missing(missing) => {
            let mut pages = mirror::memory::pages::PageSet::new(1000);
            let _ = missing.add_to(&mut pages);
            assert!(pages.len() <= 1000);
        }
        Reply::Holds(holds) => {
            let hashes = holds.decode();
            assert!(hashes.is_none_or(|hashes| hashes.len() * 16 == holds.hashes.len()));
        }
        _ => {}
    }
}

fn peer() -> link::Peer {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 7600));
    link::Peer { name: "host-a".into(), address, local: address }
}
