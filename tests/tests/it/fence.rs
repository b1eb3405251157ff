//! A machine that has left must not be started once more from the images that it has left behind, whoever tries.

use std::path::PathBuf;

use end_to_end::{Guest, Pair, Refusal, Supervisor, image, local, noise, report_adds_up, until, vmirror};
use session::points;
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Io, Pattern, Ram, TestDisk, Work};
use testbed::{AgentOptions, Host, Status, Testbed, root_or_skip};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const DISKS: [(&str, Format); 2] = [("work", Format::Raw), ("more", Format::Qcow2)];

/// A guest that somebody starts again whenever it ends, adopted, and at work on its disks.
struct Scene {
    supervisor: Supervisor,
    guest: Guest,
    before: Status,
    pair: Pair,
}

impl Scene {
    fn new() -> Option<Scene> {
        Scene::with(&local())
    }

    fn with(options: &AgentOptions) -> Option<Scene> {
        if !root_or_skip("hosts with storage of their own") {
            return None;
        }
        let testbed = Testbed::new().unwrap();
        testbed.hosts().iter().for_each(|host| host.start_agent_with(options).unwrap());
        let pair = Pair::with_running_agents(testbed);
        let a = pair.a();
        let disks = DISKS.map(|(name, format)| {
            disk::create(&image(a, name), format, SIZE).unwrap();
            let work =
                Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 50, depth: 1, check_rate: 20 };
            TestDisk { roles: vec![work.within(8)], ..TestDisk::new(a.local_dir().join(name), format, name) }
        });
        let qmp = a.directory().join("own.qmp");
        let spec = GuestSpec {
            ram: Ram::File(a.ram_dir().join("own")),
            qmp: Some(qmp.clone()),
            fill_mib: 16,
            rate: 50,
            disks: disks.to_vec(),
            ..pair.spec("vm", 128)
        };
        let supervisor = Supervisor::of(a, &spec);
        let guest = Guest::ready("vm", &spec);
        let _ = vmirror(a, &["adopt", "vm", "--qmp", qmp.to_str().unwrap()]).done();
        let before = guest.status();
        Some(Scene { supervisor, guest, before, pair })
    }

    fn a(&self) -> &Host {
        self.pair.a()
    }

    fn b(&self) -> &Host {
        self.pair.b()
    }

    /// From here on, who tries to start it once more fails, again and again.
    fn none_is_started_again(&self) {
        let (begun, out) = (self.supervisor.begun(), self.supervisor.locked_out());
        until("it was tried some times", || self.supervisor.begun() > begun + 4);
        assert!(self.supervisor.locked_out() >= out + 3, "{}\n{}", self.supervisor.said(), self.pair.logs());
        // It is the same boot, and nothing was lost.
        let _ = self.guest.sane_since(&self.before);
        assert!(self.pair.runs_on("vm", self.b()), "{}", self.pair.logs());
    }
}

/// Whether a QEMU that is started now on such an image would find it locked.
fn is_locked(host: &Host, name: &str) -> bool {
    qemu::in_use(&image(host, name)).unwrap()
}

/// How many processes keep images locked.
fn holders(host: &Host) -> usize {
    let holds = |pid: &i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("hold-locks")
    };
    host.processes().iter().filter(|pid| holds(pid)).count()
}

