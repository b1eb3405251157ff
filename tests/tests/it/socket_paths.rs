//! A name or a directory with which a socket cannot be made is refused before anything begins, never at the hand-over or after it.

use end_to_end::{Pair, image, local, report_adds_up};
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Ram, TestDisk, Work};
use testbed::{Host, Testbed, root_or_skip};

const MIB: u64 = 1 << 20;
/// Letters of the longest name that has room, at host A and at host B.
const MOST: [usize; 2] = [12, 10];

/// Gives a host a `run_dir` in which names of so many letters have room.
fn with_room_for(host: &Host, letters: usize) {
    // The longest socket of a machine called NAME is run_dir/NAME.storage/qmp, of at most 107 bytes.
    let length = 107 - letters - "/.storage/qmp".len();
    let directory = host.directory().join("r".repeat(length - host.directory().as_os_str().len() - 1));
    host.configure(|config| drop(config.insert("run_dir".to_owned(), directory.to_str().unwrap().into())))
        .unwrap();
}

#[test]
fn a_name_that_is_too_long_for_a_socket_is_refused_at_once_and_the_longest_that_fits_moves() {
    if !root_or_skip(
        "a_name_that_is_too_long_for_a_socket_is_refused_at_once_and_the_longest_that_fits_moves",
    ) {
        return;
    }
    let testbed = Testbed::new().unwrap();
    for (host, letters) in testbed.hosts().iter().zip(MOST) {
        with_room_for(host, letters);
        host.start_agent_with(&local()).unwrap();
    }
    let pair = Pair::with_running_agents(testbed);
    let (a, b) = (pair.a(), pair.b());
    let names = [MOST[0] + 1, MOST[0], MOST[1]].map(|letters| "n".repeat(letters));
    let [too_long, longest_here, longest_there] = names.each_ref().map(String::as_str);

    let program = pair.spec("vm", 128).command_line()[0].clone();
    let run = ["run", too_long, "--", &program, "-m", "32"];
    pair.refused(a, &run).is("name-too-long", &[too_long, "up to 12 letters", "run_dir"]);
    let adopt = ["adopt", too_long, "--qmp", "/nonexistent"];
    pair.refused(a, &adopt).is("name-too-long", &[too_long, "up to 12 letters"]);

    // The storage daemons have the longest of all sockets, the source's for the proof after the hand-over.
    disk::create(&image(a, "disk.qcow2"), Format::Qcow2, 16 * MIB).unwrap();
    let disk = || TestDisk {
        roles: vec![Work::Journal { rate: 20 }.within(1)],
        ..TestDisk::new(a.local_dir().join("disk.qcow2"), Format::Qcow2, "disk")
    };
    let spec = GuestSpec { fill_mib: 16, rate: 100, disks: vec![disk()], ..pair.spec("vm", 128) };
    let guest = pair.run(a, longest_there, &spec);
    let before = guest.status();
    let report = pair.migrate(longest_there, a, b, &[]);
    report_adds_up(&report, &guest);
    assert!(report.verification.proof_blocks > 0, "{:?}", report.verification);
    guest.sound_since(&before);
    pair.holds_nothing(a);

    // What fits here and not there is told before anything is begun.
    let spec = GuestSpec { ram: Ram::Private, ..pair.spec("other", 128) };
    let _ = pair.run(a, longest_here, &spec);
    assert_eq!(pair.check(longest_here), ["name-too-long"]);
    pair.migration_refused(longest_here, &[]).is("name-too-long", &["host-b", "up to 10 letters", "shorter"]);
}

#[test]
fn an_agent_in_a_directory_where_no_name_fits_does_not_start() {
    let testbed = if root_or_skip("namespaces") { Testbed::new() } else { Testbed::rootless() }.unwrap();
    with_room_for(testbed.a(), 1);
    testbed.a().start_agent().unwrap();
    testbed.a().stop_agent().unwrap();
    with_room_for(testbed.a(), 0);
    let refused = testbed.a().start_agent().unwrap_err().to_string();
    assert!(refused.contains("run_dir") && refused.contains("is too long"), "{refused}");
}
