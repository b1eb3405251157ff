use super::*;

fn vm() -> VmName {
    "web1".parse().unwrap()
}

fn image(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, b"content").unwrap();
    path
}

fn kept(left: &LeftImages) -> Vec<PathBuf> {
    left.to_be_locked().into_iter().map(|kept| kept.path).collect()
}

#[test]
fn what_was_made_is_removed_in_time_and_what_was_left_behind_never() {
    let directory = tempfile::tempdir().unwrap();
    let [made, behind, both] = ["made", "behind", "both"].map(|name| image(directory.path(), name));
    let vm = vm();
    let left = LeftImages::open(directory.path());
    left.leave(&vm, &made, Left::Unfinished).unwrap();
    left.leave(&vm, &behind, Left::Behind).unwrap();
    left.leave(&vm, &both, Left::Behind).unwrap();
    left.leave(&vm, &both, Left::Unfinished).unwrap();
    left.expire_older_than(THERE, &[]);
    let again = LeftImages::open(directory.path());
    for path in [&made, &behind, &both] {
        assert!(again.is_left_by(&vm, path) && !again.is_left_by(&"other".parse().unwrap(), path));
    }
    again.expire_older_than(Duration::ZERO, std::slice::from_ref(&made));
    assert!(made.exists(), "another attempt has it");
    again.expire_older_than(Duration::ZERO, &[]);
    assert!(!made.exists() && behind.exists() && both.exists());
    assert!(!again.is_left_by(&vm, &made) && again.is_left_by(&vm, &behind) && again.is_left_by(&vm, &both));
    again.taken([behind.as_path()]);
    assert!(!LeftImages::open(directory.path()).is_left_by(&vm, &behind));
}

#[test]
fn another_file_of_that_name_is_not_what_was_left() {
    let directory = tempfile::tempdir().unwrap();
    let [path, other] = ["image", "other"].map(|name| image(directory.path(), name));
    std::fs::write(&other, b"somebody's").unwrap();
    let vm = vm();
    let left = LeftImages::open(directory.path());
    left.leave(&vm, &path, Left::Unfinished).unwrap();
    assert!(LeftImages::open(directory.path()).is_left_by(&vm, &path));
    std::fs::rename(&other, &path).unwrap();
    assert!(!left.is_left_by(&vm, &path));
    left.expire_older_than(Duration::ZERO, &[]);
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
}

#[test]
fn a_file_that_somebody_has_written_to_or_uses_is_not_what_was_left() {
    let directory = tempfile::tempdir().unwrap();
    let vm = vm();
    let left = LeftImages::open(directory.path());
    let [written, used] = ["written", "used"].map(|name| image(directory.path(), name));
    for path in [&written, &used] {
        left.leave(&vm, path, Left::Unfinished).unwrap();
        assert_eq!(left.left_by(path), Some(vm.clone()));
    }
    std::fs::write(&written, b"somebody's own").unwrap();
    assert!(!left.is_left_by(&vm, &written) && left.left_by(&written).is_none());
    let lock = qemu::ImageLock::take(&used).unwrap();
    left.expire_older_than(Duration::ZERO, &[]);
    assert!(written.exists() && used.exists());
    drop(lock);
    left.expire_older_than(Duration::ZERO, &[]);
    assert!(written.exists() && !used.exists());
}

#[test]
fn what_is_said_of_an_image_that_was_left_is_one_record() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let open = || LeftImages::open(directory.path());
    open().keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    let on_disk = || std::fs::read(directory.path().join(FILE)).unwrap();
    let before = on_disk();
    open().keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    assert_eq!(on_disk(), before, "it is as it was");
    // Whose, until when, locked and a remnant, by the same write: whatever an agent dies of, the next one finds all or nothing.
    let left = open();
    assert!(left.is_left_by(&vm(), &disk));
    assert_eq!(left.kept_of(&disk), Some((vm(), Some("host-b".to_owned()))));
    // A person lets it be used again: what is in it is no newer for that.
    assert_eq!(left.keep_no_more(&vm()), std::slice::from_ref(&disk));
    let left = open();
    assert!(left.is_left_by(&vm(), &disk) && left.kept_of(&disk).is_none());
    // It is to be a copy's that does not come to run after all.
    left.keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    left.no_remnants([disk.as_path()]);
    let left = open();
    assert!(!left.is_left_by(&vm(), &disk) && left.kept_of(&disk).is_some());
    left.taken([disk.as_path()]);
    assert_eq!(open().known().now, OnRecord::default());
}

