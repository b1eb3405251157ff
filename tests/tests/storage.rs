//! Disks move with the machine.

use end_to_end::{Pair, accounted};
use migration::report::DiskMode;
use testbed::guest_spec::GuestSpec;

#[test]
fn a_disk_of_a_local_file_moves_with_its_machine() {
    if !testbed::root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let image = pair.a().local_dir().join("disk.raw");
    let here = pair.a().disk_dir().join("disk.raw");
    let content: Vec<u8> = (0..64 << 20 >> 12).flat_map(guest::reader::block).collect();
    std::fs::write(&here, &content).unwrap();
    let spec = GuestSpec { direct_disk: Some(image), ..pair.spec("disk", 256) };
    let guest = pair.run(pair.a(), "disk", &spec);
    let before = guest.status();
    let report = pair.migrate("disk", pair.a(), pair.b(), &[]);
    accounted(&report, &guest);
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
    guest.sound_since(&before);
    assert!(std::fs::read(pair.b().disk_dir().join("disk.raw")).unwrap() == content);
}
