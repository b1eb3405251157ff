//! Starting real QEMUs, finding them again, and what the guest sees of our changes. Firmware only: no kernel needed.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

#[expect(dead_code, reason = "each test program uses a part of the fixture")]
mod machine;

use std::{
    os::fd::AsRawFd,
    process::Command,
    time::{Duration, SystemTime},
};

use machine::{Place, human, wait_until};
use qemu::{LaunchError, Presence, Process, Qmp, QmpError, Spec, ram_blocks};

/// In the environment of a copy of this test program: where it shall leave word of the QEMU that it starts.
const LAUNCHER: &str = "QEMU_TEST_LAUNCHER";

#[tokio::test]
async fn a_launched_machine_is_found_again_and_its_end_is_noticed() {
    let place = Place::new();
    let (process, spec, qmp) = place.start("a", &["-M", "q35", "-m", "64", "-S"]).await;
    assert!(
        matches!(qemu::find(&process).await, Presence::Silent(QmpError::Taken { .. })),
        "our own connection has it"
    );
    drop(qmp);
    let remembered: Process = serde_json::from_str(&serde_json::to_string(&process).unwrap()).unwrap();
    let respec: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
    assert_eq!((&remembered, &respec), (&process, &spec));
    assert!(qemu::find(&remembered).await.is_alive());
    let reused = Process { start_time: process.start_time + 1, ..process.clone() };
    assert!(matches!(qemu::find(&reused).await, Presence::Gone), "a reused process id is not our machine");
    let qmp = Qmp::connect(&process.qmp_socket).await.unwrap();
    qmp.quit().await.unwrap();
    assert!(process.wait_for_end(Duration::from_secs(20)).await);
    assert!(matches!(qemu::find(&process).await, Presence::Gone));
}

#[tokio::test]
async fn a_machine_has_the_descriptors_that_it_is_given_and_no_others() {
    let place = Place::new();
    let mut spec = Place::spec(&["-M", "q35", "-m", "64", "-S"]);
    spec.make_mirrorable(&place.mirrorable("a")).unwrap();
    let open = |name: &str| std::fs::File::create(place.path(name)).unwrap();
    let (given, kept) = (open("given"), open("kept"));
    let numbers = [&given, &kept].map(AsRawFd::as_raw_fd);
    let launched =
        qemu::launch(&spec, &place.path("log"), qemu::Launch::default(), vec![given.into()], |_| Ok(()))
            .await;
    let process = launched.unwrap();
    place.end_with_place(&process);
    let [there, not_there] =
        numbers.map(|number| std::fs::read_link(format!("/proc/{}/fd/{number}", process.pid)).ok());
    assert_eq!(there, Some(place.path("given")));
    assert_ne!(not_there, Some(place.path("kept")));
}

/// Not a test of its own: what the next test runs in a process that then dies.
#[tokio::test]
async fn launcher_that_is_killed() {
    let Ok(directory) = std::env::var(LAUNCHER) else { return };
    let directory = std::path::PathBuf::from(directory);
    let mut spec = Place::spec(&["-M", "q35", "-m", "64", "-S"]);
    let how = qemu::Mirrorable {
        name: "orphan".to_owned(),
        host: "host".to_owned(),
        ram_dir: directory.clone(),
        qmp_socket: directory.join("qmp"),
        pid_file: None,
    };
    spec.make_mirrorable(&how).unwrap();
    qemu::RamDirectory::open(&qemu::spec::ram_directory(&directory, "host")).unwrap();
    let process =
        qemu::launch(&spec, &directory.join("log"), qemu::Launch::default(), Vec::new(), |_| Ok(()))
            .await
            .unwrap();
    std::fs::write(directory.join("process"), serde_json::to_string(&process).unwrap()).unwrap();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_machine_outlives_a_launcher_that_is_killed() {
    let place = Place::new();
    let launcher = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "launcher_that_is_killed", "--nocapture"])
        .env(LAUNCHER, place.directory.path())
        .output()
        .unwrap();
    let text = std::fs::read_to_string(place.path("process"));
    let text = text.unwrap_or_else(|error| panic!("{error}: {launcher:?}"));
    let process: Process = serde_json::from_str(&text).unwrap();
    place.end_with_place(&process);
    assert!(!launcher.status.success(), "the launcher was to be killed");
    assert!(qemu::find(&process).await.is_alive());
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(process.pid.cast_signed())).unwrap();
    assert_eq!(session.as_raw_nonzero().get().cast_unsigned(), process.pid, "a session of its own");
}

