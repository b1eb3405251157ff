//! A check, a rehearsal, a migration that fails or is cancelled must not touch what is not the agent's: no path, no socket, no file
//! with a process's id, no log. Both agents of these tests see one file system, as hosts with shared storage do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use end_to_end::{PATIENCE, Pair, Points, until, vmirror};
use session::points::Point;
use testbed::guest_spec::GuestSpec;
use testbed::{Host, root_or_skip};

/// What a file is: its kind and mode, its number, its length, when it was changed, what it leads to.
type Entry = (u32, u64, u64, (i64, i64), Option<PathBuf>);

/// Everything in a directory.
fn tree(directory: &Path) -> BTreeMap<PathBuf, Entry> {
    let entry = |path: PathBuf| {
        let file = fs::symlink_metadata(&path).unwrap();
        let changed = (file.mtime(), file.mtime_nsec());
        let leads = fs::read_link(&path).ok();
        (path, (file.mode(), file.ino(), file.len(), changed, leads))
    };
    fs::read_dir(directory).unwrap().map(|file| entry(file.unwrap().path())).collect()
}

/// What QEMU says to a question at a monitor for people, if it is there.
fn answer(monitor: &Path, question: &str) -> Option<String> {
    let mut stream = UnixStream::connect(monitor).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut heard = String::new();
    let mut until = |stream: &mut UnixStream, prompts: usize| {
        while heard.matches("(qemu) ").count() < prompts {
            let mut bytes = [0; 4096];
            let read = stream.read(&mut bytes).unwrap();
            assert!(read > 0, "{heard}");
            heard.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
        heard.clone()
    };
    until(&mut stream, 1);
    stream.write_all(format!("{question}\n").as_bytes()).unwrap();
    Some(until(&mut stream, 2))
}

fn runs(monitor: &Path) -> bool {
    answer(monitor, "info status").is_some_and(|said| said.contains("VM status: running"))
}

/// A QEMU that somebody else has started, with everything of it in one directory.
struct Theirs {
    qemu: Child,
    directory: PathBuf,
}

impl Theirs {
    fn start(qemu: &Path, host: &Host, directory: &Path) -> Theirs {
        fs::create_dir(directory).unwrap();
        let at = |name: &str| directory.join(name).display().to_string();
        let mut command = host.command(qemu);
        let ram = host.ram_dir().join("theirs").display().to_string();
        let memory = format!("memory-backend-file,id=ram,size=32M,share=on,mem-path={ram}");
        command.args(["-accel", "tcg", "-m", "32", "-nodefaults", "-object", &memory]);
        command.args(["-machine", "pc,memory-backend=ram", "-vnc", &format!("unix:{}", at("vnc"))]);
        for (option, name) in [("-monitor", "monitor"), ("-serial", "serial"), ("-qmp", "qmp")] {
            command.args([option, &format!("unix:{},server=on,wait=off", at(name))]);
        }
        command.args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", at("agent"))]);
        command.args(["-chardev", &format!("file,id=out,path={}", at("out"))]);
        command.args(["-pidfile", &at("pid"), "-D", &at("log"), "-d", "guest_errors,unimp"]);
        let qemu = command.stdout(Stdio::null()).spawn().unwrap();
        let theirs = Theirs { qemu, directory: directory.to_owned() };
        until("QEMU has started", || runs(&theirs.at("monitor")));
        fs::write(theirs.at("notes"), "nothing of QEMU's").unwrap();
        theirs
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A migration of the machine that fails at this point of the switch-over, as its destination's agent is killed there.
fn fails_at(pair: &Pair, points: &Points, point: Point, options: &[&str]) {
    let held = points.hold(point);
    let migration = pair.begin("vm", pair.a(), pair.b(), options);
    held.reached();
    pair.b().kill_agent().unwrap();
    drop(held);
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}\n{}", pair.logs());
    pair.b().start_agent_with(points.options()).unwrap();
    pair.holds_nothing(pair.b());
}

#[test]
fn nothing_of_the_users_is_touched_before_the_machine_is_the_destinations() {
    nothing_of_the_users_is_touched(&Pair::start());
}

#[test]
fn nothing_of_the_users_is_touched_by_qemu_10() {
    if let Some(pair) = Pair::of_qemu_10_or_skip("nothing_of_the_users_is_touched_by_qemu_10") {
        nothing_of_the_users_is_touched(&pair);
    }
}

fn nothing_of_the_users_is_touched(pair: &Pair) {
    let (a, b) = (pair.a(), pair.b());
    let theirs = Theirs::start(pair.qemu_program(), a, &pair.a().shared_dir().join("theirs"));
    let _ = vmirror(a, &["adopt", "vm", "--qmp", theirs.at("qmp").to_str().unwrap()]).done();
    let before = tree(&theirs.directory);
    assert!(before.len() >= 8, "{before:?}");
    let is_untouched = |after: &str| {
        assert_eq!(tree(&theirs.directory), before, "{after}\n{}", pair.logs());
        assert!(runs(&theirs.at("monitor")), "{after}");
    };

    assert_eq!(pair.check("vm"), Vec::<String>::new());
    is_untouched("a check");

    let _ = pair.mirror("vm", a, b, &[]);
    is_untouched("a mirror that stands");
    let _ = vmirror(a, &["cancel", "vm"]).done();
    pair.holds_nothing(b);
    is_untouched("a migration that was cancelled");

    let _ = pair.mirror("vm", a, b, &[]);
    b.kill_agent().unwrap();
    until("the migration has failed", || pair.show("vm", a).unwrap()["session"].is_null());
    b.start_agent().unwrap();
    pair.holds_nothing(b);
    is_untouched("a migration that failed");

    let points = Points::of(b, &[]);
    for point in [Point::LoadHeard, Point::Loaded, Point::Ready] {
        fails_at(pair, &points, point, &[]);
        until("it runs on", || pair.runs_on("vm", a));
        is_untouched(&format!("a switch-over that failed at {point:?}"));
    }

    // The agent's own connection is by a socket of theirs, and is found again.
    a.stop_agent().unwrap();
    a.start_agent().unwrap();
    assert!(pair.runs_on("vm", a));
    is_untouched("a restart of the agent");

    // When the machine is the destination's, all of it is where its users look for it.
    let _ = pair.migrate("vm", a, b, &[]);
    for name in ["monitor", "serial", "qmp", "agent", "vnc", "pid"] {
        let path = theirs.at(name);
        until(name, || fs::read_link(&path).is_ok_and(|leads| leads.starts_with(b.run_dir())));
    }
    assert!(runs(&theirs.at("monitor")));
    let pid = pair.show("vm", b).unwrap()["pid"].to_string();
    assert_eq!(fs::read_to_string(theirs.at("pid")).unwrap().trim(), pid);

    // And when it has left, what leads to it goes with it.
    let _ = pair.migrate("vm", b, a, &[]);
    until("the monitor is at its place again", || {
        fs::read_link(theirs.at("monitor")).is_ok_and(|leads| leads.starts_with(a.run_dir()))
    });
    assert!(runs(&theirs.at("monitor")));
    pair.holds_nothing(b);
    let _ = vmirror(a, &["stop", "vm", "--force"]).done();
    let left: Vec<_> = tree(&theirs.directory).into_keys().collect();
    assert_eq!(left, ["log", "notes", "out"].map(|name| theirs.at(name)), "only plain files are left");
}

#[test]
fn nothing_of_the_users_is_touched_by_a_post_copy_that_fails_before_the_hand_over() {
    if !root_or_skip("nothing_of_the_users_is_touched_by_a_post_copy_that_fails_before_the_hand_over") {
        return;
    }
    let pair = Pair::start();
    let directory = pair.a().shared_dir().join("theirs");
    fs::create_dir(&directory).unwrap();
    let at = |name: &str| directory.join(name).display().to_string();
    let unix = |name: &str| format!("unix:{},server=on,wait=off", at(name));
    let more = ["-monitor", &unix("monitor"), "-qmp", &unix("qmp")].map(str::to_owned);
    let chardevs = [
        format!("socket,id=agent,path={},server=on,wait=off", at("agent")),
        format!("file,id=out,path={}", at("out")),
    ];
    let chardevs = chardevs.into_iter().flat_map(|chardev| ["-chardev".to_owned(), chardev]);
    let spec = pair.outrun_by(pair.spec("vm", 128));
    let extra = spec.extra.iter().cloned().chain(more).chain(chardevs).collect();
    let guest = pair.run(pair.a(), "vm", &GuestSpec { extra, ..spec });
    fs::write(directory.join("notes"), "nothing of QEMU's").unwrap();
    let (before, said) = (tree(&directory), guest.status());
    assert_eq!(before.len(), 5, "{before:?}");
    let points = Points::of(pair.b(), &[]);
    let monitor = directory.join("monitor");
    for (times, point) in [Point::LoadHeard, Point::Ready].into_iter().enumerate() {
        fails_at(&pair, &points, point, &["--on-diverge", "post-copy"]);
        until("it runs on", || pair.runs_on("vm", pair.a()));
        assert_eq!(tree(&directory), before, "a post-copy that failed at {point:?}\n{}", pair.logs());
        assert!(runs(&monitor));
        let log = fs::read_to_string(pair.a().agent_log()).unwrap();
        assert_eq!(log.matches("the guest outruns the mirror: post-copy").count(), times + 1, "{log}");
    }
    guest.sound_since(&said);
}

#[test]
fn what_is_where_a_socket_was_is_not_replaced() {
    what_is_there_is_not_replaced(&Pair::start());
}

#[test]
fn what_is_where_a_socket_of_qemu_10_was_is_not_replaced() {
    if let Some(pair) = Pair::of_qemu_10_or_skip("what_is_where_a_socket_of_qemu_10_was_is_not_replaced") {
        what_is_there_is_not_replaced(&pair);
    }
}

fn what_is_there_is_not_replaced(pair: &Pair) {
    let (a, b) = (pair.a(), pair.b());
    let directory = a.shared_dir().join("taken");
    fs::create_dir(&directory).unwrap();
    let monitor = directory.join("monitor");
    // Not where sockets may be placed: it stays where the agent has it.
    let elsewhere = pair.testbed().directory().join("elsewhere");
    let unix = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
    pair.run_tiny(a, "vm", &["-monitor", &unix(&monitor), "-serial", &unix(&elsewhere)]);
    fs::rename(&monitor, directory.join("moved")).unwrap();
    // The source's QEMU removes whatever has that name when it ends, if that can be removed so.
    fs::create_dir(&monitor).unwrap();
    let _ = pair.migrate("vm", a, b, &[]);
    assert!(pair.runs_on("vm", b));
    thread::sleep(Duration::from_secs(1));
    assert!(fs::symlink_metadata(&monitor).unwrap().is_dir());
    assert!(fs::symlink_metadata(&elsewhere).is_err());
    // As soon as it is not in the way any more, the socket has its name.
    fs::remove_dir(&monitor).unwrap();
    until("the monitor has its name", || runs(&monitor));
    let _ = vmirror(b, &["stop", "vm", "--force"]).done();
    assert!(fs::symlink_metadata(&monitor).is_err());
}

#[test]
fn nobody_is_waited_for_at_a_socket() {
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    let directory = a.shared_dir().join("waits");
    fs::create_dir(&directory).unwrap();
    let serial = directory.join("serial");
    // QEMU's default is to start when somebody has connected.
    let start = Instant::now();
    pair.run_tiny(a, "vm", &["-serial", &format!("unix:{},server=on", serial.display())]);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert_eq!(pair.check("vm"), Vec::<String>::new());
    let _ = pair.migrate("vm", a, b, &[]);
    until("the console can be connected to", || UnixStream::connect(&serial).is_ok());
    let _ = vmirror(b, &["stop", "vm", "--force"]).done();

    // One that somebody else has started so, and that goes on because somebody has connected.
    let (qmp, ram) = (directory.join("qmp"), a.ram_dir().join("waits"));
    let memory = format!("memory-backend-file,id=ram,size=32M,share=on,mem-path={}", ram.display());
    let mut command = a.command(pair.qemu_program());
    command.args(["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-object", &memory]);
    command.args(["-machine", "pc,memory-backend=ram"]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
    command.args(["-serial", &format!("unix:{},server=on", serial.display())]);
    let mut qemu = command.spawn().unwrap();
    let mut console = None;
    until("the console is connected to", || {
        console = UnixStream::connect(&serial).ok();
        console.is_some()
    });
    let adopt = ["adopt", "theirs", "--qmp", qmp.to_str().unwrap()];
    until("it is adopted", || vmirror(a, &adopt).code == Some(0));
    assert_eq!(pair.check("theirs"), Vec::<String>::new());
    let _ = pair.migrate("theirs", a, b, &[]);
    until("the source's QEMU has ended", || qemu.try_wait().unwrap().is_some());
    until("the console can be connected to", || UnixStream::connect(&serial).is_ok());
}
