//! Writes what the corpus of this target begins with: what is told of a migration.

use fuzzing::Seeds;
use session::Report;

const REPORT: &str = r#"{"id": "857d0a", "vm": "web1", "source": "host-a", "destination": "host-b", "started_unix_ms": 1700000000000, "engine": "mirror", "outcome": "completed", "error": {"stage": "failed", "kind": "link", "message": "the link is gone", "hint": "see to it", "more": [{"kind": "a", "message": "b", "hint": "c"}]}, "total_ms": 1234.5, "downtime_ms": 17.25, "downtime_asked_ms": 50.0, "downtime_predicted_ms": 20.0, "pause": {"stopped_ms": 0.1, "last_round_ms": 1.0, "device_state_ms": 2.0, "gate_ms": 3.0, "ready_ms": 4.0, "handed_over_ms": 5.0, "running_ms": 6.5}, "tracking_hold_ms": 0.5, "phases": [{"name": "switch-over", "start_ms": 0.0, "duration_ms": 1.5}], "rounds": [{"n": 0, "dirty_pages": 16384, "zero": 3, "unchanged": 2, "delta": 1, "plain": 5, "raw_bytes": 67108864, "wire_bytes": 4096, "duration_ms": 1.5, "scan_ms": 0.5, "paused": false, "estimate": {"dirty_rate": 1e6, "throughput": 2e9, "downtime_ms": null, "time_left_ms": 4.0}}], "memory": {"pages": 16384, "page_size": 4096, "raw_bytes": 67108864, "wire_bytes": 4096}, "disks": [{"name": "/vm/a.img", "size": 1073741824, "raw_bytes": 5, "wire_bytes": 4, "mode": "mirrored"}], "network": {"frames_forwarded": 3, "frames_dropped": 1, "forwarding": {"to": "10.9.0.3", "interfaces": ["vx0"]}}, "device_state_bytes": 100000, "verification": {"audited_pages": 1, "repaired_pages": 0, "gate": "match", "proof": "not-made", "proof_pages": 0, "mismatches": 0}, "health": {"watched_ms": 200.0, "vcpus": 2, "vcpus_progressing": 1}, "post_copy": {"pages": 5, "faults": 2, "longest_fault_ms": 1.5, "mean_fault_ms": 0.5, "duration_ms": 9.0, "links": 1, "counted": "part"}, "quiesced": {"stops": 1, "longest_ms": 2.0, "total_ms": 3.0}, "throttle": {"highest_share": 0.5, "duration_ms": 1.0, "stops": 3, "stopped_ms": 0.1, "longest_stop_ms": 0.05}}"#;

fn main() {
    serde_json::from_str::<Report>(REPORT).expect("a report");
    Seeds::of(env!("CARGO_MANIFEST_DIR"), "report_json").add("all", REPORT);
}
