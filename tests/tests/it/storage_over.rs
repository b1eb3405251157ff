//! What `--disks` and `--disk-room` ask for, and nothing else.

use std::fs;

use end_to_end::{Pair, image, noise, write_noise};
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::root_or_skip;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

fn pair() -> Option<Pair> {
    if !root_or_skip("hosts with storage of their own") {
        return None;
    }
    let pair = Pair::with_local_disks();
    disk::create(&image(pair.a(), "vm.raw"), Format::Raw, SIZE).unwrap();
    write_noise(&image(pair.a(), "vm.raw"), 8 * MIB, 4 * MIB);
    let drive = format!("file={},format=raw,if=virtio", pair.a().local_dir().join("vm.raw").display());
    pair.run_tiny(pair.a(), "vm", &["-drive", &drive]);
    Some(pair)
}

/// It moves, and both images are equal.
fn moves(pair: &Pair, options: &[&str]) {
    let report = pair.migrate("vm", pair.a(), pair.b(), options);
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
    let [original, copy] = [pair.a(), pair.b()].map(|host| fs::read(image(host, "vm.raw")).unwrap());
    assert!(original == copy, "the images differ");
}

#[test]
fn an_image_that_is_to_be_overwritten_keeps_nothing_of_its_own() {
    let Some(pair) = pair() else { return };
    // Of its content a part is where the original has a hole, and a part is what the original has there.
    fs::write(image(pair.b(), "vm.raw"), noise(SIZE)).unwrap();
    moves(&pair, &["--disks", "mirror"]);
    let there = disk::allocated(&image(pair.b(), "vm.raw")).unwrap();
    assert!(there <= 5 * MIB, "{there} bytes are allocated of what the original has as holes");
}

#[test]
fn an_image_that_is_to_be_thin_has_no_more_room_than_its_content_takes() {
    let Some(pair) = pair() else { return };
    moves(&pair, &[]);
    let [here, there] = [pair.a(), pair.b()].map(|host| disk::allocated(&image(host, "vm.raw")).unwrap());
    assert!(there <= here + here / 10, "{there} bytes are allocated, {here} at the source");
}

#[test]
fn an_image_that_is_to_have_all_its_room_has_it() {
    let Some(pair) = pair() else { return };
    moves(&pair, &["--disk-room", "whole"]);
    assert!(disk::allocated(&image(pair.b(), "vm.raw")).unwrap() >= SIZE);
}

#[test]
fn an_image_that_is_only_read_is_as_it_was_when_the_machine_comes_back() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    // As a CD image may be: its end is within a sector.
    let (original, content) = (image(pair.a(), "cd.iso"), noise(3 * MIB + 100));
    fs::write(&original, &content).unwrap();
    let last_changed = fs::metadata(&original).unwrap().modified().unwrap();
    let name = pair.a().local_dir().join("cd.iso");
    let drive = format!("file={},format=raw,if=virtio,readonly=on", name.display());
    pair.run_tiny(pair.a(), "vm", &["-drive", &drive]);
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        let report = pair.migrate("vm", from, to, &[]);
        assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
        assert!(fs::read(image(to, "cd.iso")).unwrap().starts_with(&content));
    }
    assert_eq!(fs::read(&original).unwrap().len(), content.len());
    assert_eq!(fs::metadata(&original).unwrap().modified().unwrap(), last_changed);
}
