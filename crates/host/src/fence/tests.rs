use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use qemu::Process;

use super::*;
use crate::deadlines::KILL_GRACE;
use crate::vm::Origin;

fn image(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, b"content").unwrap();
    path
}

fn open(state_dir: &Path) -> Fence {
    Fence::new(Arc::new(LeftImages::open(state_dir)), &[], None)
}

fn is_locked(path: &Path) -> bool {
    qemu::ImageLock::take(path).is_err()
}

/// Whether it is, or soon will be: what another test starts has our files open too, between its fork and its exec.
fn is_let_go_of(path: &Path) -> bool {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while is_locked(path) && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    !is_locked(path)
}

#[tokio::test]
async fn what_was_left_is_locked_until_it_is_forgotten_whoever_looks_after_it() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, other) = (image(directory.path(), "disk"), image(directory.path(), "other"));
    let (vm, another): (VmName, VmName) = ("web1".parse().unwrap(), "db".parse().unwrap());
    let fence = open(directory.path());
    // Beside the lock of the QEMU that gives it up: there is no moment in between.
    let qemu = qemu::ImageLock::take(&disk).unwrap();
    fence.hold(&vm, [disk.as_path()]);
    drop(qemu);
    assert!(is_locked(&disk));
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    fence.keep(&another, "host-c", std::slice::from_ref(&other)).await.unwrap();
    assert_eq!(fence.left.kept_of(&disk), Some((vm.clone(), Some("host-b".to_owned()))));
    assert_eq!(fence.look().await, []);
    drop(fence);
    assert!(is_let_go_of(&disk), "the kernel has let go of it with the process");
    let fence = open(directory.path());
    assert!(is_locked(&disk) && is_locked(&other));
    assert_eq!(fence.left().len(), 2);
    assert_eq!(fence.forget(&vm).await, std::slice::from_ref(&disk));
    assert!(is_let_go_of(&disk) && is_locked(&other));
    drop(fence);
    let fence = open(directory.path());
    assert!(is_let_go_of(&disk) && fence.left.kept_of(&disk).is_none() && is_locked(&other));
}

#[tokio::test]
async fn one_that_somebody_has_opened_meanwhile_is_told_and_locked_as_soon_as_it_is_free() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let vm: VmName = "web1".parse().unwrap();
    open(directory.path()).keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    let supervisor = qemu::ImageLock::take(&disk).unwrap();
    let fence = open(directory.path());
    let problem = |fence: &Fence| fence.left().remove(0).images.remove(0).problem;
    assert!(problem(&fence).unwrap().contains("open for writing in another process"));
    drop(supervisor);
    assert_eq!(fence.look().await, []);
    assert_eq!(problem(&fence), None);
    assert!(is_locked(&disk));
}

#[tokio::test]
async fn one_that_was_removed_takes_no_room_and_another_in_its_place_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let vm: VmName = "web1".parse().unwrap();
    let fence = open(directory.path());
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    std::fs::remove_file(&disk).unwrap();
    assert_eq!(fence.look().await, [Seen::Removed(vm.clone(), disk.clone())]);
    assert!(fence.left().is_empty());
    fence.keep(&vm, "host-b", &[image(directory.path(), "disk")]).await.unwrap();
    drop(fence);
    std::fs::write(directory.path().join("new"), b"somebody's").unwrap();
    std::fs::rename(directory.path().join("new"), &disk).unwrap();
    let fence = open(directory.path());
    assert!(is_let_go_of(&disk));
    assert!(fence.left()[0].images[0].problem.is_some());
}

#[tokio::test]
async fn a_machine_that_comes_back_has_its_images_and_one_that_does_not_after_all_has_them_locked_again() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let vm: VmName = "web1".parse().unwrap();
    let fence = open(directory.path());
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    assert!(!fence.others_use(&disk).unwrap(), "what is locked by ourselves is in nobody else's use");
    fence.lend(&vm).await;
    let writes = qemu::ImageLock::take(&disk).unwrap();
    assert!(fence.others_use(&disk).unwrap());
    assert_eq!(fence.look().await, [], "who writes it is who brings it up to date");
    fence.hold(&vm, [disk.as_path()]);
    drop(writes);
    assert!(is_locked(&disk), "the copy is complete, and may not run yet");
    fence.take_again(&vm).await;
    assert!(is_locked(&disk));
    assert_eq!(fence.let_go(&vm).await, std::slice::from_ref(&disk));
    let qemu = qemu::ImageLock::take(&disk).unwrap();
    fence.taken([disk.as_path()]);
    drop(qemu);
    assert!(is_let_go_of(&disk) && fence.left().is_empty());
}

