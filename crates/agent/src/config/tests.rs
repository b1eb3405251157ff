use std::time::Duration;

use super::*;

const FULL: &str = r#"name = "host-a"
listen = "10.9.0.2:7600"
api = "/run/vmirror-a/api.sock"
state_dir = "/srv/state"
run_dir = "/run/vmirror-a"
log_dir = "logs"
log_max = "1MiB"
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
    assert_eq!(config.log_dir, Path::new("/etc/vmirror/logs"), "relative to the file");
    assert_eq!(config.log_max, 1 << 20);
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
    let table = config.firewall.nft_table.unwrap().table("web1");
    assert_eq!(table.to_string(), "bridge vmirror-web1");
}

#[test]
fn defaults_are_those_of_the_contract_and_allow_nobody_anything() {
    let config = Config::parse(Path::new("/etc/vmirror/agent.toml"), LEAST).unwrap();
    assert_eq!(config.api, Path::new("/run/vmirror/api.sock"));
    assert_eq!(config.state_dir, Path::new("/var/lib/vmirror"));
    assert_eq!(config.run_dir, Path::new("/run/vmirror"));
    assert_eq!(config.log_dir, Path::new("/var/lib/vmirror/logs"));
    assert_eq!(config.log_max, 16 << 20);
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
    assert!(top.contains("agent.toml:8: unknown key \"ram_dirs\""), "{top}");
    assert!(top.contains("ram_dir,"), "{top}");
    let nested = refused(&with("bridges", "bridge = [\"br0\"]"));
    assert!(nested.contains("agent.toml:17: unknown key \"allow.bridge\""), "{nested}");
    assert!(nested.contains("peers, disk_dirs, bridges"), "{nested}");
    let hooks = refused(&with("deadline", "timeout = \"1s\""));
    assert!(
        hooks.contains("agent.toml:22: unknown key \"hooks.timeout\"; known here: directory, deadline"),
        "{hooks}"
    );
    let table = refused(&format!("{FULL}[tsl]\nca = 1\n"));
    assert!(table.contains("agent.toml:26: unknown key \"tsl\""), "{table}");
}

#[test]
fn interfaces_for_macvtaps_are_none_unless_said() {
    let allowed = |text: &str| Config::parse(Path::new("/a.toml"), text).unwrap().allow.macvtap;
    assert_eq!(allowed(FULL), [""; 0]);
    assert_eq!(allowed(&with("bridges", "macvtap = [\"eth0\"]")), ["eth0"]);
}

#[test]
fn seccomp_filters_are_not_trusted_unless_said() {
    let trusted = |text: &str| Config::parse(Path::new("/a.toml"), text).unwrap().trust_seccomp;
    assert!(!trusted(LEAST) && !trusted(FULL));
    assert!(trusted(&with("ram_dir", "trust_seccomp = true")));
    let message = refused(&with("ram_dir", "trust_seccomp = 1"));
    assert!(message.contains("8: trust_seccomp: invalid type: integer `1`"), "{message}");
}

