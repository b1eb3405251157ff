//! The testbed's own network: what goes through, how fast, and that nothing remains.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, Programs, Testbed, Wire, root_or_skip};

const BOOT: Duration = Duration::from_secs(120);

fn testbed() -> Testbed {
    Testbed::with(&Programs { vmirror: None, ..Programs::find() }).unwrap()
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn own_traces() -> Vec<String> {
    let mark = format!("vmirror-test-{}-", std::process::id());
    ["/run/netns", "/dev/shm", std::env::temp_dir().to_str().unwrap()]
        .into_iter()
        .flat_map(|directory| std::fs::read_dir(directory).into_iter().flatten().flatten())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&mark))
        .collect()
}

#[test]
fn heartbeats_and_connections_reach_a_guest_through_the_bridges() {
    if !root_or_skip("heartbeats_and_connections_reach_a_guest_through_the_bridges") {
        return;
    }
    let testbed = testbed();
    testbed.a().add_tap("tap0").unwrap();
    let nic = Nic::new("tap0", 10);
    let address = nic.address;
    let spec = GuestSpec {
        fill_mib: 16,
        memory_mib: 256,
        nic: Some(nic),
        ..GuestSpec::new(testbed.a().serial("vm")).unwrap()
    };
    let mut guest = testbed.a().boot(&spec).unwrap();
    guest.wait_ready(BOOT).unwrap();

    let client = testbed.client().unwrap();
    assert_eq!(client.status(address).unwrap().pages, 16 * 256);
    let echo = client.echo(address, 20).unwrap();
    let heartbeats = client.heartbeats(address, 200).unwrap();
    while heartbeats.report().received < 200 {
        assert!(guest.exit_status().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }
    // A pause of the whole machine is a gap, and connections survive it.
    let paused = testbed::fault::pause(guest.pid());
    std::thread::sleep(Duration::from_millis(400));
    drop(paused);
    let (received, bytes) = (heartbeats.report().received, echo.report().bytes);
    while heartbeats.report().received < received + 200 || echo.report().bytes == bytes {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (heartbeats, echo) = (heartbeats.stop(), echo.stop());
    assert!(heartbeats.longest_gap >= Duration::from_millis(380), "{heartbeats:?}");
    assert_eq!((echo.mismatches, echo.broken.as_slice()), (0, &[][..]), "{echo:?}");
    assert!(echo.longest_stall >= Duration::from_millis(300), "{echo:?}");
}

/// Sends bytes from host A to host B over the agents' network; gives back how long they took.
fn transfer(testbed: &Testbed, bytes: usize) -> Duration {
    const PORT: u16 = 7999;
    // Python is no part of a fresh machine; bash and head are.
    let listener =
        in_namespace(testbed.b(), || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap());
    let to = testbed.b().listen().ip();
    let mut sender = testbed.a().command("bash");
    sender.args(["-c", &format!("head -c {bytes} /dev/zero > /dev/tcp/{to}/{PORT}")]);
    let mut sender = sender.stdout(Stdio::null()).spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let (start, mut received, mut buffer) = (Instant::now(), 0, vec![0; 1 << 16]);
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            length => received += length,
        }
    }
    let time = start.elapsed();
    assert!(sender.wait().unwrap().success());
    assert_eq!(received, bytes);
    time
}

fn in_namespace<T: Send>(host: &Host, inside: impl FnOnce() -> T + Send) -> T {
    host.on_network(inside).unwrap()
}

#[test]
fn a_set_rate_holds_and_can_be_taken_away() {
    if !root_or_skip("a_set_rate_holds_and_can_be_taken_away") {
        return;
    }
    let testbed = testbed();
    let bytes = 4 << 20;
    testbed.set_rate(testbed.a(), Wire::Link, 20_000_000).unwrap();
    let limited = transfer(&testbed, bytes);
    // 4 MiB at 20 Mbit/s take 1.68 s, less what fits the bucket.
    assert!((1.4..4.0).contains(&limited.as_secs_f64()), "{limited:?}");
    testbed.clear_rate(testbed.a(), Wire::Link).unwrap();
    testbed.clear_rate(testbed.a(), Wire::Link).unwrap();
    let free = transfer(&testbed, bytes);
    assert!(free < limited / 3, "{free:?} unlimited, {limited:?} limited");
}