#[tokio::test]
async fn a_lock_outlives_who_has_taken_it_and_no_longer_than_it_is_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, other) = (image(directory.path(), "disk"), image(directory.path(), "other"));
    let vm: VmName = "web1".parse().unwrap();
    let keeper =
        || Some(Keeper { program: "sh".into(), arguments: vec!["-c".into(), "exec sleep 1000".into()] });
    let open = || Fence::new(Arc::new(LeftImages::open(directory.path())), &[], keeper());
    let holders = |fence: &Fence| fence.left.holders();
    let fence = open();
    fence.keep(&vm, "host-b", &[disk.clone(), other.clone()]).await.unwrap();
    let first = holders(&fence);
    assert_eq!(first.len(), 1);
    drop(fence);
    assert!(is_locked(&disk) && is_locked(&other), "no agent runs");

    // The next agent goes on with it.
    let fence = open();
    assert_eq!(fence.look().await, []);
    assert_eq!(holders(&fence), first);
    // One that was killed is replaced.
    let _ = first[0].process.kill();
    assert!(first[0].process.wait_for_end(KILL_GRACE).await);
    assert_eq!(fence.look().await, []);
    let second = holders(&fence);
    assert!(second.len() == 1 && second != first);
    // What is removed takes no room, in any process.
    std::fs::remove_file(&other).unwrap();
    assert_eq!(fence.look().await, [Seen::Removed(vm.clone(), other)]);
    let third = holders(&fence);
    assert!(third.len() == 1 && third[0].images == [disk.clone()] && second[0].process.look().is_gone());
    drop(fence);
    let fence = open();
    assert!(fence.look().await.is_empty() && is_locked(&disk));
    // Another agent's process has its own lock: it has ended when the image is let go of.
    assert_eq!(fence.let_go(&vm).await, std::slice::from_ref(&disk));
    assert!(is_let_go_of(&disk) && third[0].process.look().is_gone());
    fence.take_again(&vm).await;
    assert!(is_locked(&disk) && holders(&fence).len() == 1);
    assert_eq!(fence.forget(&vm).await, std::slice::from_ref(&disk));
    assert!(is_let_go_of(&disk) && holders(&fence).is_empty());
}

/// One that is told from others by its command line.
fn waits() -> Option<Keeper> {
    Some(Keeper { program: "sh".into(), arguments: vec!["-c".into(), "kill -STOP $$".into()] })
}

fn kept(state_dir: &Path) -> Fence {
    Fence::new(Arc::new(LeftImages::open(state_dir)), &[], waits())
}

fn unknown_place(fence: &Fence, vm: &VmName, image: &Path) {
    let images = vec![KeptImage { path: image.to_owned(), problem: None }];
    let left: Vec<_> = fence.left().into_iter().map(|left| (left.vm, left.to, left.images)).collect();
    assert_eq!(left, [(vm.clone(), None, images)]);
}

#[tokio::test]
async fn what_is_locked_stays_so_when_the_record_that_says_why_cannot_be_read_or_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let disk = image(&place, "disk");
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    // Handed over, and nothing was heard: it is in the journal alone.
    fence.hold(&vm, [disk.as_path()]);
    fence.post(&vm).await;
    let holder = fence.left.holders().remove(0).process;
    drop(fence);

    // The journal says nothing of it to the next agent.
    let fence = kept(&place);
    assert_eq!(fence.look().await, []);
    assert!(holder.look().runs() && is_locked(&disk));
    unknown_place(&fence, &vm, &disk);
    assert!(!fence.others_use(&disk).unwrap(), "it is no other program's");
    drop(fence);
    // Nor does anything else: the state directory is a new one.
    std::fs::remove_file(place.join("left-images.json")).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let others = kept(elsewhere.path());
    assert!(others.look().await.is_empty() && others.left().is_empty(), "it is another agent's");
    let fence = kept(&place);
    assert_eq!(fence.look().await, []);
    assert!(holder.look().runs() && fence.left.holders().len() == 1);
    unknown_place(&fence, &vm, &disk);
    drop(fence);
    // After a reboot there is no such process.
    let _ = holder.kill();
    assert!(holder.wait_for_end(KILL_GRACE).await);
    let fence = kept(&place);
    assert_eq!(fence.look().await, []);
    assert!(is_locked(&disk) && fence.left.holders().len() == 1);
    unknown_place(&fence, &vm, &disk);

    // It comes back, or a person says so.
    assert_eq!(fence.let_go(&vm).await, std::slice::from_ref(&disk));
    assert!(is_let_go_of(&disk) && fence.left.holders().is_empty());
    fence.take_again(&vm).await;
    assert!(is_locked(&disk) && fence.left.holders().len() == 1);
    assert_eq!(fence.forget(&vm).await, std::slice::from_ref(&disk));
    assert!(is_let_go_of(&disk) && fence.left.holders().is_empty() && fence.left().is_empty());
}

