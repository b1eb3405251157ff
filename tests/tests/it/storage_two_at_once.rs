//! Guests with disks that move at the same time must not get in each other's way.

use std::thread;

use end_to_end::{Pair, image, report_adds_up, until, write_noise};
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Nic, Pattern, TestDisk, Work};
use testbed::{Host, root_or_skip};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;

#[test]
fn disks_that_move_in_opposite_directions_both_arrive_whole() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let other = |host: &Host| if host.name() == pair.a().name() { pair.b() } else { pair.a() };
    let scenes = [("here", 10, pair.a(), Format::Raw), ("there", 11, pair.b(), Format::Qcow2)];
    let guests = scenes.map(|(name, number, from, format)| {
        let tap = format!("tap{number}");
        for host in [pair.a(), pair.b()] {
            host.add_tap(&tap).unwrap();
        }
        let nic = Nic::new(&tap, number);
        let address = nic.address;
        disk::create(&image(from, name), format, SIZE).unwrap();
        if format == Format::Raw {
            write_noise(&image(from, name), SIZE / 2, SIZE / 4);
        }
        let work =
            Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 200, depth: 2, check_rate: 100 };
        let disk = TestDisk {
            cache: Cache::Writeback,
            roles: vec![work.within(16), Work::Journal { rate: 20 }.within(1)],
            ..TestDisk::new(from.local_dir().join(name), format, name)
        };
        let spec =
            GuestSpec { nic: Some(nic), fill_mib: 24, rate: 300, disks: vec![disk], ..pair.spec(name, 160) };
        let guest = pair.run(from, name, &spec);
        let before = guest.status();
        let journal = pair.client().unwrap().journal(address, name).unwrap();
        (guest, before, from, address, journal)
    });
    // There, and back again over what was left behind.
    for back in [false, true] {
        thread::scope(|scope| {
            for (guest, _, from, _, _) in &guests {
                let (pair, other) = (&pair, &other);
                scope.spawn(move || {
                    let (from, to) = if back { (other(from), *from) } else { (*from, other(from)) };
                    let report = pair.migrate(&guest.name, from, to, &[]);
                    report_adds_up(&report, guest);
                    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
                    assert_eq!(report.verification.proof_blocks, SIZE / 65536);
                    eprintln!("{}: downtime {:.1} ms, {:?}", guest.name, report.downtime_ms, report.pause);
                });
            }
        });
    }
    for (guest, before, from, address, journal) in &guests {
        assert!(pair.runs_on(&guest.name, from) && pair.show(&guest.name, other(from)).is_none());
        let acknowledged = journal.acknowledged();
        until("records are acknowledged to the client", || journal.acknowledged() > acknowledged + 5);
        let verdict = pair.client().unwrap().check_disks(*address).unwrap();
        assert_eq!(verdict.faults.total(), 0, "{}", guest.console().text());
        assert!(verdict.acknowledged[&guest.name] >= acknowledged && verdict.blocks > 200, "{verdict:?}");
        assert_eq!(journal.report().went_back, []);
        guest.sound_since(before);
    }
}