#[test]
fn what_is_locked_for_one_machine_does_not_become_the_remnant_of_another() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let left = LeftImages::open(directory.path());
    left.keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    // Another machine's disk was to be mirrored over it, and failed at the lock.
    left.leave(&"db".parse().unwrap(), &disk, Left::Behind).unwrap();
    assert_eq!(left.left_by(&disk), Some(vm()));
    assert_eq!(left.kept_of(&disk), Some((vm(), Some("host-b".to_owned()))));
}

#[test]
fn what_could_not_be_put_on_record_is_with_the_next_word_or_when_it_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let [disk, other] = ["disk", "other"].map(|name| image(directory.path(), name));
    let open = || LeftImages::open(directory.path());
    let left = open();
    left.leave(&vm(), &disk, Left::Unfinished).unwrap();
    // Nothing writes a directory, root or not.
    let full = directory.path().join(FILE).with_extension("new");
    std::fs::create_dir(&full).unwrap();
    left.no_remnants([disk.as_path()]);
    assert!(!left.is_left_by(&vm(), &disk));
    assert!(open().is_left_by(&vm(), &disk), "it would be removed one day by the next agent");
    left.settle().unwrap_err();
    std::fs::remove_dir(&full).unwrap();
    left.settle().unwrap();
    assert!(!open().is_left_by(&vm(), &disk));

    std::fs::create_dir(&full).unwrap();
    left.keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap_err();
    std::fs::remove_dir(&full).unwrap();
    left.keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    left.leave(&vm(), &other, Left::Behind).unwrap();
    assert!(open().is_left_by(&vm(), &disk) && kept(&open()) == [disk]);
}

/// What an earlier version has written of these images: the first and second as remnants, the second and third as locked.
fn earlier(directory: &Path, images: &[PathBuf; 3]) -> [PathBuf; 2] {
    let of = |path: &Path| {
        let file = serde_json::to_value(WhichFile::of(path)).unwrap();
        let at = serde_json::to_value(SystemTime::now()).unwrap();
        serde_json::json!({ "vm": "web1", "path": path, "at": at, "file": file })
    };
    let with = |path: &Path, more: serde_json::Value| {
        let mut image = of(path);
        image.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        image
    };
    let [made, both, locked] = images;
    let (written_made, written_both) = (written(made), written(both));
    let remnants = serde_json::json!([
        with(made, serde_json::json!({ "left": "unfinished", "written": written_made })),
        with(both, serde_json::json!({ "left": "behind", "written": written_both })),
    ]);
    let to = || serde_json::json!({ "to": "host-b" });
    let kept = serde_json::json!({ "images": [with(both, to()), with(locked, to())], "holders": [] });
    let files = ["remnants.json", "kept-images.json"].map(|name| directory.join(name));
    std::fs::write(&files[0], remnants.to_string()).unwrap();
    std::fs::write(&files[1], kept.to_string()).unwrap();
    files
}