#[tokio::test]
async fn an_image_that_was_moved_stays_locked_whatever_is_in_its_place_for_the_next_agent() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let (disk, moved) = (image(&place, "disk"), place.join("moved"));
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    let holders = fence.left.holders();
    drop(fence);
    std::fs::rename(&disk, &moved).unwrap();
    image(&place, "disk");
    let fence = kept(&place);
    assert_eq!(fence.look().await, []);
    assert_eq!(fence.left.holders(), holders);
    assert!(is_locked(&moved) && !is_locked(&disk));
    assert!(!fence.others_use(&moved).unwrap());
    assert_eq!(fence.left()[0].images[0].problem, None);
    // Removed where it is now, it takes no room.
    std::fs::remove_file(&moved).unwrap();
    assert_eq!(fence.look().await, [Seen::Removed(vm, disk)]);
    assert!(fence.left.holders().is_empty() && holders[0].process.look().is_gone());
}

#[tokio::test]
async fn a_process_that_has_what_cannot_be_locked_anew_is_not_ended() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let (disk, other) = (image(&place, "disk"), image(&place, "other"));
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    fence.keep(&vm, "host-b", &[disk.clone(), other.clone()]).await.unwrap();
    let holders = fence.left.holders();
    // As of an agent that has no descriptors left when it starts.
    for unlocked in [vec![&other], vec![&disk, &other]] {
        let lost = fence.table.state().take_out(|locked| unlocked.contains(&&locked.path));
        lost.iter().for_each(|locked| locked.lock.pass_on());
        drop(lost);
        fence.post(&vm).await;
        fence.relieve_idle().await;
        assert_eq!(fence.left.holders(), holders);
        assert!(is_locked(&disk) && is_locked(&other));
    }
    assert_eq!(fence.forget(&vm).await.len(), 2);
    assert!(is_let_go_of(&disk) && is_let_go_of(&other) && holders[0].process.look().is_gone());
}

fn refused(desc: &str) -> QmpError {
    QmpError::Refused { command: "cont", class: "GenericError".to_owned(), desc: desc.to_owned() }
}

#[tokio::test]
async fn images_are_free_only_while_a_qemu_takes_them_whoever_else_tries() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let disk = image(&place, "disk");
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    drop(fence);
    let fence = kept(&place);
    // First with an earlier agent's process, and then with one that shares this one's locks.
    for _ in 0..2 {
        let told = AtomicUsize::new(0);
        let refuse = |desc: &'static str, until: usize| {
            let (told, disk) = (&told, &disk);
            move || async move {
                assert!(is_let_go_of(disk));
                if told.fetch_add(1, Ordering::Relaxed) < until { Err(refused(desc)) } else { Ok(()) }
            }
        };
        let dead = fence.hand_to(&vm, refuse("Block node is read-only", 9)).await;
        assert!(dead.is_err() && told.swap(0, Ordering::Relaxed) == 1 && is_locked(&disk));
        assert_eq!(fence.left.holders().len(), 1, "it outlives the agent again");
        fence.hand_to(&vm, refuse("Failed to get \"write\" lock", 2)).await.unwrap();
        assert!(told.into_inner() == 3 && is_let_go_of(&disk));
        fence.relieve(&vm).await;
        fence.take_again(&vm).await;
        assert!(is_locked(&disk) && fence.left.holders().len() == 1);
    }
    let _ = fence.forget(&vm).await;
}