#[tokio::test]
async fn a_bad_option_is_reported_in_qemus_words() {
    let place = Place::new();
    let mut spec = Place::spec(&["-m", "64", "-device", "no-such-device"]);
    spec.make_mirrorable(&place.mirrorable("bad")).unwrap();
    std::fs::write(place.path("log"), "words of an earlier run\n").unwrap();
    let error = qemu::launch(&spec, &place.path("log"), qemu::Launch::default(), Vec::new(), |_| Ok(()))
        .await
        .unwrap_err();
    let LaunchError::Ended { status, output } = &error else { panic!("{error}") };
    assert!(!status.success());
    assert!(output.contains("'no-such-device' is not a valid device model name"), "{output}");
    assert!(!output.contains("earlier run"), "{output}");

    let missing = Spec::parse(&["/nonexistent/qemu", "-qmp", "unix:/x"]).unwrap();
    let error = qemu::launch(&missing, &place.path("log"), qemu::Launch::default(), Vec::new(), |_| Ok(()))
        .await
        .unwrap_err();
    assert!(matches!(error, LaunchError::Run { .. }), "{error}");
    let error =
        qemu::launch(&Place::spec(&[]), &place.path("log"), qemu::Launch::default(), Vec::new(), |_| Ok(()))
            .await
            .unwrap_err();
    assert!(matches!(error, LaunchError::NoQmp), "{error}");
}

#[tokio::test]
async fn a_launch_that_is_given_up_leaves_no_process() {
    let place = Place::new();
    // This program ignores its arguments and never answers.
    let script = place.path("silent");
    let pid_file = place.path("pid");
    std::fs::write(
        &script,
        format!("#!/bin/sh\necho $$ > {}.new\nmv {0}.new {0}\nexec sleep 600\n", pid_file.display()),
    )
    .unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut spec = Spec::parse(&[script.display().to_string()]).unwrap();
    spec.make_mirrorable(&place.mirrorable("silent")).unwrap();
    let log = place.path("log");
    let wait_for_pid = async {
        while !pid_file.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        result = qemu::launch(&spec, &log, qemu::Launch::default(), Vec::new(), |_| Ok(())) => panic!("it cannot have started: {result:?}"),
        () = wait_for_pid => {}
    }
    let pid = std::fs::read_to_string(&pid_file).unwrap();
    let proc = format!("/proc/{}/comm", pid.trim());
    wait_for(|| !std::path::Path::new(&proc).exists()).await;
}

