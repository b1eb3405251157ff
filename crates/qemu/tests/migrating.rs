//! From source to destination with QEMU's own stream and without the RAM in it: what the mirror relies on.
//!
//! `QEMU_OTHER=/path` names a second QEMU; then the same runs between the two versions.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

#[expect(dead_code, reason = "each test program uses a part of the fixture")]
mod machine;

use std::{path::PathBuf, time::Duration};

use machine::Place;
use qemu::spec::render::{Permissions, Purpose, Rendering};
use qemu::{Destination, Process, Qmp, Spec};

/// A machine with devices of many kinds, a tap-less network card and files that must not be truncated.
fn options(place: &Place) -> Vec<String> {
    let serial = place.path("serial.log").display().to_string();
    let mut words: Vec<String> = [
        "-m",
        "64",
        "-smp",
        "2",
        "-serial",
        "file:",
        "-vga",
        "std",
        "-device",
        "virtio-rng-pci,id=rng",
        "-device",
        "virtio-balloon-pci",
        "-netdev",
        "hubport,id=n,hubid=0",
        "-device",
        "virtio-net-pci,netdev=n,mac=52:54:00:00:00:07,romfile=",
        "-device",
        "qemu-xhci,id=usb",
        "-device",
        "usb-tablet",
        "-rtc",
        "base=utc",
        "-uuid",
        "7d0ee1d2-68b3-4a66-9dd0-8f7fbfaf5b3c",
        "-pidfile",
        "old",
        "-S",
    ]
    .map(str::to_owned)
    .to_vec();
    words[5] = format!("file:{serial}");
    let pid_file = words.iter().position(|word| word == "old").unwrap();
    words[pid_file] = place.path("user.pid").display().to_string();
    words
}

struct Side {
    process: Process,
    spec: Spec,
    qmp: Qmp,
}

/// Starts a machine with `binary` and moves it on through each of `hops`.
async fn travel(machine: &str, binary: &str, hops: &[&str]) {
    let place = Place::new();
    let words = options(&place);
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    words.extend(["-M", machine]);
    let mut spec = Place::spec(&words);
    spec.set_binary(&PathBuf::from(binary));
    spec.make_mirrorable(&place.mirrorable("vm")).unwrap();
    let process = place.launch(&spec).await;
    let qmp = Qmp::connect(&process.qmp_socket).await.unwrap();
    std::fs::write(place.path("serial.log"), "what the guest has said so far\n").unwrap();
    let mut source = Side { process, spec, qmp };
    let versioned = source.qmp.machine_type().await.unwrap();
    let features = source.qmp.cpu_features().await.unwrap();
    for (hop, binary) in hops.iter().enumerate() {
        // Firmware runs a little, so that there is state which is not that of a fresh machine.
        source.qmp.cont().await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        source.qmp.stop().await.unwrap();
        let registers = machine::human(&source.qmp, "info registers -a").await;
        let destination = arrive(&place, &source, hop, binary, &versioned).await;
        assert_eq!(machine::human(&destination.qmp, "info registers -a").await, registers, "hop {hop}");
        assert_eq!(destination.qmp.machine_type().await.unwrap(), versioned);
        let arrived = destination.qmp.cpu_features().await.unwrap();
        for (feature, on) in &features {
            // A newer QEMU knows more features; those that both know must agree.
            assert_eq!(arrived.get(feature).unwrap_or(on), on, "{feature}");
        }
        source.qmp.quit().await.unwrap();
        assert!(source.process.wait_for_end(Duration::from_secs(20)).await);
        destination.qmp.cont().await.unwrap();
        assert!(destination.qmp.status().await.unwrap().running);
        source = Side { spec: destination.spec.without_incoming(), ..destination };
    }
    let said = std::fs::read_to_string(place.path("serial.log")).unwrap();
    assert!(said.starts_with("what the guest has said so far\n"), "the serial log was truncated: {said:?}");
}