#[tokio::test]
async fn an_image_of_a_machine_that_comes_back_is_written_under_the_locks_that_keep_it() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let (disk, fresh) = (image(&place, "disk"), image(&place, "fresh"));
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    assert!(fence.write(&vm, &fresh).await.unwrap().is_none());
    drop(fence.write(&vm, &disk).await.unwrap().unwrap());
    drop(fence);
    let fence = kept(&place);
    let earlier = fence.left.holders();
    let writes = fence.write(&vm, &disk).await.unwrap().unwrap();
    assert!(
        qemu::in_use(&disk).unwrap() && fence.left.holders() != earlier && fence.left.holders().len() == 1
    );
    assert_eq!(fence.look().await, [], "it is no second copy");
    // As when the agent ends: who writes has its own locks no more.
    drop(fence);
    drop(writes);
    assert!(is_locked(&disk));
    let fence = kept(&place);
    // One that was made for its return, and has not become its disk.
    fence.hold(&vm, [fresh.as_path()]);
    fence.take_again(&vm).await;
    assert!(is_locked(&disk) && is_let_go_of(&fresh) && fence.left.holders().len() == 1);
    assert_eq!(fence.forget(&vm).await.len(), 1);
    assert!(is_let_go_of(&disk) && fence.left.holders().is_empty());
}

#[test]
fn what_a_process_has_opened_itself_is_no_image() {
    let own = tempfile::tempfile().unwrap();
    let process = Process::of_pid(std::process::id(), Path::new("")).unwrap();
    let is_passed_on =
        |number: i32| lost::is_passed_on(&process, Path::new(&format!("/proc/self/fd/{number}")));
    assert!(is_passed_on(2).unwrap(), "its standard error is handed to it");
    assert!(!is_passed_on(own.as_raw_fd()).unwrap());
    drop(own);
    assert!(!is_passed_on(1 << 20).unwrap(), "one that is closed");
}

#[tokio::test]
async fn an_image_that_a_machine_has_come_back_without_stays_locked() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let (disk, other) = (image(&place, "disk"), image(&place, "other"));
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    fence.keep(&vm, "host-b", &[disk.clone(), other.clone()]).await.unwrap();
    drop(fence.write(&vm, &disk).await.unwrap().unwrap());
    fence.hand_to(&vm, || async { Ok(()) }).await.unwrap();
    fence.taken([disk.as_path()]);
    fence.take_again(&vm).await;
    assert!(is_let_go_of(&disk) && is_locked(&other));
    assert_eq!(fence.left.holders().len(), 1);
    assert_eq!(fence.look().await, []);
    assert_eq!(fence.forget(&vm).await, std::slice::from_ref(&other));
    assert!(is_let_go_of(&other));
}

#[tokio::test]
async fn who_holds_what_a_machine_left_earlier_holds_it_when_the_machine_stays_after_all() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let disk = image(&place, "disk");
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    fence.keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    // The process that has it shares the lock that is let go of here.
    fence.hand_to(&vm, || async { Ok(()) }).await.unwrap();
    fence.take_again(&vm).await;
    assert_eq!(fence.left.holders().len(), 1);
    drop(fence);
    assert!(is_locked(&disk), "it outlives the agent");
    assert_eq!(kept(&place).forget(&vm).await.len(), 1);
    assert!(is_let_go_of(&disk));
}

#[tokio::test]
async fn images_that_a_machine_of_this_host_was_kept_from_are_not_kept_when_it_has_gone() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let disk = image(&place, "disk");
    let vm: VmName = "web1".parse().unwrap();
    let fence = kept(&place);
    // It was to stay, and its QEMU did not take them.
    fence.hold(&vm, [disk.as_path()]);
    assert!(fence.hand_to(&vm, || async { Err(refused("Block node is read-only")) }).await.is_err());
    drop(fence);
    assert!(is_locked(&disk));
    let drive = format!("file={},if=virtio,format=raw", disk.display());
    let argv = ["qemu-system-x86_64", "-drive", &drive].map(str::to_owned).to_vec();
    let record = Record { argv, ..Record::new(vm.clone(), ownership::Standing::own(), Origin::Run) };
    let fence = Fence::new(Arc::new(LeftImages::open(&place)), &[record], waits());
    assert!(is_locked(&disk), "it is here, and has not got them yet");
    assert_eq!(fence.left(), []);
    let _ = fence.look().await;
    assert_eq!(fence.left.holders().len(), 1);
    // Its QEMU has ended, and it is forgotten.
    fence.take_again(&vm).await;
    assert!(is_let_go_of(&disk) && fence.left.holders().is_empty());
}

/// A directory whose storage does not answer for as long as this is there.
struct Stalled {
    directory: PathBuf,
    /// A file system in user space whose program says nothing. It is at an end when this is closed.
    _program: std::fs::File,
}