#[test]
fn whoever_starts_it_again_makes_no_second_copy() {
    let Some(scene) = Scene::new() else { return };
    let report = scene.pair.migrate("vm", scene.a(), scene.b(), &[]);
    report_adds_up(&report, &scene.guest);
    scene.none_is_started_again();

    // What is kept is told.
    let left = scene.pair.left("vm", scene.a()).unwrap();
    assert_eq!(left["kept"]["to"], "host-b", "{left}");
    let images = left["kept"]["images"].as_array().unwrap();
    assert_eq!(images.len(), DISKS.len(), "{left}");
    assert!(images.iter().all(|image| image.get("problem").is_none()), "{left}");
    let list = vmirror(scene.a(), &["list"]).done().stdout;
    assert!(list.contains("left → host-b; 2 images kept locked"), "{list}");
    let shown = vmirror(scene.a(), &["show", "vm"]).done().stdout;
    assert!(shown.contains(&scene.a().local_dir().join("more").display().to_string()), "{shown}");
    // Who is meant by a command is elsewhere.
    Refusal::of(scene.a(), &["stop", "vm"]).is("has-left", &["vm", "host-b"]);
    // Reading is nobody's harm.
    let copy = scene.a().directory().join("copy");
    disk::copy_raw(&image(scene.a(), "more"), Format::Qcow2, &copy).unwrap();

    // Neither while no agent runs, nor while one starts, is a moment to start it in.
    for kill in [true, false] {
        if kill { scene.a().kill_agent() } else { scene.a().stop_agent() }.unwrap();
        scene.none_is_started_again();
        scene.a().start_agent_with(&local()).unwrap();
        scene.none_is_started_again();
        assert_eq!(holders(scene.a()), 1, "{}", scene.pair.logs());
    }
    assert!(scene.pair.left("vm", scene.a()).is_some());
    // What would start it is known, and not let in by accident.
    Refusal::of(scene.a(), &["forget-images", "vm"])
        .is("supervised", &["a loop of a shell", "vm", "--force"]);
    scene.none_is_started_again();
    let _ = scene.guest.sound_since(&scene.before);
}

