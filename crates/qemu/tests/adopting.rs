//! Taking in QEMUs that were started by hand.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

#[expect(dead_code, reason = "each test program uses a part of the fixture")]
mod machine;

use machine::{Place, image};
use qemu::{AdoptError, Qmp, QmpError, adopt, ram_blocks};
use serde_json::json;

/// Options of a machine with shared RAM of 64 MiB.
fn shared(place: &Place) -> Vec<String> {
    let ram = place.ram.path().join("by-hand");
    ["-M", "pc,memory-backend=m", "-m", "64", "-object"]
        .into_iter()
        .map(str::to_owned)
        .chain([format!("memory-backend-file,id=m,size=64M,share=on,mem-path={}", ram.display())])
        .collect()
}

fn start_shared(place: &Place, more: &[&str]) -> std::path::PathBuf {
    let options = shared(place);
    let options: Vec<&str> = options.iter().map(String::as_str).chain(more.iter().copied()).collect();
    place.start_by_hand(&options)
}

#[tokio::test]
async fn a_machine_with_shared_ram_is_adopted_as_it_is() {
    let place = Place::new();
    image(&place.path("disk.raw"));
    let cdrom = image(&place.path("cd.iso"));
    let more = [
        "-drive",
        "file=disk.raw,format=raw,if=virtio",
        "-cdrom",
        &cdrom,
        "-device",
        "virtio-rng-pci,id=rng",
        "-device",
        r#"{"driver":"virtio-balloon-pci"}"#,
        "-serial",
        "file:serial.log",
    ];
    let socket = start_shared(&place, &more);
    let adopted = adopt(&socket).await.unwrap_or_else(|error| panic!("{error:?}"));
    assert!(adopted.machine.starts_with("pc-i440fx-"), "{}", adopted.machine);
    let spec = &adopted.vm.spec;
    assert!(spec.binary().is_absolute());
    let disks: Vec<_> = spec.disks().into_iter().map(|disk| disk.path).collect();
    assert!(disks.contains(&place.path("disk.raw")), "relative paths become absolute: {disks:?}");
    let argv = spec.to_argv().join(" ");
    assert!(argv.contains(&format!("file:{}", place.path("serial.log").display())), "{argv}");
    let blocks = ram_blocks(&adopted.vm.process, spec, &adopted.ram).unwrap();
    assert_eq!((blocks[0].id.as_str(), blocks[0].size), ("m", 64 << 20));
    drop(adopted.qmp);
    assert!(qemu::find(&adopted.vm.process).await.is_alive());
}

#[tokio::test]
async fn a_daemonized_machine_is_adopted() {
    let place = Place::new();
    let pid_file = place.path("pid");
    let socket = start_shared(&place, &["-daemonize", "-pidfile", &pid_file.display().to_string()]);
    machine::wait_until("the daemon has started", || pid_file.exists());
    let adopted = adopt(&socket).await.unwrap_or_else(|error| panic!("{error:?}"));
    place.end_with_place(&adopted.vm.process);
    let pid: u32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert_eq!(adopted.vm.process.pid, pid);
    drop(adopted.qmp);

    let other = Place::new();
    let socket = start_shared(&other, &["-daemonize", "-pidfile", "relative.pid"]);
    let pid_file = other.path("relative.pid");
    machine::wait_until("the daemon has started", || pid_file.exists());
    let error = adopt(&socket).await.unwrap_err().to_string();
    let qmp = Qmp::connect(&socket).await.unwrap();
    other.end_with_place(&qemu::Process::of_pid(qmp.peer().unwrap(), &socket).unwrap());
    assert!(error.starts_with("-pidfile relative.pid has a relative path"), "{error}");
}

/// Where each kind of RAM is that is no named file: found, and read as what the guest's firmware has left there.
#[tokio::test]
async fn ram_that_is_no_named_file_is_found_by_what_qemu_says_of_it() {
    let place = Place::new();
    let two = "memory-backend-ram,size=64M,id";
    let machines: &[&[&str]] = &[
        &["-M", "pc", "-m", "64"],
        &["-M", "pc,memory-backend=m", "-m", "64", "-object", "memory-backend-memfd,id=m,size=64M,share=on"],
        &["-M", "pc", "-m", "64", "-mem-path", "/dev/shm"],
        // Of one size, so that nothing but QEMU's own word tells which is which.
        &[
            "-M",
            "pc",
            "-m",
            "128",
            "-object",
            &format!("{two}=a"),
            "-object",
            &format!("{two}=b"),
            "-numa",
            "node,memdev=a",
            "-numa",
            "node,memdev=b",
        ],
    ];
    for options in machines {
        let adopted =
            adopt(&place.start_by_hand(options)).await.unwrap_or_else(|e| panic!("{options:?}: {e:?}"));
        let blocks = ram_blocks(&adopted.vm.process, &adopted.vm.spec, &adopted.ram).unwrap();
        adopted.qmp.cont().await.unwrap();
        // Where a BIOS data area is: the size of the memory below 640 KiB, in KiB.
        let mut size = [0; 2];
        machine::wait_until("the firmware has said how much memory there is", || {
            blocks[0].read_at(&mut size, 0x413).unwrap();
            (600..=640).contains(&u16::from_le_bytes(size))
        });
        assert!(blocks.iter().all(|block| block.in_stream), "{options:?}");
    }
}