async fn wait_for(mut happened: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(30);
    while !happened() {
        assert!(tokio::time::Instant::now() < end, "waited in vain");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_guest_sees_the_same_machine_after_it_was_made_mirrorable() {
    let machines: &[&[&str]] = &[
        &["-M", "q35", "-m", "64"],
        &["-M", "pc", "-m", "5G", "-smp", "2"],
        &["-m", "512,slots=2,maxmem=4G"],
        &[
            "-M",
            "q35",
            "-m",
            "256",
            "-smp",
            "2",
            "-object",
            "memory-backend-ram,id=a,size=128M",
            "-object",
            "memory-backend-memfd,id=b,size=128M",
            "-numa",
            "node,memdev=a,cpus=0",
            "-numa",
            "node,memdev=b,cpus=1",
            "-device",
            "pc-dimm,id=d,memdev=c",
            "-object",
            "memory-backend-ram,id=c,size=64M",
            "-m",
            "256,slots=2,maxmem=1G",
        ],
        &[
            "-M",
            "pc-i440fx-5.0",
            "-m",
            "256",
            "-smp",
            "2",
            "-numa",
            "node,mem=128M,cpus=0",
            "-numa",
            "node,mem=128M,cpus=1",
        ],
        &["-M", "microvm", "-m", "64"],
        &[
            "-M",
            "q35,memory-backend=pc.ram",
            "-object",
            r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864}"#,
            "-m",
            "64",
        ],
    ];
    for (number, options) in machines.iter().enumerate() {
        let place = Place::new();
        let options = [options, ["-S"].as_slice()].concat();
        let plain = Place::spec(&options);
        let socket = place.path("plain");
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let plain = Spec::parse(&[plain.to_argv(), vec!["-qmp".to_owned(), qmp]].concat()).unwrap();
        let before = place.launch(&plain).await;
        let before = Qmp::connect(&before.qmp_socket).await.unwrap();
        let (process, spec, after) = place.start("m", &options).await;
        for view in ["info mtree", "info qtree", "info numa", "info memory-devices"] {
            let [before, after] =
                [human(&before, view).await, human(&after, view).await].map(|text| in_order(&text));
            let first = before.iter().zip(&after).find(|(before, after)| before != after);
            assert!(before == after, "{view} of {options:?} differs: {first:#?}");
        }
        let blocks = ram_blocks(&process, &spec, &qemu::RamAddresses::new()).unwrap();
        let size: u64 = blocks.iter().map(|block| block.size).sum();
        let dimm = if number == 3 { 64 << 20 } else { 0 };
        assert_eq!(size, spec.memory().unwrap() + dimm, "{options:?}");
    }
}

/// The parts of a view in a fixed order: QEMU lists address spaces in the order of their addresses in its own memory.
fn in_order(view: &str) -> Vec<String> {
    let view = view.replace('\r', "");
    let mut parts: Vec<String> = view
        .split("\n\n")
        .map(|part| {
            // Address spaces with the same content are listed together, again in any order.
            let (heads, body): (Vec<&str>, Vec<&str>) =
                part.lines().partition(|line| line.starts_with("address-space:"));
            let mut heads = heads;
            heads.sort_unstable();
            [heads, body].concat().join("\n")
        })
        .collect();
    parts.sort_unstable();
    parts
}

#[tokio::test]
async fn ram_is_found_in_its_file_also_after_the_file_was_deleted() {
    let place = Place::new();
    let (process, spec, qmp) = place.start("r", &["-M", "q35", "-m", "64", "-S"]).await;
    for deleted in [false, true] {
        let mut blocks = ram_blocks(&process, &spec, &qemu::RamAddresses::new()).unwrap();
        assert_eq!(blocks.len(), 1);
        let block = blocks.remove(0);
        assert_eq!((block.id.as_str(), block.size, block.page_size), ("pc.ram", 64 << 20, 4096));
        assert_eq!(block.mappings.iter().map(|mapping| mapping.len).sum::<u64>(), 64 << 20);
        let mark = if deleted { b"gone" } else { b"here" };
        std::os::unix::fs::FileExt::write_all_at(&block.file, mark, 0x30_0000).unwrap();
        let seen = human(&qmp, "xp /4c 0x300000").await;
        for byte in mark {
            assert!(seen.contains(&format!("'{}'", *byte as char)), "{seen}");
        }
        let mut read = [0; 4];
        block.read_at(&mut read, 0x30_0000).unwrap();
        assert_eq!(&read, mark);
        if !deleted {
            std::fs::remove_file(&block.path).unwrap();
            // Another file of that name must not be taken for QEMU's.
            std::fs::write(&block.path, vec![1; 4096]).unwrap();
        }
    }
}

#[tokio::test]
async fn verbs_of_the_monitor() {
    let place = Place::new();
    let options =
        ["-M", "q35", "-m", "64", "-smp", "2", "-cpu", "qemu64,pni=off,-cx16", "-name", "guest one", "-S"];
    let (process, _, qmp) = place.start("v", &options).await;
    let version = qmp.version().await.unwrap();
    assert!(version.major >= 7, "{version:?}");
    let machine = qmp.machine_type().await.unwrap();
    assert!(machine.starts_with("pc-q35-") && machine != "pc-q35-", "{machine}");
    assert_eq!(qmp.name().await.unwrap().as_deref(), Some("guest one"));
    assert!(!qmp.kvm_enabled().await.unwrap());
    let features = qmp.cpu_features().await.unwrap();
    assert_eq!((features["pni"], features["cx16"], features["fpu"]), (false, false, true));
    assert!(features.len() > 100 && !features.contains_key("realized"), "{features:?}");
    assert!(qmp.memory_devices().await.unwrap().is_empty());
    assert_eq!(qmp.query_migrate().await.unwrap().status, None);

    let mut events = qmp.events();
    let before = SystemTime::now();
    assert_eq!(qmp.status().await.unwrap().status, "prelaunch");
    qmp.cont().await.unwrap();
    assert!(qmp.status().await.unwrap().running);
    let vcpus = qmp.vcpus().await.unwrap();
    assert_eq!(vcpus.len(), 2);
    wait_until("vCPU 0 makes progress", || {
        qemu::vcpu_cpu_time(&process, vcpus[0].thread_id).unwrap() > Duration::ZERO
    });
    qmp.stop().await.unwrap();
    for name in ["RESUME", "STOP"] {
        let event = loop {
            let event = events.recv().await.unwrap();
            if event.name == name {
                break event;
            }
        };
        // QEMU stamps with microseconds, cut off.
        assert!(event.timestamp + Duration::from_micros(1) >= before && event.timestamp <= SystemTime::now());
    }
    assert!(matches!(
        qmp.set_capabilities(&[("no-such-capability", true)]).await,
        Err(QmpError::Refused { command: "migrate-set-capabilities", .. })
    ));
    qmp.announce_self().await.unwrap();
    qmp.migrate_cancel().await.unwrap();
}

#[tokio::test]
async fn an_accelerator_is_judged_by_what_a_guest_does() {
    let place = Place::new();
    let module = place.path("initrd");
    std::fs::write(&module, b"x").unwrap();
    let kernel = place.path("kernel");
    std::fs::write(&kernel, kernel_that_says_ok()).unwrap();
    let options: Vec<String> = Vec::new();
    let binary = std::path::PathBuf::from(machine::qemu());
    for (accelerator, marker, expected, seconds) in
        [("tcg", "OK", true, 60), ("tcg", "never said", false, 2), ("no-such-accelerator", "OK", false, 60)]
    {
        let guest = qemu::ProbeGuest { kernel: &kernel, initrd: &module, append: "", marker };
        let works =
            qemu::accelerator_works(&binary, &options, accelerator, &guest, Duration::from_secs(seconds))
                .await;
        assert_eq!(works.unwrap(), expected, "{accelerator} {marker}");
    }
}

/// A multiboot kernel (GNU Multiboot Specification 0.6.96, section 3.1) of 14 instructions: writes "OK" to the first
/// serial port and halts.
fn kernel_that_says_ok() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const MAGIC: u32 = 0x1bad_b002;
    /// The addresses are in the header, not in an ELF one.
    const FLAGS: u32 = 1 << 16;
    let code = [
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'O', 0xee, // mov al, 'O'; out dx, al
        0xb0, b'K', 0xee, // mov al, 'K'; out dx, al
        0xf4, 0xeb, 0xfd, // hlt; jmp back to it
    ];
    let entry = LOAD + 32;
    let header = [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS), LOAD, LOAD, 0, 0, entry];
    let mut kernel: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend_from_slice(&code);
    // QEMU looks at the first 8 KiB.
    kernel.resize(8192, 0);
    kernel
}

