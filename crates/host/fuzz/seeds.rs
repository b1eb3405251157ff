//! Writes what the corpora of these targets begin with: what an agent keeps of a machine.

use fuzzing::Seeds;
use host::Record;

const RECORD: &str = r#"{"name": "web1", "generation": 3, "ownership": {"handed-over": {"session": "5e5e5e5e-5e5e-5e5e-5e5e-5e5e5e5e5e5e", "to": "host-b", "address": "10.9.0.3:7600"}}, "origin": "arrived", "arrived_by": "5e5e5e5e-5e5e-5e5e-5e5e-5e5e5e5e5e5f", "resuming": false, "process": null, "argv": ["qemu-system-x86_64", "-m", "64M"], "qmp_socket": "/run/vmirror/web1.qmp", "memory": 67108864, "made": {"files": ["/dev/shm/vmirror-web1@pc.ram"], "taps": ["vm-web1"]}, "left_behind": ["/vm/a.img"]}"#;

fn main() {
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
