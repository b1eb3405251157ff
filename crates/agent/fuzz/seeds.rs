//! Writes what the corpora of these targets begin with: a configuration with every key, and each request of the API.

use fuzzing::Seeds;

const CONFIG: &str = r#"name = "host-a"
listen = "10.9.0.2:7600"
api = "/run/vmirror/api.sock"
state_dir = "/var/lib/vmirror"
run_dir = "run"
ram_dir = "/dev/shm"
bandwidth = "900MiB/s"

[tls]
ca = "/etc/vmirror/ca.pem"
cert = "host-a.pem"
key = "host-a-key.pem"

[allow]
peers = ["host-b"]
disk_dirs = ["/var/lib/vms"]
bridges = ["br0"]
macvtap = ["eth0"]
max_memory = "16GiB"
qemu = ["/usr/bin/qemu-system-x86_64"]
forward = true
cgroup = "vmirror"

[hooks]
directory = "hooks"
deadline = "20s"

[network]
conntrack = false
nft_table = "bridge vmirror-{vm}"
forward_port = 4789
"#;

const LEAST: &str = "name = 'a'\nlisten = '[::1]:0'\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n";

const REQUESTS: [(u8, &str, &str); 9] = [
    (0, "migrate", r#"{"to": "10.9.0.3:7600"}"#),
    (
        0,
        "options",
        r#"{"to": "[::1]:7600", "options": {"downtime": "50ms", "max_downtime": "1s", "timeout": "10m", "bandwidth": 1000000, "streams": 4, "verify": "strict", "on_diverge": "throttle", "engine": "mirror", "compress": "auto", "disks": "auto", "disk_room": "whole", "accept_disconnect": true}}"#,
    ),
    (1, "run", r#"{"name": "web1", "argv": ["qemu-system-x86_64", "-m", "2G"], "directory": "/root"}"#),
    (2, "adopt", r#"{"qmp": "/run/db1.qmp"}"#),
    (3, "stop", r#"{"force": true}"#),
    (4, "release", r#"{"force": false}"#),
    (5, "run-here", r#"{"decision": "run-here", "force": true}"#),
    (5, "give-up", r#"{"decision": "give-up"}"#),
    (6, "bandwidth", r#"{"bandwidth": 100000, "to": "10.9.0.3:7600", "goal": "migrate"}"#),
];

fn main() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "agent_config");
    seeds.add("all", CONFIG);
    seeds.add("least", LEAST);
    seeds.add("unknown-key", format!("{LEAST}\n[allow]\npears = []\n"));
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "api_requests");
    for (kind, name, body) in REQUESTS {
        seeds.add(name, [&[kind][..], body.as_bytes()].concat());
    }
}