#[test]
fn images_stay_locked_when_the_state_directory_is_lost() {
    let Some(scene) = Scene::new() else { return };
    let Scene { supervisor, guest, before, pair } = scene;
    let (a, b) = (pair.a(), pair.b());
    report_adds_up(&pair.migrate("vm", a, b, &[]), &guest);
    a.kill_agent().unwrap();
    std::fs::remove_dir_all(a.state_dir()).unwrap();
    a.start_agent_with(&local()).unwrap();
    // An agent that ends what it does not know does so at its first look.
    let (begun, out) = (supervisor.begun(), supervisor.locked_out());
    until("it was tried some times", || supervisor.begun() > begun + 12);
    assert!(supervisor.locked_out() >= out + 8, "{}\n{}", supervisor.said(), pair.logs());
    assert_eq!(holders(a), 1);
    assert!(pair.runs_on("vm", b), "{}", pair.logs());
    let list = vmirror(a, &["list"]).done().stdout;
    assert!(list.contains("left → an unknown place; 2 images kept locked"), "{list}");
    let left = pair.left("vm", a).unwrap();
    let mut images = DISKS.map(|(name, _)| a.local_dir().join(name).display().to_string());
    images.sort();
    let mut told: Vec<&str> = left["kept"]["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| image["path"].as_str().unwrap())
        .collect();
    told.sort_unstable();
    assert_eq!(told, images);

    // They are the machine's own: it comes back over them, when a person says so.
    drop(supervisor);
    until("what was begun has ended", || pair.qemu(a).is_none());
    let to = a.listen().to_string();
    pair.refused(b, &["migrate", "vm", "--to", &to])
        .begins("disk-exists", &["work", "is kept locked for VM vm", "--disks mirror"]);
    report_adds_up(&pair.migrate("vm", b, a, &["--disks", "mirror"]), &guest);
    assert!(pair.runs_on("vm", a) && pair.left("vm", a).is_none() && holders(a) == 0, "{}", pair.logs());
    let _ = guest.sound_since(&before);
}

#[test]
fn a_hand_over_whose_record_becomes_unreadable_leaves_no_second_copy() {
    let Some(scene) = Scene::new() else { return };
    let (migration, stopped) = scene.pair.handed_over("vm");
    until("nothing was heard, and a process keeps its images", || holders(scene.a()) == 1);
    scene.a().kill_agent().unwrap();
    let _ = migration.ended();
    let record = scene.a().state_dir().join("vms/vm.journal");
    let aside = scene.a().directory().join("aside");
    std::fs::copy(&record, &aside).unwrap();
    std::fs::write(&record, noise(8192)).unwrap();
    // The source's QEMU has given its images up, and may end.
    testbed::fault::kill(scene.pair.qemu(scene.a()).unwrap());
    scene.a().start_agent_with(&local()).unwrap();
    // Whether it runs there depends on what reached the destination before the agent was killed.
    drop(stopped);
    let (begun, out) = (scene.supervisor.begun(), scene.supervisor.locked_out());
    until("it was tried some times", || scene.supervisor.begun() > begun + 12);
    assert!(scene.supervisor.locked_out() >= out + 8, "{}", scene.pair.logs());
    assert_eq!(holders(scene.a()), 1);
    Refusal::of(scene.a(), &["forget-images", "vm"]).is("record-unreadable", &["vm", "--force"]);

    // With its record again, it is settled as ever, and asks where the machine is if the destination does not know.
    scene.a().kill_agent().unwrap();
    std::fs::copy(&aside, &record).unwrap();
    scene.a().start_agent_with(&local()).unwrap();
    until("the source has let go", || {
        scene.pair.left("vm", scene.a()).is_some_and(|left| left["kept"]["to"] == "host-b")
    });
    scene.none_is_started_again();
    let _ = scene.guest.sound_since(&scene.before);
}

#[test]
fn an_agent_that_is_killed_in_the_proof_leaves_no_second_copy() {
    let points = tempdir("points");
    let held = |name: &str| points.join(name);
    let mut options = local();
    options.environment.push((points::DIRECTORY.to_owned(), points.display().to_string()));
    std::fs::write(held("resume"), "").unwrap();
    let Some(scene) = Scene::with(&options) else { return };
    let migration = scene.pair.begin("vm", scene.a(), scene.b(), &[]);
    until("it runs at the destination, and nothing is proved", || held("resume.reached").exists());
    // QEMU has given its images up, and is there still.
    assert!(DISKS.iter().all(|(name, _)| is_locked(scene.a(), name)), "{}", scene.pair.logs());
    scene.a().kill_agent().unwrap();
    let _ = migration.ended();
    // Its QEMU, which is paused, may end for want of an agent, and nobody is there to see to it.
    assert!(DISKS.iter().all(|(name, _)| is_locked(scene.a(), name)), "{}", scene.pair.logs());
    std::fs::remove_file(held("resume.reached")).unwrap();
    scene.a().start_agent_with(&options).unwrap();
    until("the source has let go", || scene.pair.left("vm", scene.a()).is_some());
    scene.none_is_started_again();
    let _ = scene.guest.sound_since(&scene.before);
    std::fs::remove_dir_all(points).unwrap();
}

#[test]
fn a_hand_over_that_is_settled_late_leaves_no_second_copy() {
    let Some(scene) = Scene::new() else { return };
    let (migration, stopped) = scene.pair.handed_over("vm");
    scene.a().kill_agent().unwrap();
    scene.a().start_agent_with(&local()).unwrap();
    let _ = migration.ended();
    assert!(DISKS.iter().all(|(name, _)| is_locked(scene.a(), name)), "{}", scene.pair.logs());
    // Nothing is forgotten of which it is not known where it runs.
    Refusal::of(scene.a(), &["forget-images", "vm"]).is("not-settled", &["vm", "host-b"]);
    drop(stopped);
    until("the source has let go", || scene.pair.left("vm", scene.a()).is_some());
    scene.none_is_started_again();
    let _ = scene.guest.sound_since(&scene.before);
}

#[test]
fn a_machine_that_stays_has_its_images() {
    let Some(scene) = Scene::new() else { return };
    // Its images are given up and locked when it is heard that the copy is lost.
    let (migration, stopped) = scene.pair.handed_over("vm");
    let qemu = scene.pair.qemu(scene.b()).unwrap();
    testbed::fault::kill(qemu);
    // One that is still ending may have been told to run.
    let threads = || std::fs::read_dir(format!("/proc/{qemu}/task")).map_or(0, Iterator::count);
    let state = || std::fs::read_to_string(format!("/proc/{qemu}/stat")).unwrap_or_default();
    until("it has ended, but for its status", || threads() <= 1 && state().contains(") Z "));
    drop(stopped);
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}\n{}", scene.pair.logs());
    assert!(scene.pair.runs_on("vm", scene.a()), "{}", scene.pair.logs());
    let writes = scene.guest.status().disks.unwrap().writes;
    until("it writes on", || scene.guest.status().disks.unwrap().writes > writes + 50);
    assert!(scene.pair.left("vm", scene.a()).is_none());
    // The destination hears so: what the complete copy has left there is not kept for ever.
    let there = scene.b().state_dir().join("left-images.json");
    until("nothing counts as all that there is of its disks", || {
        let there = std::fs::read_to_string(&there).unwrap();
        assert!(there.contains("\"remnant\": {"), "{there}");
        !there.contains("\"complete\": \"")
    });
    // And leaves them when it goes after all.
    report_adds_up(&scene.pair.migrate("vm", scene.a(), scene.b(), &[]), &scene.guest);
    scene.none_is_started_again();
    let _ = scene.guest.sound_since(&scene.before);
}

