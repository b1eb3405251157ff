//! Disks of real QEMUs mirrored into an NBD export, and the mirror ended without a trace. No guest: writes come from
//! QEMU's own I/O command, through the same node as those of a guest's device.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

#[expect(dead_code, reason = "each test program uses a part of the fixture")]
mod machine;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use machine::{Place, human};
use qemu::{
    Create, ImageLock, ImageLockError, NewFormat, Process, Qmp, Serve, ServedBacking, StorageDaemon,
    StorageDaemonError, in_use,
    qmp::{ExportError, JobEvent, JobNews, MirrorEnd, MirrorJob, NbdNode, Sync},
};

const SIZE: u64 = 32 << 20;

type Events = tokio::sync::broadcast::Receiver<qemu::Event>;

async fn daemon(place: &Place, name: &str) -> StorageDaemon {
    let directory = place.path(name);
    std::fs::create_dir(&directory).unwrap();
    let daemon = StorageDaemon::start(Path::new(&machine::qemu()), &directory, |_| Ok(())).await.unwrap();
    place.end_with_place(daemon.process());
    daemon
}

fn raw_image(path: &Path) -> Create {
    Create { path: path.to_owned(), format: NewFormat::Raw, size: SIZE, whole_room: false }
}

fn serve(path: &Path, format: &str, export: &str) -> Serve {
    Serve {
        path: path.to_owned(),
        format: format.to_owned(),
        backing: ServedBacking::AsNamed,
        writable: true,
        force_share: false,
        locked: false,
        export: export.to_owned(),
    }
}

/// A disk with something in it, and holes.
fn disk(place: &Place, name: &str) -> PathBuf {
    let path = place.path(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    for (at, byte) in [(0, 1), (5 << 20, 2), (SIZE - 65536, 3)] {
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte; 65536], at).unwrap();
    }
    path
}

