//! What a guest or its QEMU writes must fill no file system, and must not be lost when it is needed: when a QEMU has died.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use end_to_end::{Pair, until, vmirror};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::guest_spec::GuestSpec;
use testbed::{Host, Programs, Testbed, files_below};

/// The most that a log may take here, with what was cut from it.
const MOST: u64 = 256 << 10;
/// What each line of the numbered ones is long.
const LINE: usize = 8;
/// How many of them are written when nothing is cut meanwhile.
const FEW: u64 = 500;

fn pair() -> Pair {
    let root = testbed::root_or_skip("namespaces: the hosts of this test are on loopback");
    let testbed = if root { Testbed::new() } else { Testbed::rootless() }.unwrap();
    for host in testbed.hosts() {
        host.configure(|config| drop(config.insert("log_max".to_owned(), "256KiB".into()))).unwrap();
    }
    Pair::of(testbed)
}

fn logs(host: &Host) -> PathBuf {
    host.state_dir().join("logs")
}

/// A QEMU, at a path of this host's, for which these lines of shell are run first.
fn talking_qemu(host: &Host, lines: &str) -> PathBuf {
    let directory = host.directory().join("talking");
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("qemu-system-x86_64");
    fs::write(&path, format!("#!/bin/sh\n{lines}\nexec {} \"$@\"\n", Programs::find().qemu.display()))
        .unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

/// Numbered lines of equal length.
fn numbers(from: u64, to: u64) -> String {
    format!("seq -f %0{}.0f {from} {to}", LINE - 1)
}

fn length(host: &Host, name: &str) -> u64 {
    fs::metadata(logs(host).join(name)).map_or(0, |log| log.len())
}

fn bytes(host: &Host) -> u64 {
    files_below(&logs(host)).iter().map(|file| fs::metadata(file).map_or(0, |file| file.len())).sum()
}

/// What is kept of a log, the oldest first.
fn kept(host: &Host, name: &str) -> String {
    let part =
        |ending: &str| fs::read_to_string(logs(host).join(format!("{name}{ending}"))).unwrap_or_default();
    part(".1") + &part("")
}

/// Waits until a log has what was written last, and is no longer than it may be; nothing is anywhere else.
fn is_bounded(host: &Host, last: u64) {
    let line = format!("{last:0width$}\n", width = LINE - 1);
    until("the last line is there and the log is bounded", || {
        kept(host, "vm.log").ends_with(&line) && bytes(host) <= MOST
    });
    // Much more than nothing is kept, and its end without a gap.
    let kept = kept(host, "vm.log");
    let end: Vec<u64> = kept.lines().rev().take(FEW as usize).map(|line| line.parse().unwrap()).collect();
    assert!(end.windows(2).all(|two| two[0] == two[1] + 1), "{end:?}");
    let elsewhere: Vec<PathBuf> = files_below(&host.run_dir())
        .into_iter()
        .filter(|file| file.to_string_lossy().contains(".log"))
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}

#[test]
fn a_guest_that_writes_without_end_leaves_no_more_than_the_bound_and_what_it_wrote_last() {
    let pair = pair();
    let lines = 20 * MOST / LINE as u64;
    let [all, last] = ["all", "last"].map(|name| pair.a().directory().join(name));
    // By a process beside QEMU that has its output: without end, and once that is cut a little more.
    let (many, few) = (numbers(1, lines), numbers(lines + 1, lines + FEW));
    let talks = format!(
        "({many}; >{}; while [ ! -e {} ]; do sleep 0.1; done; {few}) &",
        all.display(),
        last.display()
    );
    let qemu = talking_qemu(pair.a(), &talks);
    let run =
        ["run", "vm", "--json", "--", qemu.to_str().unwrap(), "-accel", "tcg", "-m", "32", "-nodefaults"];
    let shown = vmirror(pair.a(), &[&run[..], &["-display", "none"]].concat()).done().json();
    assert_eq!(shown["log"], logs(pair.a()).join("vm.log").to_str().unwrap(), "{shown}");
    until("everything is written, and cut", || all.exists() && length(pair.a(), "vm.log") <= MOST / 2);
    assert!(bytes(pair.a()) <= MOST && length(pair.a(), "vm.log.1") > 0, "{}", bytes(pair.a()));
    fs::write(&last, "").unwrap();
    let lines = lines + FEW;
    is_bounded(pair.a(), lines);

    // What is written while no agent is here is cut by the next.
    pair.a().stop_agent().unwrap();
    let mut log = fs::File::options().append(true).open(logs(pair.a()).join("vm.log")).unwrap();
    for number in lines + 1..=2 * lines {
        writeln!(log, "{number:0width$}", width = LINE - 1).unwrap();
    }
    assert!(bytes(pair.a()) > 10 * MOST);
    pair.a().start_agent().unwrap();
    is_bounded(pair.a(), 2 * lines);
    // The file is the same one still: who had it open goes on in it.
    writeln!(log, "{:0width$}", 2 * lines + 1, width = LINE - 1).unwrap();
    is_bounded(pair.a(), 2 * lines + 1);

    // It is kept when the machine has gone, and no longer than one more of its name.
    let _ = vmirror(pair.a(), &["stop", "vm", "--force"]).done();
    assert!(kept(pair.a(), "vm.log-ended").ends_with(&format!("{}\n", 2 * lines + 1)));
    assert!(kept(pair.a(), "vm.log").is_empty() && bytes(pair.a()) <= MOST);
    pair.holds_nothing(pair.a());
}

#[test]
fn the_last_words_of_a_destinations_qemu_are_told_and_its_log_is_where_the_error_says() {
    let pair = pair();
    let qemu = talking_qemu(pair.b(), "echo a word of the QEMU there >&2");
    pair.b().stop_agent().unwrap();
    let path = qemu.to_str().unwrap().to_owned();
    pair.b()
        .configure(|config| {
            drop(config["allow"].as_table_mut().unwrap().insert("qemu".to_owned(), vec![path].into()))
        })
        .unwrap();
    pair.b().start_agent().unwrap();
    let guest = pair.run(pair.a(), "vm", &GuestSpec { fill_mib: 16, rate: 100, ..pair.spec("vm", 128) });
    let before = guest.status();
    let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
    let there = pair.qemu(pair.b()).unwrap();
    kill_process(Pid::from_raw(there).unwrap(), Signal::KILL).unwrap();
    let mut ended = Value::Null;
    until("the mirror has ended", || {
        ended = vmirror(pair.a(), &["history", "--json"]).done().json();
        ended.as_array().is_some_and(|all| !all.is_empty())
    });
    let report = vmirror(pair.a(), &["report", ended[0]["id"].as_str().unwrap(), "--json"]).done().json();
    let (message, hint) =
        (report["error"]["message"].as_str().unwrap(), report["error"]["hint"].as_str().unwrap());
    let log = logs(pair.b()).join("vm.log-ended");
    assert_eq!(report["error"]["kind"], "qemu-gone", "{report}");
    assert!(
        message.contains("QEMU at the destination has ended; it said: a word of the QEMU there"),
        "{message}"
    );
    assert!(hint.contains(log.to_str().unwrap()), "{hint}");
    until("the copy is gone", || !pair.b().run_dir().join("vm.d").exists());
    assert_eq!(fs::read_to_string(&log).unwrap(), "a word of the QEMU there\n");
    pair.holds_nothing(pair.b());
    guest.sound_since(&before);

    // A check that fails, or does not, puts nothing in its place.
    let check = vmirror(pair.a(), &["check", "vm", "--to", &pair.b().listen().to_string()]).done();
    assert!(check.stdout.contains("can move"), "{check:?}");
    assert_eq!(files_below(&logs(pair.b())), [log]);
}