#[test]
fn images_of_a_machine_that_stays_and_does_not_take_them_are_locked_again() {
    let Some(scene) = Scene::new() else { return };
    let (migration, stopped) = scene.pair.handed_over("vm");
    let qemu = scene.pair.qemu(scene.b()).unwrap();
    testbed::fault::kill(qemu);
    let state = || std::fs::read_to_string(format!("/proc/{qemu}/stat")).unwrap_or_default();
    let threads = || std::fs::read_dir(format!("/proc/{qemu}/task")).map_or(0, Iterator::count);
    until("it has ended, but for its status", || threads() <= 1 && state().contains(") Z "));
    // QEMU is told to run it, and does nothing.
    let hangs = testbed::fault::pause(scene.pair.qemu(scene.a()).unwrap());
    drop(stopped);
    let locked = || DISKS.iter().all(|(name, _)| is_locked(scene.a(), name));
    until("QEMU may take its images", || !locked());
    until("it has not, and nobody else may", || locked() && holders(scene.a()) == 1);
    drop(hangs);
    let said = migration.ended();
    assert_eq!(said.code, Some(3), "{said:?}\n{}", scene.pair.logs());
    // It is told again.
    until("it runs on", || scene.pair.runs_on("vm", scene.a()));
    let writes = scene.guest.status().disks.unwrap().writes;
    until("it writes", || scene.guest.status().disks.unwrap().writes > writes + 50);
    until("nobody else holds its images", || holders(scene.a()) == 0);
    let _ = scene.guest.sound_since(&scene.before);
}