/// A machine with virtio disks `d0`, `d1`, …, stopped. The second and later ones have a thread of their own for their I/O.
async fn start(place: &Place, disks: &[(&Path, &str)]) -> (Process, Qmp) {
    let mut options: Vec<String> =
        ["-M", "q35", "-m", "64", "-S", "-object", "iothread,id=io"].map(str::to_owned).to_vec();
    for (number, (path, format)) in disks.iter().enumerate() {
        options.extend([
            "-drive".to_owned(),
            format!("file={},format={format},if=none,id=d{number},discard=unmap", path.display()),
            "-device".to_owned(),
            format!(
                "virtio-blk-pci,drive=d{number},id=vd{number}{}",
                if number > 0 { ",iothread=io" } else { "" }
            ),
        ]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let (process, _, qmp) = place.start("m", &options).await;
    (process, qmp)
}

/// A machine with one disk, and an image that a daemon serves as `disk`, for it to be mirrored into.
struct Ready {
    source: PathBuf,
    copy: PathBuf,
    daemon: StorageDaemon,
    process: Process,
    qmp: Qmp,
    /// The machine's nodes.
    before: Vec<String>,
}

impl Ready {
    async fn new(place: &Place) -> Ready {
        let (source, copy) = (disk(place, "source"), place.path("copy"));
        let daemon = daemon(place, "daemon").await;
        daemon.create(&raw_image(&copy)).await.unwrap();
        daemon.serve(&serve(&copy, "raw", "disk")).await.unwrap();
        let (process, qmp) = start(place, &[(&source, "raw")]).await;
        let before = qmp.node_names().await.unwrap();
        Ready { source, copy, daemon, process, qmp, before }
    }
}

/// Begins to mirror disk `number` into the export `name`: node `name`, job `name`.
async fn mirror(qmp: &Qmp, number: usize, socket: &Path, name: &str, sync: Sync) {
    let drives = qmp.drives().await.unwrap();
    let drive = drives.iter().find(|drive| drive.device == format!("d{number}")).unwrap();
    qmp.add_nbd_node(&NbdNode { node: name, socket, export: name }).await.unwrap();
    let job = MirrorJob {
        job: name,
        device_node: &drive.node,
        target_node: name,
        sync,
        filter_node: &format!("{name}-filter"),
        speed: None,
    };
    qmp.mirror_disk(&job).await.unwrap();
}

async fn until_ready(qmp: &Qmp, job: &str) {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let jobs = qmp.block_jobs().await.unwrap();
        let known = jobs.iter().find(|known| known.id == job).unwrap_or_else(|| panic!("no job {job}"));
        if known.ready {
            assert_eq!((known.kind.as_str(), known.io_status.as_str()), ("mirror", "ok"));
            assert!(known.offset == known.len, "{known:?}");
            return;
        }
        assert!(Instant::now() < end, "{jobs:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Writes as a guest's device would. QEMU prints how it went to its own output, [`assert_all_went_well`] looks at it.
async fn write(qmp: &Qmp, disk: &str, byte: u8, at: u64, len: u64) {
    let said = human(qmp, &format!("qemu-io {disk} \"write -P {byte} {at} {len}\"")).await;
    assert_eq!(said, "");
}

/// Has QEMU check what a disk has.
async fn check(qmp: &Qmp, disk: &str, byte: u8, at: u64, len: u64) {
    let said = human(qmp, &format!("qemu-io {disk} \"read -P {byte} {at} {len}\"")).await;
    assert_eq!(said, "");
}

/// Ends QEMU, so that its output is complete, and looks how many reads and writes went well.
async fn assert_all_went_well(place: &Place, process: &Process, qmp: &Qmp, reads: usize, writes: usize) {
    qmp.quit().await.unwrap();
    assert!(process.wait_for_end(Duration::from_secs(20)).await);
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    let lines = |begin: &str| log.lines().filter(|line| line.starts_with(begin)).count();
    assert!(!log.contains("failed"), "{log}");
    assert_eq!((lines("read "), lines("wrote ")), (reads, writes), "{log}");
}

fn assert_same(a: &Path, b: &Path) {
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap(), "the copy differs");
}

#[tokio::test]
async fn a_mirror_that_ends_leaves_an_equal_copy_and_no_trace() {
    let place = Place::new();
    let Ready { source, copy, daemon, qmp, before, .. } = Ready::new(&place).await;
    let drive = qmp.drives().await.unwrap().remove(0);
    assert_eq!((&drive.path, drive.format.as_str(), drive.virtual_size), (&source, "raw", SIZE));
    assert!(drive.node.starts_with("#block"), "a name that QEMU made up will do: {}", drive.node);
    assert!(drive.qdev.as_deref().is_some_and(|qdev| qdev.contains("vd0")), "{drive:?}");

    write(&qmp, "d0", 0x11, 1 << 20, 4096).await;
    mirror(&qmp, 0, &daemon.nbd_socket(), "disk", Sync::Full).await;
    write(&qmp, "d0", 0x22, 2 << 20, 512).await;
    until_ready(&qmp, "disk").await;
    assert_eq!(qmp.drives().await.unwrap()[0].node, "disk-filter");
    qmp.set_job_speed("disk", 1 << 20).await.unwrap();
    assert_eq!(qmp.block_jobs().await.unwrap()[0].speed, 1 << 20);
    write(&qmp, "d0", 0x33, 3 << 20, 1 << 20).await;
    write(&qmp, "d0", 0, 5 << 20, 65536).await;

    assert_eq!(qmp.end_mirror("disk", false).await.unwrap(), MirrorEnd::Synchronised);
    qmp.remove_node("disk").await.unwrap();
    assert_eq!(qmp.node_names().await.unwrap(), before);
    assert!(qmp.block_jobs().await.unwrap().is_empty());
    assert_same(&source, &copy);
    // What there is none of is gone already.
    assert_eq!(qmp.end_mirror("disk", false).await.unwrap(), MirrorEnd::NoJob);
    qmp.remove_node("disk").await.unwrap();
    // The guest goes on with its own disk.
    write(&qmp, "d0", 0x44, 0, 4096).await;
    assert_eq!(std::fs::read(&source).unwrap()[0], 0x44);
    assert_ne!(std::fs::read(&copy).unwrap()[0], 0x44);

    let begin = Instant::now();
    daemon.end_serving("disk").await.unwrap();
    println!("a raw export ended in {:?}", begin.elapsed());
    let begin = Instant::now();
    daemon.end().await.unwrap();
    println!("the storage daemon ended in {:?}", begin.elapsed());
}

#[tokio::test]
async fn a_mirror_given_up_leaves_no_trace_ready_or_not() {
    let place = Place::new();
    let Ready { daemon, qmp, before, .. } = Ready::new(&place).await;
    for (ready, force) in [(true, true), (false, true), (false, false)] {
        qmp.add_nbd_node(&NbdNode { node: "n", socket: &daemon.nbd_socket(), export: "disk" }).await.unwrap();
        let job = MirrorJob {
            job: "j",
            device_node: &qmp.drives().await.unwrap()[0].node,
            target_node: "n",
            sync: Sync::Full,
            filter_node: "f",
            speed: (!ready).then_some(65536),
        };
        qmp.mirror_disk(&job).await.unwrap();
        if ready {
            until_ready(&qmp, "j").await;
        }
        let refused = qmp.remove_node("n").await.unwrap_err();
        assert!(refused.to_string().contains("in use"), "{refused}");
        assert_eq!(qmp.end_mirror("j", force).await.unwrap(), MirrorEnd::Cancelled, "{ready} {force}");
        qmp.remove_node("n").await.unwrap();
        assert_eq!(qmp.node_names().await.unwrap(), before);
    }
}

#[tokio::test]
async fn a_target_that_dies_does_not_harm_the_guest() {
    let place = Place::new();
    let Ready { daemon, process, qmp, before, .. } = Ready::new(&place).await;
    mirror(&qmp, 0, &daemon.nbd_socket(), "disk", Sync::Full).await;
    until_ready(&qmp, "disk").await;
    let mut events = qmp.events();
    assert!(
        daemon.process().kill().was_sent() && daemon.process().wait_for_end(Duration::from_secs(10)).await
    );
    write(&qmp, "d0", 0x55, 1 << 20, 65536).await;
    let met_error =
        |jobs: Vec<qemu::qmp::BlockJob>| jobs.iter().any(|job| job.id == "disk" && job.met_error());
    while !met_error(qmp.block_jobs().await.unwrap()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        told.extend(JobEvent::of(&event).filter(|event| event.job == "disk").map(|event| event.news));
    }
    assert!(told.contains(&JobNews::IoError { operation: "write".to_owned() }), "{told:?}");
    // The guest goes on writing, and is stopped for the job's end only.
    write(&qmp, "d0", 0x55, 2 << 20, 65536).await;
    qmp.stop().await.unwrap();
    assert_eq!(qmp.end_mirror("disk", true).await.unwrap(), MirrorEnd::Cancelled);
    qmp.cont().await.unwrap();
    qmp.remove_node("disk").await.unwrap();
    assert_eq!(qmp.node_names().await.unwrap(), before);
    check(&qmp, "d0", 0x55, 1 << 20, 65536).await;
    assert_all_went_well(&place, &process, &qmp, 1, 2).await;
}

#[tokio::test]
async fn a_mirror_whose_target_hangs_ends_when_its_connection_is_closed() {
    let place = Place::new();
    let Ready { daemon, qmp, before, .. } = Ready::new(&place).await;
    mirror(&qmp, 0, &daemon.nbd_socket(), "disk", Sync::Full).await;
    let pid = rustix::process::Pid::from_raw(daemon.process().pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let begin = Instant::now();
    let close = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(daemon.process().kill().was_sent());
    };
    let (end, ()) = tokio::join!(qmp.end_mirror("disk", true), close);
    let end = end.unwrap();
    println!("a mirror whose target hangs ended after {:?}: {end:?}", begin.elapsed());
    assert!(matches!(end, MirrorEnd::Cancelled | MirrorEnd::Failed(_)), "{end:?}");
    qmp.remove_node("disk").await.unwrap();
    assert_eq!(qmp.node_names().await.unwrap(), before);
}

#[tokio::test]
async fn only_the_top_image_is_copied_where_the_backing_file_is_there_already() {
    let place = Place::new();
    let base = place.path("base");
    std::fs::write(&base, vec![0xba; SIZE as usize]).unwrap();
    let daemon = daemon(&place, "daemon").await;
    let images = [place.path("top.qcow2"), place.path("copy.qcow2")];
    for path in &images {
        let backing = Some((base.clone(), "raw".to_owned()));
        let format = NewFormat::Qcow2 { cluster_size: Some(65536), backing };
        daemon.create(&Create { path: path.clone(), format, size: SIZE, whole_room: false }).await.unwrap();
        let qemu::Image::Qcow2(header) = qemu::probe_format(path).unwrap() else { panic!() };
        assert_eq!((header.virtual_size, header.cluster_size), (SIZE, 65536));
        assert_eq!((header.backing.as_ref(), header.backing_format.as_deref()), (Some(&base), Some("raw")));
    }
    let [top, copy] = &images;
    daemon.serve(&serve(copy, "qcow2", "disk")).await.unwrap();
    let (process, qmp) = start(&place, &[(top, "qcow2")]).await;
    let drive = qmp.drives().await.unwrap().remove(0);
    assert_eq!((drive.format.as_str(), drive.cluster_size), ("qcow2", Some(65536)));
    assert_eq!((drive.backing.as_ref(), drive.backing_format.as_deref()), (Some(&base), Some("raw")));
    write(&qmp, "d0", 0x77, 1 << 20, 512).await;
    mirror(&qmp, 0, &daemon.nbd_socket(), "disk", Sync::Top).await;
    until_ready(&qmp, "disk").await;
    // A part of a cluster: the rest of it must come from the backing file.
    write(&qmp, "d0", 0x88, (2 << 20) + 4096, 4096).await;
    assert_eq!(qmp.end_mirror("disk", false).await.unwrap(), MirrorEnd::Synchronised);
    qmp.remove_node("disk").await.unwrap();
    let begin = Instant::now();
    daemon.end_serving("disk").await.unwrap();
    println!("a qcow2 export ended in {:?}", begin.elapsed());
    assert_all_went_well(&place, &process, &qmp, 0, 2).await;
    let written = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(copy).unwrap()) * 512;
    assert!(written < 2 << 20, "{written} bytes: the backing file was copied too");

    let (process, qmp) = start(&place, &[(copy, "qcow2")]).await;
    check(&qmp, "d0", 0xba, 0, 1 << 20).await;
    check(&qmp, "d0", 0x77, 1 << 20, 512).await;
    check(&qmp, "d0", 0xba, (1 << 20) + 512, 65024).await;
    check(&qmp, "d0", 0x88, (2 << 20) + 4096, 4096).await;
    check(&qmp, "d0", 0xba, 2 << 20, 4096).await;
    check(&qmp, "d0", 0xba, 3 << 20, SIZE - (3 << 20)).await;
    assert_all_went_well(&place, &process, &qmp, 6, 2).await;
}

#[tokio::test]
async fn two_disks_are_mirrored_at_once() {
    let place = Place::new();
    let daemon = daemon(&place, "daemon").await;
    let sources = [disk(&place, "s0"), disk(&place, "s1")];
    let copies = [place.path("c0"), place.path("c1")];
    let (_, qmp) = start(&place, &[(&sources[0], "raw"), (&sources[1], "raw")]).await;
    let before = qmp.node_names().await.unwrap();
    for (number, copy) in copies.iter().enumerate() {
        daemon.create(&raw_image(copy)).await.unwrap();
        let name = format!("disk{number}");
        daemon.serve(&serve(copy, "raw", &name)).await.unwrap();
        mirror(&qmp, number, &daemon.nbd_socket(), &name, Sync::Full).await;
    }
    until_ready(&qmp, "disk0").await;
    until_ready(&qmp, "disk1").await;
    write(&qmp, "d0", 0x11, 7 << 20, 65536).await;
    write(&qmp, "d1", 0x22, 8 << 20, 65536).await;
    let (first, second) = tokio::join!(qmp.end_mirror("disk0", false), qmp.end_mirror("disk1", false));
    assert_eq!((first.unwrap(), second.unwrap()), (MirrorEnd::Synchronised, MirrorEnd::Synchronised));
    for name in ["disk0", "disk1"] {
        qmp.remove_node(name).await.unwrap();
    }
    assert_eq!(qmp.node_names().await.unwrap(), before);
    assert_same(&sources[0], &copies[0]);
    assert_same(&sources[1], &copies[1]);
}

async fn migration_reaches(events: &mut Events, status: &str) {
    let wait = async {
        loop {
            let event = events.recv().await.unwrap();
            if event.name == "MIGRATION" {
                if event.data["status"] == status {
                    break;
                }
                assert_ne!(event.data["status"], "failed");
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("no {status}"));
}

/// A machine that runs, its disk mirrored, and a migration of it that has paused it; the mirror ended in the pause.
async fn pause_with_mirror(place: &Place) -> (Qmp, Events, StorageDaemon, PathBuf) {
    let Ready { source, copy, daemon, qmp, before, .. } = Ready::new(place).await;
    qmp.cont().await.unwrap();
    mirror(&qmp, 0, &daemon.nbd_socket(), "disk", Sync::Full).await;
    until_ready(&qmp, "disk").await;
    let stream = place.path("stream");
    let listener = tokio::net::UnixListener::bind(&stream).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    });
    let capabilities = [("x-ignore-shared", true), ("pause-before-switchover", true), ("events", true)];
    qmp.set_capabilities(&capabilities).await.unwrap();
    let mut events = qmp.events();
    qmp.migrate(&format!("unix:{}", stream.display())).await.unwrap();
    migration_reaches(&mut events, "pre-switchover").await;
    assert!(!qmp.status().await.unwrap().running);
    // The last of what a guest has written, as far as QEMU has it.
    write(&qmp, "d0", 0x99, 9 << 20, 1 << 20).await;
    let begin = Instant::now();
    assert_eq!(qmp.end_mirror("disk", false).await.unwrap(), MirrorEnd::Synchronised);
    let ended = begin.elapsed();
    qmp.remove_node("disk").await.unwrap();
    println!("in the pause: mirror ended in {ended:?}, node removed after {:?}", begin.elapsed());
    let begin = Instant::now();
    assert_eq!(qmp.node_names().await.unwrap(), before);
    println!("the graph was looked at in {:?}", begin.elapsed());
    assert_same(&source, &copy);
    (qmp, events, daemon, source)
}

#[tokio::test]
async fn a_migration_goes_on_when_the_mirror_was_ended_in_the_pause() {
    let place = Place::new();
    let (qmp, mut events, _, source) = pause_with_mirror(&place).await;
    assert!(in_use(&source).unwrap());
    qmp.migrate_continue().await.unwrap();
    migration_reaches(&mut events, "completed").await;
    assert_eq!(qmp.status().await.unwrap().status, "postmigrate");
    assert!(!in_use(&source).unwrap(), "the image is free for another QEMU");
}

#[tokio::test]
async fn a_machine_runs_on_when_its_migration_is_given_up_after_the_mirror_was_ended() {
    let place = Place::new();
    let (qmp, mut events, daemon, source) = pause_with_mirror(&place).await;
    qmp.migrate_cancel().await.unwrap();
    migration_reaches(&mut events, "cancelled").await;
    qmp.cont().await.unwrap();
    assert!(qmp.status().await.unwrap().running);
    write(&qmp, "d0", 0xaa, 1 << 20, 65536).await;
    assert_eq!(std::fs::read(&source).unwrap()[1 << 20], 0xaa);
    // And can be mirrored again.
    mirror(&qmp, 0, &daemon.nbd_socket(), "disk", Sync::Full).await;
    until_ready(&qmp, "disk").await;
    assert_eq!(qmp.end_mirror("disk", false).await.unwrap(), MirrorEnd::Synchronised);
    assert_same(&source, &place.path("copy"));
}

#[tokio::test]
async fn a_node_is_exported_unless_the_user_exports_one() {
    let place = Place::new();
    let source = disk(&place, "source");
    let (_, qmp) = start(&place, &[(&source, "raw")]).await;
    let node = qmp.drives().await.unwrap().remove(0).node;
    let (ours, users) = (place.path("ours"), place.path("users"));
    let server = serde_json::json!({ "addr": { "type": "unix", "data": { "path": users } } });
    qmp.execute_raw("nbd-server-start", server).await.unwrap();
    let taken = qmp.export_node(&ours, &node, "disk").await;
    assert!(matches!(taken, Err(ExportError::ServerTaken)), "{taken:?}");
    qmp.end_export(&ours, "disk").await.unwrap();
    assert!(std::os::unix::net::UnixStream::connect(&users).is_ok(), "the user's server is left alone");
    qmp.execute_raw("nbd-server-stop", serde_json::Value::Null).await.unwrap();

    let refused = qmp.export_node(&ours, "none", "disk").await;
    assert!(matches!(refused, Err(ExportError::Qmp(_))), "{refused:?}");
    for _ in 0..2 {
        qmp.export_node(&ours, &node, "disk").await.unwrap();
        qmp.end_export(&ours, "disk").await.unwrap();
        assert!(!ours.exists());
        qmp.end_export(&ours, "disk").await.unwrap();
    }
}

#[tokio::test]
async fn an_image_is_never_open_for_two() {
    let place = Place::new();
    let source = disk(&place, "source");
    assert!(!in_use(&source).unwrap());
    let lock = ImageLock::take(&source).unwrap();
    let drive = format!("file={},format=raw,if=none,id=d0", source.display());
    let mut spec =
        Place::spec(&["-M", "q35", "-m", "64", "-S", "-drive", &drive, "-device", "virtio-blk-pci,drive=d0"]);
    spec.make_mirrorable(&place.mirrorable("locked")).unwrap();
    let refused = qemu::launch(&spec, &place.path("log"), qemu::Launch::default(), Vec::new(), |_| Ok(()))
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("Failed to get \"write\" lock"), "{refused}");
    drop(lock);

    let (_, qmp) = start(&place, &[(&source, "raw")]).await;
    assert!(in_use(&source).unwrap());
    let taken = ImageLock::take(&source);
    assert!(matches!(taken, Err(ImageLockError::InUse { .. })), "{taken:?}");
    let daemon = daemon(&place, "daemon").await;
    let refused = daemon.serve(&serve(&source, "raw", "disk")).await.unwrap_err();
    let StorageDaemonError::Qmp(refused) = refused else { panic!("{refused}") };
    assert!(refused.to_string().contains("Failed to get \"write\" lock"), "{refused}");
    assert_eq!(daemon.qmp().node_names().await.unwrap(), Vec::<String>::new());
    let for_reading = Serve { writable: false, force_share: true, ..serve(&source, "raw", "disk") };
    daemon.serve(&for_reading).await.unwrap();
    write(&qmp, "d0", 1, 0, 512).await;
}

#[tokio::test]
async fn a_storage_daemon_is_found_again_and_ended() {
    let place = Place::new();
    let first = daemon(&place, "daemon,x").await;
    let path = place.path("a.qcow2");
    let image = Create {
        path: path.clone(),
        format: NewFormat::Qcow2 { cluster_size: None, backing: None },
        size: SIZE,
        whole_room: false,
    };
    first.create(&image).await.unwrap();
    let there = first.create(&image).await.unwrap_err();
    assert!(matches!(there, StorageDaemonError::File { .. }), "{there}");
    let wrong = NewFormat::Qcow2 { cluster_size: Some(1000), backing: None };
    let wrong = Create { path: place.path("wrong"), format: wrong, size: SIZE, whole_room: false };
    let refused = first.create(&wrong).await.unwrap_err();
    assert!(
        matches!(&refused, StorageDaemonError::Create { reason, .. } if reason.contains("luster size")),
        "{refused}"
    );
    assert!(!wrong.path.exists());
    first.serve(&serve(&path, "qcow2", "disk")).await.unwrap();
    let too_long = serve(&path, "qcow2", "a-name-of-more-than-26-letters");
    let too_long = first.serve(&too_long).await.unwrap_err();
    assert!(matches!(too_long, StorageDaemonError::ExportName { .. }), "{too_long}");

    let process: Process = serde_json::from_str(&serde_json::to_string(first.process()).unwrap()).unwrap();
    drop(first);
    assert!(process.look().runs());
    let second = StorageDaemon::attach(process.clone()).await.unwrap();
    assert!(in_use(&path).unwrap());
    second.end_serving("disk").await.unwrap();
    second.end_serving("disk").await.unwrap();
    assert!(!in_use(&path).unwrap());
    assert!(ImageLock::take(&path).is_ok());
    second.end().await.unwrap();
    assert!(process.look().is_gone());
}