impl Stalled {
    /// None, and says so, where nothing can be mounted.
    fn at(directory: &Path) -> Option<Stalled> {
        let device = std::fs::File::options().read(true).write(true).open("/dev/fuse");
        let mounted = device.and_then(|program| {
            let options = "fd=0,rootmode=40000,user_id=0,group_id=0";
            let mut mount = Command::new("mount");
            mount.args(["-i", "-t", "fuse", "-o", options, "stalled"]).arg(directory);
            Ok((mount.stdin(program.try_clone()?).output()?, program))
        });
        match mounted {
            Ok((said, program)) if said.status.success() => {
                Some(Stalled { directory: directory.to_owned(), _program: program })
            }
            other => {
                eprintln!("SKIPPED: storage that does not answer cannot be had here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.directory).status();
    }
}

/// What comes of work that may stall, within a time in which nothing else takes as long.
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    is_done
        .recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|_| panic!("{what} waits for others' storage"))
}

fn by_itself<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn storage_that_does_not_answer_keeps_no_other_machine_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let slow = place.join("slow");
    std::fs::create_dir(&slow).unwrap();
    let (stuck, disk, other) = (image(&slow, "disk"), image(&place, "disk"), image(&place, "other"));
    let (web, db): (VmName, VmName) = ("web1".parse().unwrap(), "db".parse().unwrap());
    by_itself(async {
        let fence = open(&place);
        fence.keep(&web, "host-b", std::slice::from_ref(&stuck)).await.unwrap();
        fence.keep(&db, "host-b", std::slice::from_ref(&disk)).await.unwrap();
    });
    let Some(stalled) = Stalled::at(&slow) else { return };

    let state_dir = place.clone();
    let fence = in_time("a start", move || Arc::new(open(&state_dir)));
    let its = Arc::clone(&fence);
    in_time("a look", move || by_itself(async move { its.look().await }));
    assert!(is_locked(&disk), "it is locked though another is not");
    let problems = |fence: &Fence| -> Vec<bool> {
        fence.left().iter().map(|left| left.images[0].problem.is_some()).collect()
    };
    let its = Arc::clone(&fence);
    assert_eq!(in_time("a list", move || problems(&its)), [false, true]);
    // Somebody waits for it, and nobody else begins to.
    for _ in 0..2 {
        let (its, vm, its_disk, new) = (Arc::clone(&fence), db.clone(), disk.clone(), other.clone());
        in_time("what is done about another machine", move || {
            by_itself(async {
                its.look().await;
                its.hold(&vm, [new.as_path()]);
                its.post(&vm).await;
                assert!(its.write(&vm, &new).await.unwrap().is_some());
                assert!(!its.others_use(&its_disk).unwrap());
                its.hand_to(&vm, || async { Ok(()) }).await.unwrap();
                its.take_again(&vm).await;
                its.taken([new.as_path()]);
                its.left.no_remnants([new.as_path()]);
                assert!(its.left.kept_of(&new).is_none() && its.left.kept_of(&its_disk).is_some());
            });
        });
    }
    assert!(is_locked(&disk) && !is_locked(&other));
    let its = Arc::clone(&fence);
    let forgotten = in_time("to forget it", move || by_itself(async move { its.forget(&web).await }));
    assert_eq!(forgotten, std::slice::from_ref(&stuck));

    // It answers again: nothing is locked that was forgotten meanwhile.
    drop(stalled);
    let its = Arc::clone(&fence);
    in_time("a look", move || {
        by_itself(async move {
            while its.table.is_looked_at() {
                its.look().await;
            }
        })
    });
    assert!(is_let_go_of(&stuck) && fence.left().len() == 1);
}

#[test]
fn what_did_not_answer_is_locked_when_it_does() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let slow = place.join("slow");
    std::fs::create_dir(&slow).unwrap();
    let disk = image(&slow, "disk");
    let vm: VmName = "web1".parse().unwrap();
    by_itself(async { open(&place).keep(&vm, "host-b", std::slice::from_ref(&disk)).await.unwrap() });
    let Some(stalled) = Stalled::at(&slow) else { return };
    let fence = in_time("a start", move || Arc::new(open(&place)));
    let look = |fence: &Arc<Fence>| {
        let fence = Arc::clone(fence);
        in_time("a look", move || by_itself(async move { fence.look().await }))
    };
    let told = look(&fence);
    assert!(matches!(&told[..], [Seen::Problem(_, _, why)] if why.contains("does not answer")), "{told:?}");
    assert_eq!(look(&fence), [], "it was told");
    drop(stalled);
    let deadline = Instant::now() + Duration::from_secs(60);
    while fence.left()[0].images[0].problem.is_some() {
        assert!(Instant::now() < deadline, "{:?}", fence.left());
        let _ = look(&fence);
    }
    assert!(is_locked(&disk));
}