#[tokio::test]
async fn what_devices_were_saved_to_is_closed_when_the_guest_runs_again() {
    let place = Place::new();
    let (process, _, qmp) = place.start("a", &["-M", "q35", "-m", "64"]).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let is_open = || {
        let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid)).unwrap();
        open.flatten().any(|open| std::fs::read_link(open.path()).is_ok_and(|to| to == file.path()))
    };
    qmp.stop().await.unwrap();
    for _ in 0..2 {
        let to_write = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
        qmp.save_devices(to_write.into()).await.unwrap();
    }
    assert!(file.as_file().metadata().unwrap().len() > 0);
    qmp.cont().await.unwrap();
    qmp.close_saved_devices().await.unwrap();
    assert!(!is_open());
    qmp.close_saved_devices().await.unwrap();
}

#[tokio::test]
async fn a_descriptor_given_to_qemu_is_the_same_file_there_until_taken_back() {
    let place = Place::new();
    let (process, _, qmp) = place.start("a", &["-M", "q35", "-m", "64"]).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let given = qmp.give_descriptor(std::fs::File::open(file.path()).unwrap().into()).await.unwrap();
    let there = format!("/proc/{}/fd/{}", process.pid, given.number);
    assert_eq!(std::fs::read_link(&there).unwrap(), file.path());
    qmp.take_descriptor_back(&given).await.unwrap();
    assert_ne!(std::fs::read_link(&there).ok().as_deref(), Some(file.path()));
    assert!(qmp.take_descriptor_back(&given).await.is_err());
}