#[test]
fn the_two_records_of_earlier_versions_are_carried_over() {
    let directory = tempfile::tempdir().unwrap();
    let images = ["made", "both", "locked"].map(|name| image(directory.path(), name));
    let files = earlier(directory.path(), &images);
    let [made, both, locked] = &images;
    let full = directory.path().join(FILE).with_extension("new");
    std::fs::create_dir(&full).unwrap();
    // As long as there is no room for the one, the two stay.
    for last in [false, true] {
        let left = LeftImages::open(directory.path());
        assert!(
            left.is_left_by(&vm(), made) && left.is_left_by(&vm(), both) && left.left_by(locked).is_none()
        );
        assert_eq!(kept(&left), [both.clone(), locked.clone()]);
        assert_eq!(files.iter().all(|file| file.exists()), !last);
        if !last {
            std::fs::remove_dir(&full).unwrap();
        }
    }
    let left = LeftImages::open(directory.path());
    assert!(left.is_left_by(&vm(), made) && left.is_left_by(&vm(), both));
    assert_eq!(left.known().now.images.len(), 3);

    // A crash before they were removed adds nothing twice; what an earlier version has learnt in between is not lost.
    let before = left.known().now.clone();
    earlier(directory.path(), &images);
    assert_eq!(LeftImages::open(directory.path()).known().now, before);
    left.keep_no_more(&vm());
    earlier(directory.path(), &images);
    assert_eq!(kept(&LeftImages::open(directory.path())), [both.clone(), locked.clone()]);
    left.expire_older_than(Duration::ZERO, &[]);
    assert!(!made.exists() && both.exists());
}

#[test]
fn the_one_record_is_not_written_as_long_as_an_earlier_one_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let images = ["made", "both", "locked"].map(|name| image(directory.path(), name));
    let [_, locked] = earlier(directory.path(), &images);
    // Nothing reads a directory, root or not.
    std::fs::rename(&locked, directory.path().join("elsewhere")).unwrap();
    std::fs::create_dir(&locked).unwrap();
    let left = LeftImages::open(directory.path());
    assert!(left.is_left_by(&vm(), &images[0]));
    left.keep(&vm(), "host-b", &images[..1]).unwrap_err();
    assert!(!directory.path().join(FILE).exists());
    std::fs::remove_dir(&locked).unwrap();
    std::fs::rename(directory.path().join("elsewhere"), &locked).unwrap();
    assert_eq!(kept(&LeftImages::open(directory.path())), images[1..]);
}

#[test]
fn what_was_left_is_known_by_whatever_name_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let [linked, symlink, moved] = ["linked", "symlink", "moved"].map(|name| directory.path().join(name));
    let left = LeftImages::open(directory.path());
    left.keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    std::fs::hard_link(&disk, &linked).unwrap();
    std::os::unix::fs::symlink("moved", &symlink).unwrap();
    std::fs::rename(&disk, &moved).unwrap();
    let kept = Some((vm(), Some("host-b".to_owned())));
    for path in [&linked, &symlink, &moved] {
        assert_eq!((left.left_by(path), left.kept_of(path)), (Some(vm()), kept.clone()), "{path:?}");
    }
    let another = image(directory.path(), "disk");
    assert_eq!(left.left_by(&another), None);
    std::fs::write(&linked, b"somebody's own").unwrap();
    assert_eq!((left.left_by(&moved), left.kept_of(&moved)), (None, kept));
}

#[test]
fn what_is_known_of_who_has_left_is_known_to_the_next_agent() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk");
    let open = || LeftImages::open(directory.path());
    let found = Finding::new("supervised", "a loop", "end it");
    let watched = Watched { vm: vm(), to: "host-b".to_owned(), argv: vec!["qemu".to_owned()] };
    open().may_start(&vm(), Some(&found));
    open().watch(watched.clone());
    assert_eq!((open().starter_of(&vm()), open().watched()), (Some(found), vec![watched.clone()]));
    open().watch_no_more(&watched);
    open().keep(&vm(), "host-b", std::slice::from_ref(&disk)).unwrap();
    open().keep_no_more(&vm());
    assert_eq!((open().starter_of(&vm()), open().watched()), (None, Vec::new()));

    // Locked, and nothing says why; until a record does that could not be read for a while.
    open().keep_found(&vm(), &disk, WhichFile::of(&disk));
    assert_eq!(open().kept_of(&disk), Some((vm(), None)));
    open().explained(&"db".parse().unwrap(), std::slice::from_ref(&disk));
    assert_eq!(open().kept_of(&disk), Some((vm(), None)));
    open().explained(&vm(), std::slice::from_ref(&disk));
    assert_eq!(open().kept_of(&disk), None);
}