#[test]
fn a_machine_that_comes_back_has_its_images_and_what_is_forgotten_is_free() {
    let Some(scene) = Scene::new() else { return };
    let Scene { supervisor, guest, before, pair } = scene;
    let (a, b) = (pair.a(), pair.b());
    // Its supervisor tries on and on meanwhile. What it has begun and was locked out of, but for the guest itself and the latest.
    let is_out = || supervisor.begun() <= supervisor.locked_out() + 2;
    report_adds_up(&pair.migrate("vm", a, b, &[]), &guest);

    // An attempt that comes to nothing leaves them locked.
    let migration = pair.begin("vm", b, a, &["--bandwidth", "8MiB/s"]);
    migration.reaches("synchronize");
    assert!(DISKS.iter().all(|(name, _)| is_locked(a, name)), "{}", pair.logs());
    let _ = vmirror(b, &["cancel", "vm"]).done();
    let _ = migration.ended();
    until("the copy is thrown away", || pair.show("vm", a).is_none());
    assert!(DISKS.iter().all(|(name, _)| is_locked(a, name)), "{}", pair.logs());
    assert!(pair.left("vm", a).is_some());
    // Nor does one whose agent ends.
    let migration = pair.begin("vm", b, a, &["--bandwidth", "8MiB/s"]);
    migration.reaches("synchronize");
    a.kill_agent().unwrap();
    let _ = migration.ended();
    let begun = supervisor.begun();
    until("it was tried some times", || supervisor.begun() > begun + 4);
    assert!(is_out() && holders(a) == 1, "{}", supervisor.said());
    a.start_agent_with(&local()).unwrap();
    until("the copy is thrown away", || {
        pair.left("vm", a).is_some_and(|left| left["kept"]["to"] == "host-b")
    });
    assert!(DISKS.iter().all(|(name, _)| is_locked(a, name)), "{}", pair.logs());

    report_adds_up(&pair.migrate("vm", b, a, &[]), &guest);
    assert!(pair.runs_on("vm", a) && pair.left("vm", a).is_none(), "{}", pair.logs());
    // At its return the images are free for milliseconds, in which one may have had them and ended at the guest's own.
    assert!(supervisor.begun() <= supervisor.locked_out() + 3, "{}\n{}", supervisor.said(), pair.logs());
    assert_eq!(holders(a), 0);
    drop(supervisor);
    assert!(pair.left("vm", b).is_some() && DISKS.iter().all(|(name, _)| is_locked(b, name)));
    let _ = guest.sound_since(&before);

    pair.refused(a, &["forget-images", "vm"]).is("nothing-kept", &["vm"]);
    assert_eq!(holders(b), 1);
    let said = vmirror(b, &["forget-images", "vm", "--json"]).done().json();
    assert_eq!(holders(b), 0);
    assert_eq!(said["images"].as_array().unwrap().len(), DISKS.len(), "{said}");
    assert!(DISKS.iter().all(|(name, _)| !is_locked(b, name)), "{}", pair.logs());
    assert!(pair.left("vm", b).is_none());
    // One that is removed takes no room, and nothing is told of it any more.
    report_adds_up(&pair.migrate("vm", a, b, &["--disks", "mirror"]), &guest);
    for (name, _) in DISKS {
        std::fs::remove_file(image(a, name)).unwrap();
    }
    until("nothing is kept", || pair.left("vm", a).is_none() && holders(a) == 0);
    // Made by the last QEMUs that the supervisor has begun, if it was.
    let _ = std::fs::remove_file(a.ram_dir().join("own"));
    pair.holds_nothing(a);
    let _ = guest.sound_since(&before);
}

#[test]
fn an_image_that_is_kept_is_neither_run_nor_overwritten_for_another() {
    let Some(scene) = Scene::new() else { return };
    let Scene { supervisor, guest, before, pair } = scene;
    let (a, b) = (pair.a(), pair.b());
    report_adds_up(&pair.migrate("vm", a, b, &[]), &guest);
    drop(supervisor);
    until("what was begun has ended", || pair.qemu(a).is_none());
    let path = a.local_dir().join("work");
    let drive = format!("file={},format=raw,if=virtio", path.display());
    let run = [
        "run",
        "other",
        "--",
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "32",
        "-nodefaults",
        "-display",
        "none",
        "-drive",
        &drive,
    ];
    pair.refused(a, &run).is("disk-stale", &["vm"]);
    // Written to since, it is not what was left, and still not anybody's.
    std::fs::write(image(a, "work"), noise(SIZE)).unwrap();
    pair.refused(a, &run).is("disk-kept", &["work", "vm", "host-b"]);

    // Another machine that has a disk at that path is not mirrored over it.
    disk::create(&image(b, "other"), Format::Raw, SIZE).unwrap();
    let other = b.local_dir().join("other");
    std::fs::rename(image(a, "work"), image(a, "other")).unwrap();
    std::os::unix::fs::symlink("other", image(a, "work")).unwrap();
    pair.run_tiny(b, "other", &["-drive", &format!("file={},format=raw,if=virtio", other.display())]);
    let address = a.listen().to_string();
    pair.refused(b, &["migrate", "other", "--to", &address, "--disks", "mirror"])
        .is("disk-kept", &["vm", "host-b"]);
    // Who says so has it.
    let stale = [&["run", "third", "--stale-disks"], &run[2..]].concat();
    let _ = vmirror(a, &stale).done();
    let _ = vmirror(a, &["stop", "third", "--force"]).done();
    let _ = guest.sound_since(&before);
}

fn tempdir(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("vmirror-fence-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}