/// One hop: the RAM file copied while the machine is paused, everything else through QEMU's stream.
async fn arrive(place: &Place, source: &Side, hop: usize, binary: &str, versioned: &str) -> Side {
    let ram_dir = place.ram.path().join(hop.to_string());
    std::fs::create_dir(&ram_dir).unwrap();
    qemu::RamDirectory::open(&qemu::spec::ram_directory(&ram_dir, "host")).unwrap();
    let how = Destination {
        name: "vm".to_owned(),
        binary: binary.into(),
        machine: versioned.to_owned(),
        host: "host".to_owned(),
        ram_dir,
        huge_dirs: Vec::new(),
        qmp_socket: place.path(&format!("hop{hop}.qmp")),
        taps: Vec::new(),
        macvtaps: Vec::new(),
    };
    let own = place.path(&format!("hop{hop}.d"));
    std::fs::create_dir(&own).unwrap();
    let permissions = Permissions { output_dirs: vec![place.path("")], ..Permissions::default() };
    let rendering = Rendering { permissions: &permissions, directory: &own, purpose: Purpose::Machine };
    let spec = source.spec.for_destination(&how).unwrap().render(&rendering).unwrap().spec;
    let process = place.launch(&spec).await;
    let qmp = Qmp::connect(&process.qmp_socket).await.unwrap();
    assert_eq!(qmp.status().await.unwrap().status, "inmigrate");
    let stream = format!("unix:{}", place.path(&format!("hop{hop}.stream")).display());
    source
        .qmp
        .set_capabilities(&[("x-ignore-shared", true), ("pause-before-switchover", true), ("events", true)])
        .await
        .unwrap();
    qmp.set_capabilities(&[("x-ignore-shared", true), ("events", true)]).await.unwrap();
    qmp.migrate_incoming(&stream).await.unwrap();
    let mut arriving = qmp.events();
    let mut events = source.qmp.events();
    source.qmp.migrate(&stream).await.unwrap();
    wait_for(&mut events, "pre-switchover").await;
    for block in qemu::ram_blocks(&source.process, &source.spec, &qemu::RamAddresses::new()).unwrap() {
        let other = qemu::ram_blocks(&process, &spec, &qemu::RamAddresses::new())
            .unwrap()
            .into_iter()
            .find(|other| other.id == block.id)
            .unwrap();
        assert_eq!(block.size, other.size);
        std::fs::copy(&block.path, &other.path).unwrap();
    }
    source.qmp.migrate_continue().await.unwrap();
    wait_for(&mut events, "completed").await;
    wait_for(&mut arriving, "completed").await;
    let state = source.qmp.query_migrate().await.unwrap();
    let ram = state.ram["transferred"].as_u64().unwrap();
    // The 16 MiB of video memory are private and travel, mostly zero; 64 MiB of guest RAM do not.
    assert!(ram < 24 << 20, "{ram} bytes of RAM were sent by QEMU");
    assert_eq!(source.qmp.status().await.unwrap().status, "postmigrate");
    assert!(!qmp.status().await.unwrap().running, "the destination waits to be told");
    Side { process, spec, qmp }
}

async fn wait_for(events: &mut tokio::sync::broadcast::Receiver<qemu::Event>, status: &str) {
    let wait = async {
        loop {
            let event = events.recv().await.unwrap();
            if event.name == "MIGRATION" && event.data["status"] == status {
                break;
            }
            assert!(
                event.name != "MIGRATION" || event.data["status"] != "failed",
                "the migration has failed"
            );
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .unwrap_or_else(|_| panic!("no {status} in a minute"));
}

#[tokio::test]
async fn a_machine_moves_on_and_on_without_its_ram_in_the_stream() {
    let qemu = machine::qemu();
    travel("q35", &qemu, &[&qemu, &qemu]).await;
    travel("pc", &qemu, &[&qemu]).await;
}

#[tokio::test]
async fn a_machine_moves_between_versions_of_qemu_and_back() {
    let Ok(other) = std::env::var("QEMU_OTHER") else {
        eprintln!("SKIPPED: migration between versions of QEMU; QEMU_OTHER=/path names the second one");
        return;
    };
    let qemu = machine::qemu();
    // Machine types that every QEMU since 7.2 has.
    travel("pc-q35-7.2", &qemu, &[&other, &qemu, &other]).await;
    travel("pc-i440fx-7.2", &qemu, &[&other]).await;
}