#[test]
fn a_cut_link_is_silent_until_mended() {
    if !root_or_skip("a_cut_link_is_silent_until_mended") {
        return;
    }
    let testbed = testbed();
    let listener =
        in_namespace(testbed.b(), || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7998)).unwrap());
    let address = std::net::SocketAddr::new(testbed.b().listen().ip(), 7998);
    let mut sender = in_namespace(testbed.a(), || std::net::TcpStream::connect(address).unwrap());
    let (mut receiver, _) = listener.accept().unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    let mut byte = [0];
    testbed.cut(testbed.b(), Wire::Link).unwrap();
    sender.write_all(b"x").unwrap();
    assert!(receiver.read(&mut byte).is_err(), "nothing arrives");
    testbed.mend(testbed.b(), Wire::Link).unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    receiver.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_guest_that_comes_and_goes_leaves_the_host_as_it_was() {
    if !root_or_skip("a_guest_that_comes_and_goes_leaves_the_host_as_it_was") {
        return;
    }
    let testbed = testbed();
    let host = testbed.a();
    let before = host.inventory().unwrap();
    assert!(before.processes.is_empty() && before.ram_bytes == 0, "{before:?}");
    host.add_tap("tap0").unwrap();
    let ram = host.ram_dir().join("vm");
    let spec = GuestSpec {
        fill_mib: 16,
        memory_mib: 256,
        nic: Some(Nic::new("tap0", 10)),
        ram: testbed::guest_spec::Ram::File(ram.clone()),
        qmp: Some(host.run_dir().join("vm.qmp")),
        ..GuestSpec::new(host.serial("vm")).unwrap()
    };
    let mut guest = host.boot(&spec).unwrap();
    guest.wait_ready(BOOT).unwrap();
    let during = host.inventory().unwrap();
    let difference = before.difference(&during).unwrap_err().to_string();
    for part in [
        "process qemu-system-x86_64 appeared: 1",
        "link tap0 appeared",
        "vm.qmp appeared",
        "descriptor dev/net/tun",
        "RAM in use",
    ] {
        assert!(difference.contains(part), "{part}: {difference}");
    }
    drop(guest);
    host.remove_tap("tap0").unwrap();
    std::fs::remove_file(ram).unwrap();
    let _ = std::fs::remove_file(host.run_dir().join("vm.qmp"));
    host.settle(&before, Duration::from_secs(10)).unwrap().unwrap();
}

#[test]
fn a_dropped_testbed_leaves_nothing_and_a_living_one_is_not_swept() {
    if !root_or_skip("a_dropped_testbed_leaves_nothing_and_a_living_one_is_not_swept") {
        return;
    }
    let name = {
        let testbed = testbed();
        let name = testbed.directory().file_name().unwrap().to_str().unwrap().to_owned();
        let mut sleeper = testbed.b().command("sleep").arg("1000").spawn().unwrap();
        testbed::sweep::sweep();
        assert!(sleeper.try_wait().unwrap().is_none());
        // Its directory, its consoles, and of four hosts a namespace each and of two a file system for RAM.
        assert_eq!(own_traces().iter().filter(|trace| trace.starts_with(&name)).count(), 8);
        drop(testbed);
        assert!(!sleeper.wait().unwrap().success(), "whatever ran on a host ends with the testbed");
        name
    };
    assert!(!own_traces().iter().any(|trace| trace.starts_with(&name)), "{:?}", own_traces());
}

#[test]
fn a_panic_leaves_nothing() {
    if !root_or_skip("a_panic_leaves_nothing") {
        return;
    }
    let name = std::sync::Mutex::new(String::new());
    let panic = std::panic::catch_unwind(|| {
        let testbed = testbed();
        *name.lock().unwrap() = testbed.directory().file_name().unwrap().to_str().unwrap().to_owned();
        panic!("as a failing assertion would");
    });
    assert!(panic.is_err());
    let name = name.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert!(!name.is_empty() && !own_traces().iter().any(|trace| trace.starts_with(&name)));
}

#[test]
fn what_a_dead_process_left_is_swept() {
    if !root_or_skip("what_a_dead_process_left_is_swept") {
        return;
    }
    // A process that has ended, for a name that nobody alive can have given.
    let mut child = Command::new("true").spawn().unwrap();
    let dead = child.id();
    child.wait().unwrap();
    let name = format!("vmirror-test-{dead}-0-a");
    output(Command::new("ip").args(["netns", "add", &name]));
    let mut orphan = Command::new("ip").args(["netns", "exec", &name, "sleep", "1000"]).spawn().unwrap();
    let mut marked = Command::new("sleep").arg("1000").env("VMIRROR_TESTBED", &name).spawn().unwrap();
    let ram = std::path::Path::new("/dev/shm").join(&name);
    std::fs::create_dir(&ram).unwrap();
    output(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", &name]).arg(&ram));
    // The sleepers must have become what they are to be.
    let is_sleep = |pid: u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
    };
    while !(is_sleep(orphan.id()) && is_sleep(marked.id())) {
        std::thread::sleep(Duration::from_millis(5));
    }

    testbed::sweep::sweep();
    assert!(!orphan.wait().unwrap().success() && !marked.wait().unwrap().success());
    assert!(!ram.exists());
    assert!(!std::path::Path::new("/run/netns").join(&name).exists());
}

#[test]
fn room_for_guest_memory_can_be_limited() {
    if !root_or_skip("room_for_guest_memory_can_be_limited") {
        return;
    }
    let testbed = testbed();
    testbed.a().limit_ram(1 << 20).unwrap();
    let error = std::fs::write(testbed.a().ram_dir().join("ram"), vec![1; 2 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    std::fs::write(testbed.b().ram_dir().join("ram"), vec![1; 2 << 20]).unwrap();
}
