//! Writes what the corpora of these targets begin with: what a firewall knows.

use fuzzing::Seeds;
use network::conntrack::wire::{Flow, Flows, Icmp, Ports, Tcp, Tuple};
use prost::Message as _;

fn connections() -> Flows {
    let tuple = |source: [u8; 4], destination: [u8; 4]| Tuple {
        source: source.to_vec(),
        destination: destination.to_vec(),
        protocol: 6,
        ports: Some(Ports { source: 40_000, destination: 80 }),
        ..Tuple::default()
    };
    let (there, back) = (tuple([10, 0, 0, 2], [10, 0, 0, 3]), tuple([10, 0, 0, 3], [10, 0, 0, 2]));
    let tcp = Tcp { state: 3, original_flags: 3, reply_flags: 3, original_scale: 7, reply_scale: 14 };
    let ping = Tuple {
        source: vec![0xfe; 16],
        destination: vec![0xfd; 16],
        protocol: 58,
        icmp: Some(Icmp { id: 7, kind: 128, code: 0 }),
        zone: Some(3),
        ..Tuple::default()
    };
    let flow = Flow {
        original: Some(there),
        reply: Some(back),
        seen_reply: true,
        assured: true,
        timeout: 431_999,
        mark: 1,
        labels: vec![1; 16],
        tcp: Some(tcp),
        ..Flow::default()
    };
    let echo = Flow { original: Some(ping.clone()), reply: Some(ping), ..Flow::default() };
    Flows { flows: vec![flow, echo], more: false }
}

/// As nft 1.0.6 lists one.
const TABLE: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}}, {"table": {"family": "inet", "name": "vmirror-web1", "handle": 2}}, {"map": {"family": "inet", "name": "m", "table": "vmirror-web1", "type": "ipv4_addr", "handle": 7, "map": "verdict", "elem": [["10.0.0.2", {"jump": {"target": "other"}}]]}}, {"chain": {"family": "inet", "table": "vmirror-web1", "name": "other", "handle": 1}}, {"add": {"rule": {"family": "inet", "table": "vmirror-web1", "chain": "other", "handle": 8, "expr": [{"counter": {"packets": 1, "bytes": 80}}, {"drop": null}]}}}]}"#;

fn main() {
    let package = env!("CARGO_MANIFEST_DIR");
    Seeds::of(package, "known_flows").add("two", connections().encode_to_vec());
    let seeds = Seeds::of(package, "nft_table");
    seeds.add("listed", TABLE);
    seeds.add("another", TABLE.replace("vmirror-web1", "filter"));
}