#[test]
fn what_command_lines_are_let_through_with_is_nothing_unless_said() {
    let allowed = |line: &str| Config::parse(Path::new("/a.toml"), &with("bridges", line)).unwrap().allow;
    let nothing = allowed("").permissions();
    assert!(nothing.arguments.is_empty() && nothing.output_dirs.is_empty() && nothing.listen.is_empty());
    assert!(!nothing.unsandboxed && allowed("unsandboxed = true").unsandboxed);
    assert_eq!(nothing.file_dirs, [Path::new("/var/lib/vms")]);
    let allow = allowed(
        "arguments = [\"-device vhost-vsock-pci\", \"-trace\"]\noutput_dirs = [\"/log\"]\nsocket_dirs = [\"/s\"]\ndisk_drivers = [\"rbd\"]\nlisten = [\"127.0.0.1\", \"::1\"]",
    );
    let arguments: Vec<String> = allow.arguments.iter().map(ToString::to_string).collect();
    assert_eq!(arguments, ["-device vhost-vsock-pci", "-trace"]);
    assert_eq!(allow.listen, [[127, 0, 0, 1].into(), std::net::IpAddr::from(std::net::Ipv6Addr::LOCALHOST)]);
    assert_eq!((allow.disk_drivers, allow.socket_dirs), (vec!["rbd".to_owned()], vec!["/s".into()]));
    assert_eq!(allowed("user = \"107:108\"").user.unwrap().uid(), 107);
    for (line, said) in [
        ("arguments = [\"device\"]", "a.toml:17: allow.arguments: \"device\" is not an option of QEMU's"),
        ("listen = [\"localhost\"]", "a.toml:17: allow.listen: \"localhost\": invalid IP address"),
        ("user = \"no such user\"", "a.toml:17: allow.user: \"no such user\" is no user in /etc/passwd"),
        ("output_dirs = [\"log\"]", "a.toml:17: allow.output_dirs: log is not an absolute path"),
        ("socket_dirs = [\"s\"]", "a.toml:17: allow.socket_dirs: s is not an absolute path"),
    ] {
        let error = Config::parse(Path::new("/a.toml"), &with("bridges", line)).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn metrics_are_refused_in_words() {
    let message = refused(&format!("{FULL}[metrics]\nlisten = \"127.0.0.1:7601\"\n"));
    assert!(message.contains("agent.toml:26: [metrics] is not yet available in this version"), "{message}");
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
        ("bandwidth", "bandwidth = \"fast\"", "9: bandwidth: \"fast\" is not a rate such as 500MiB/s"),
        ("bandwidth", "bandwidth = \"1kB/s\"", "9: bandwidth: 1000 bytes/s is below the least"),
        ("bandwidth", "bandwidth = 7", "9: bandwidth: invalid type: integer `7`"),
        ("peers", "peers = \"host-b\"", "15: allow.peers: invalid type: string \"host-b\""),
        ("peers", "peers = [\"host-b\", 7]", "15: allow.peers[1]: invalid type: integer `7`"),
        ("disk_dirs", "disk_dirs = [\"vms\"]", "16: allow.disk_dirs: vms is not an absolute path"),
        ("max_memory", "max_memory = \"lots\"", "18: allow.max_memory: \"lots\" is not a size"),
        ("max_memory", "max_memory = \"3\"", "18: allow.max_memory: 3 bytes are less than any VM has"),
        ("max_memory", "max_memory = 17", "18: allow.max_memory: invalid type: integer `17`"),
        ("qemu", "qemu = [\"qemu-system-x86_64\"]", "19: allow.qemu: qemu-system-x86_64 is not an abs"),
        ("qemu", "qemu = []\ncgroup = 5", "20: allow.cgroup: invalid type: integer `5`"),
        ("qemu", "qemu = []\ncgroup = \"/vms\"", "20: allow.cgroup: \"/vms\" is not the path of a cgroup"),
        ("qemu", "qemu = []\ncgroup = \"../vms\"", "20: allow.cgroup: \"../vms\" is not the path of a"),
        ("directory", "directory = 3", "21: hooks.directory: invalid type: integer `3`"),
        ("deadline", "deadline = \"soon\"", "22: hooks.deadline: \"soon\" is not a time such as \"10s\""),
        ("deadline", "deadline = \"99ms\"", "22: hooks.deadline: \"99ms\" is not between 100ms and 10m"),
        ("deadline", "deadline = \"601s\"", "22: hooks.deadline: \"601s\" is not between 100ms and 10m"),
        ("deadline", "deadline = 10", "22: hooks.deadline: invalid type: integer `10`"),
        ("conntrack", "conntrack = \"no\"", "24: network.conntrack: invalid type: string \"no\""),
        ("nft_table", "nft_table = \"vms\"", "25: network.nft_table: \"vms\" names no table for each VM"),
        ("nft_table", "nft_table = \"ip a-{vm}\"", "25: network.nft_table: \"ip a-{vm}\" names no table"),
    ] {
        let message = refused(&with(key, line));
        assert!(message.contains(&format!("agent.toml:{expected}")), "{line}: {message}");
    }
    let path = |length: usize| format!("/{}", "x".repeat(length - 1));
    let api =
        |length| Config::parse(Path::new("/a.toml"), &with("api", &format!("api = \"{}\"", path(length))));
    assert!(api(105).is_ok());
    let long = api(106).unwrap_err().to_string();
    assert!(long.contains("too long for a unix socket: 106 bytes, at most 105 fit"), "{long}");
    let run_dir = |length| {
        Config::parse(Path::new("/a.toml"), &with("run_dir", &format!("run_dir = \"{}\"", path(length))))
    };
    assert!(run_dir(93).is_ok());
    let long = run_dir(94).unwrap_err().to_string();
    assert!(long.contains("a.toml:5: run_dir: ") && long.contains("is too long: the sockets"), "{long}");
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

#[test]
fn a_log_that_could_not_hold_last_words_is_refused() {
    let refused = refused(&with("log_max", "log_max = \"1KiB\""));
    assert!(
        refused.contains("agent.toml:7") && refused.contains("log_max") && refused.contains("64KiB"),
        "{refused}"
    );
}
