//! Writes what the corpora of these targets begin with: what an agent keeps of a machine.

use fuzzing::Seeds;
use host::Record;

const RECORD: &str = r#"{"name": "web1", "generation": 3, "ownership": {"handed-over": {"session": "5e5e5e5e-5e5e-5e5e-5e5e-5e5e5e5e5e5e", "to": "host-b", "address": "10.9.0.3:7600"}}, "origin": "arrived", "arrived_by": "5e5e5e5e-5e5e-5e5e-5e5e-5e5e5e5e5e5f", "resuming": false, "process": null, "argv": ["qemu-system-x86_64", "-m", "64M"], "qmp_socket": "/run/vmirror/web1.qmp", "memory": 67108864, "made": {"files": ["/dev/shm/vmirror-web1@pc.ram"], "taps": ["vm-web1"]}, "left_behind": ["/vm/a.img"]}"#;

const FILE: &str = r#"{"inode": [1, 2]}"#;
const AT: &str = r#"{"secs_since_epoch": 1700000000, "nanos_since_epoch": 5}"#;

fn left_images() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "left_images");
    let remnant = format!(r#""left": "behind", "at": {AT}, "written": [1048576, {AT}]"#);
    let process = r#"{"pid": 7, "start_time": 9, "boot": "b", "namespace": 4026531836, "qmp_socket": ""}"#;
    let holder = format!(r#"{{"vm": "web1", "process": {process}, "images": ["/vm/a.img"]}}"#);
    let record = format!(
        r#"{{"images": [{{"vm": "web1", "path": "/vm/a.img", "file": {FILE}, "remnant": {{{remnant}, "complete": null}}, "kept": {{"to": "host-b", "at": {AT}}}}}], "holders": [{holder}], "watched": [{{"vm": "web1", "to": "host-b", "argv": ["qemu"]}}], "starters": {{"web1": {{"kind": "supervised", "message": "a loop", "hint": "end it"}}}}}}"#
    );
    let remnants = format!(r#"[{{"vm": "web1", "path": "/vm/a.img", {remnant}, "file": {FILE}}}]"#);
    let kept = format!(
        r#"{{"images": [{{"vm": "web1", "path": "/vm/a.img", "to": "host-b", "at": {AT}, "file": {FILE}}}], "holders": [{holder}]}}"#
    );
    let all = |record: &str, remnants: &str, kept: &str| {
        let lengths = [record, remnants].map(|text| (text.len() as u16).to_le_bytes()).concat();
        [&lengths, record.as_bytes(), remnants.as_bytes(), kept.as_bytes()].concat()
    };
    seeds.add("this", all(&record, "", ""));
    seeds.add("earlier", all("", &remnants, &kept));
    seeds.add("all", all(&record, &remnants, &kept));
}

fn forwards() {
    let tunnel = r#"{"identifier": 77, "local": "10.9.0.2", "remote": "10.9.0.3", "port": 4789, "bridge": "br0", "mtu": 1500}"#;
    let forward = format!(
        r#"[{{"vm": "web1", "session": "5e5e5e5e-5e5e-5e5e-5e5e-5e5e5e5e5e5e", "to": "host-b", "address": "10.9.0.3:7600", "since": {AT}, "memory": 1073741824, "generation": 3, "macs": ["52:54:00:88:00:0a"], "tunnels": [{tunnel}], "ports": [null], "chained": ["vmb00004d"]}}]"#
    );
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "forwards");
    seeds.add("one", forward);
    seeds.add("none", "[]");
}

fn main() {
    left_images();
    forwards();
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "journal_slots");
    let record = serde_json::from_str::<Record>(RECORD).expect("a record");
    let json = serde_json::to_vec(&record).expect("a record is JSON");
    let half = (json.len() as u16).to_le_bytes();
    let both = |head: [u8; 3], first: &[u8], second: &[u8]| {
        [&head[..], &(first.len() as u16).to_le_bytes(), first, second].concat()
    };
    seeds.add("two", both([0, 2, 3], &json, &json));
    seeds.add("one", both([2, 2, 0], &json, &[]));
    seeds.add("later", both([0, 2, 3], &json, b"{\"format\": 2}"));
    seeds.add("other-version", both([3, 0, 0], b"vmirror2", &half));
    seeds.add("last", both([0, 255, 1], &json, &json));
}
