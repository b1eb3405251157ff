use std::time::Duration;

use super::*;

const FULL: &str = r#"name = "host-a"
listen = "10.9.0.2:7600"
api = "/run/vmirror-a/api.sock"
state_dir = "/srv/state"
run_dir = "/run/vmirror-a"
ram_dir = "/dev/hugepages"
bandwidth = "900MiB/s"
[tls]
ca = "ca.pem"
cert = "host-a.pem"
key = "/etc/keys/host-a-key.pem"
[allow]
peers = ["host-b", "host-c"]
disk_dirs = ["/var/lib/vms"]
bridges = ["br0"]
max_memory = "16GiB"
qemu = ["/usr/bin/qemu-system-x86_64"]
[hooks]
directory = "hooks"
deadline = "1m 30s"
[network]
conntrack = false
nft_table = "bridge vmirror-{vm}"
"#;

const LEAST: &str = "name = \"a\"\nlisten = \"[::1]:0\"\n[tls]\nca = \"c\"\ncert = \"d\"\nkey = \"e\"\n";

fn refused(text: &str) -> String {
    Config::parse(Path::new("/etc/vmirror/agent.toml"), text).unwrap_err().to_string()
}

/// `FULL` with one line put in the place of the one that begins with `key`.
fn with(key: &str, line: &str) -> String {
    let changed = FULL.lines().map(|old| if old.starts_with(key) { line } else { old });
    changed.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_of_the_contract_is_understood() {
    let config = Config::parse(Path::new("/etc/vmirror/agent.toml"), FULL).unwrap();
    assert_eq!(config.name, "host-a");
    assert_eq!(config.listen.to_string(), "10.9.0.2:7600");
    assert_eq!(config.tls.ca, Path::new("/etc/vmirror/ca.pem"), "relative to the file");
    assert_eq!(config.tls.key, Path::new("/etc/keys/host-a-key.pem"));
    assert_eq!(config.ram_dir, Path::new("/dev/hugepages"));
    assert_eq!(config.bandwidth.unwrap().get(), 900 << 20);
    assert_eq!(config.allow.max_memory, 16 << 30);
    assert_eq!(config.allow.peers, ["host-b", "host-c"]);
    assert_eq!(config.allow.cgroup, None);
    let text = with("qemu", "qemu = []\ncgroup = \"vms.slice/vmirror\"");
    let allow = Config::parse(Path::new("/etc/vmirror/agent.toml"), &text).unwrap().allow;
    assert_eq!(allow.cgroup, Some("vms.slice/vmirror".parse().unwrap()));
    assert_eq!(
        config.hooks.directory.as_deref(),
        Some(Path::new("/etc/vmirror/hooks")),
        "relative to the file"
    );
    assert_eq!(config.hooks.deadline, Duration::from_secs(90));
    assert!(!config.firewall.conntrack);
    let table = config.firewall.nft_table.unwrap().table(&"web1".parse().unwrap());
    assert_eq!(table.to_string(), "bridge vmirror-web1");
}

#[test]
fn defaults_are_those_of_the_contract_and_allow_nobody_anything() {
    let config = Config::parse(Path::new("/etc/vmirror/agent.toml"), LEAST).unwrap();
    assert_eq!(config.api, Path::new("/run/vmirror/api.sock"));
    assert_eq!(config.state_dir, Path::new("/var/lib/vmirror"));
    assert_eq!(config.run_dir, Path::new("/run/vmirror"));
    assert_eq!(config.ram_dir, Path::new("/dev/shm"));
    assert_eq!(config.bandwidth, None);
    assert_eq!(config.allow, Allow::default());
    assert_eq!(config.hooks, Hooks { directory: None, deadline: Duration::from_secs(10) });
    let table = format!("{LEAST}[hooks]\ndirectory = \"/srv/hooks\"\n");
    let hooks = Config::parse(Path::new("/etc/vmirror/agent.toml"), &table).unwrap().hooks;
    assert_eq!(hooks.directory.as_deref(), Some(Path::new("/srv/hooks")));
    assert_eq!(hooks.deadline, Duration::from_secs(10));
    assert_eq!(config.firewall, Firewall { conntrack: true, nft_table: None });
}

#[test]
fn unknown_keys_are_refused_by_name_and_line() {
    let top = refused(&with("ram_dir", "ram_dirs = \"/dev/shm\""));
    assert!(top.contains("agent.toml:6: unknown key \"ram_dirs\""), "{top}");
    assert!(top.contains("ram_dir,"), "{top}");
    let nested = refused(&with("bridges", "bridge = [\"br0\"]"));
    assert!(nested.contains("agent.toml:15: unknown key \"allow.bridge\""), "{nested}");
    assert!(nested.contains("peers, disk_dirs, bridges"), "{nested}");
    let hooks = refused(&with("deadline", "timeout = \"1s\""));
    assert!(
        hooks.contains("agent.toml:20: unknown key \"hooks.timeout\"; known here: directory, deadline"),
        "{hooks}"
    );
    let table = refused(&format!("{FULL}[tsl]\nca = 1\n"));
    assert!(table.contains("agent.toml:24: unknown key \"tsl\""), "{table}");
}

#[test]
fn interfaces_for_macvtaps_are_none_unless_said() {
    let allowed = |text: &str| Config::parse(Path::new("/a.toml"), text).unwrap().allow.macvtap;
    assert_eq!(allowed(FULL), [""; 0]);
    assert_eq!(allowed(&with("bridges", "macvtap = [\"eth0\"]")), ["eth0"]);
}

#[test]
fn metrics_are_refused_in_words() {
    let message = refused(&format!("{FULL}[metrics]\nlisten = \"127.0.0.1:7601\"\n"));
    assert!(message.contains("agent.toml:24: [metrics] is not yet available in this version"), "{message}");
}

#[test]
fn missing_keys_are_named() {
    for (key, name) in [
        ("name", "name"),
        ("listen", "listen"),
        ("ca", "tls.ca"),
        ("cert", "tls.cert"),
        ("key", "tls.key"),
        ("peers", "allow.peers"),
        ("max_memory", "allow.max_memory"),
        ("qemu", "allow.qemu"),
        ("directory", "hooks.directory"),
    ] {
        let message = refused(&with(key, ""));
        assert!(message.ends_with(&format!("{name} is missing")), "{name}: {message}");
    }
    assert!(refused("name = \"a\"\nlisten = \"127.0.0.1:1\"\n").ends_with("tls is missing"));
}

#[test]
fn bad_values_name_the_key_the_line_and_the_value() {
    for (key, line, expected) in [
        ("name", "name = \"\"", "1: name: \"\" cannot name an agent"),
        ("name", "name = \"two words\"", "1: name: \"two words\" cannot name"),
        ("name", "name = 5", "1: name: invalid type: integer `5`"),
        ("listen", "listen = \"host-a\"", "2: listen: "),
        ("listen", "listen = \"10.9.0.2\"", "2: listen: "),
        ("state_dir", "state_dir = true", "4: state_dir: invalid type: boolean `true`"),
        ("bandwidth", "bandwidth = \"fast\"", "7: bandwidth: \"fast\" is not a rate such as 500MiB/s"),
        ("bandwidth", "bandwidth = \"1kB/s\"", "7: bandwidth: 1000 bytes/s is below the least"),
        ("bandwidth", "bandwidth = 7", "7: bandwidth: invalid type: integer `7`"),
        ("peers", "peers = \"host-b\"", "13: allow.peers: invalid type: string \"host-b\""),
        ("peers", "peers = [\"host-b\", 7]", "13: allow.peers[1]: invalid type: integer `7`"),
        ("disk_dirs", "disk_dirs = [\"vms\"]", "14: allow.disk_dirs: vms is not an absolute path"),
        ("max_memory", "max_memory = \"lots\"", "16: allow.max_memory: \"lots\" is not a size"),
        ("max_memory", "max_memory = 17", "16: allow.max_memory: invalid type: integer `17`"),
        ("qemu", "qemu = [\"qemu-system-x86_64\"]", "17: allow.qemu: qemu-system-x86_64 is not an abs"),
        ("qemu", "qemu = []\ncgroup = 5", "18: allow.cgroup: invalid type: integer `5`"),
        ("qemu", "qemu = []\ncgroup = \"/vms\"", "18: allow.cgroup: \"/vms\" is not the path of a cgroup"),
        ("qemu", "qemu = []\ncgroup = \"../vms\"", "18: allow.cgroup: \"../vms\" is not the path of a"),
        ("directory", "directory = 3", "19: hooks.directory: invalid type: integer `3`"),
        ("deadline", "deadline = \"soon\"", "20: hooks.deadline: \"soon\" is not a time such as \"10s\""),
        ("deadline", "deadline = \"99ms\"", "20: hooks.deadline: \"99ms\" is not between 100ms and 10m"),
        ("deadline", "deadline = \"601s\"", "20: hooks.deadline: \"601s\" is not between 100ms and 10m"),
        ("deadline", "deadline = 10", "20: hooks.deadline: invalid type: integer `10`"),
        ("conntrack", "conntrack = \"no\"", "22: network.conntrack: invalid type: string \"no\""),
        ("nft_table", "nft_table = \"vms\"", "23: network.nft_table: \"vms\" names no table for each VM"),
        ("nft_table", "nft_table = \"ip a-{vm}\"", "23: network.nft_table: \"ip a-{vm}\" names no table"),
    ] {
        let message = refused(&with(key, line));
        assert!(message.contains(&format!("agent.toml:{expected}")), "{line}: {message}");
    }
    let long = format!("api = \"/{}\"", "x".repeat(LONGEST_SOCKET_PATH));
    assert!(refused(&with("api", &long)).contains("too long for a unix socket: 108 bytes"));
}

#[test]
fn what_is_not_toml_is_refused_with_its_line() {
    assert!(refused("name = \"a\"\nlisten = \n").contains("agent.toml:2: "));
    assert!(refused("name = \"a\"\nname = \"b\"\n").contains("agent.toml:2: "));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nonexistent/agent.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/agent.toml"));
}