#[tokio::test]
async fn a_socket_that_another_client_has_is_named() {
    let place = Place::new();
    let socket = start_shared(&place, &[]);
    let other = Qmp::connect(&socket).await.unwrap();
    // Others who wait in line for it, until its queue is full, change nothing about the message.
    let mut waiting = Vec::new();
    while let Ok(stream) = tokio::net::UnixStream::connect(&socket).await {
        waiting.push(stream);
    }
    assert!(!waiting.is_empty(), "the queue was full from the beginning");
    let error = adopt(&socket).await.unwrap_err();
    drop(waiting);
    let AdoptError::Qmp(source @ QmpError::Taken { .. }) = &error else { panic!("{error:?}") };
    let message = source.to_string();
    assert!(message.contains(&socket.display().to_string()) && message.contains("-qmp unix:"), "{message}");
    drop(other);
    adopt(&socket).await.unwrap();
}

#[tokio::test]
async fn what_was_hot_plugged_or_unplugged_is_refused_by_name() {
    let place = Place::new();
    let socket = start_shared(&place, &["-device", "virtio-rng-pci,id=rng"]);
    let refused = async || adopt(&socket).await.unwrap_err().to_string();
    let run = async |command: &'static str, arguments: serde_json::Value| {
        let qmp = Qmp::connect(&socket).await.unwrap();
        qmp.execute_raw(command, arguments).await.unwrap();
        if command == "device_del" {
            // The guest would have to let go of it; without an operating system a reset does.
            qmp.execute_raw("system_reset", serde_json::Value::Null).await.unwrap();
        }
    };
    run("device_add", json!({"driver": "virtio-rng-pci", "id": "hot0"})).await;
    assert_eq!(refused().await, "device hot0 was plugged in after the start and is not on the command line");
    run("device_del", json!({"id": "hot0"})).await;
    adopt(&socket).await.unwrap();
    run("device_del", json!({"id": "rng"})).await;
    assert_eq!(refused().await, "device rng is on the command line but was unplugged");
    run("device_add", json!({"driver": "virtio-rng-pci", "id": "rng"})).await;
    adopt(&socket).await.unwrap();
    run("device_add", json!({"driver": "virtio-rng-pci"})).await;
    assert_eq!(
        refused().await,
        "1 devices without id are plugged in, but 0 are on the command line: virtio-rng-pci"
    );
}

#[tokio::test]
async fn other_images_than_on_the_command_line_are_refused_by_name() {
    let place = Place::new();
    let cd = image(&place.path("cd.iso"));
    let other = image(&place.path("other.iso"));
    let drive = format!("if=none,id=cd,media=cdrom,file={cd}");
    let socket = start_shared(&place, &["-drive", &drive, "-device", "ide-cd,drive=cd,id=ide"]);
    let run = async |command: &'static str, arguments: serde_json::Value| {
        Qmp::connect(&socket).await.unwrap().execute_raw(command, arguments).await.unwrap();
    };
    adopt(&socket).await.unwrap();
    run("blockdev-change-medium", json!({"id": "ide", "filename": other})).await;
    assert!(adopt(&socket).await.unwrap_err().to_string().starts_with(&format!("image {other} is in use")));
    run("blockdev-change-medium", json!({"id": "ide", "filename": cd})).await;
    adopt(&socket).await.unwrap();
    run("eject", json!({"id": "ide", "force": true})).await;
    assert!(
        adopt(&socket)
            .await
            .unwrap_err()
            .to_string()
            .starts_with(&format!("image {cd} is on the command line"))
    );
}

#[tokio::test]
async fn what_cannot_be_adopted_is_said_plainly() {
    let place = Place::new();
    let error = adopt(&place.path("nobody")).await.unwrap_err();
    assert!(matches!(&error, AdoptError::Qmp(QmpError::Connect { .. })), "{error:?}");
    let waiting = start_shared(&place, &["-incoming", "defer"]);
    let error = adopt(&waiting).await.unwrap_err();
    assert_eq!(error.to_string(), "it is not a machine in use: its state is inmigrate");
    // ivshmem is memory of this host: refused with its name though QEMU itself could migrate it.
    let shm = format!(
        "memory-backend-file,id=s,size=1M,share=on,mem-path={}",
        place.ram.path().join("s").display()
    );
    let tied = start_shared(&place, &["-object", &shm, "-device", "ivshmem-plain,memdev=s,id=iv"]);
    let error = adopt(&tied).await.unwrap_err();
    assert!(
        matches!(&error, AdoptError::NotMirrorable(source) if source.to_string().contains("ivshmem-plain")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_snapshot_taken_meanwhile_is_refused_and_its_overlay_is_adopted_once_it_is_on_the_command_line() {
    let place = Place::new();
    image(&place.path("base.raw"));
    let base = "file=base.raw,format=raw,if=none,id=d,file.locking=off";
    let socket = start_shared(&place, &["-drive", base, "-device", "virtio-blk-pci,drive=d,id=vd"]);
    adopt(&socket).await.unwrap();
    let overlay = place.path("overlay.qcow2");
    let snapshot = json!({"device": "d", "snapshot-file": overlay, "format": "qcow2"});
    Qmp::connect(&socket).await.unwrap().execute_raw("blockdev-snapshot-sync", snapshot).await.unwrap();
    let error = adopt(&socket).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("image {} is in use and not on the command line", overlay.display())
    );
    Qmp::connect(&socket).await.unwrap().quit().await.unwrap();
    machine::wait_until("QEMU has ended", || !socket.exists());

    let blockdev = format!("qcow2,node-name=o,file.driver=file,file.filename={}", overlay.display());
    let socket = start_shared(&place, &["-blockdev", &blockdev, "-device", "virtio-blk-pci,drive=o,id=vd"]);
    let adopted = adopt(&socket).await.unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(adopted.vm.spec.disks()[0].path, overlay);
}
