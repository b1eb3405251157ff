//! Disks around the page cache, read and written all the time while they are mirrored: nothing is lost, whoever does the I/O.

use end_to_end::{Pair, image, report_adds_up, until};
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Aio, GuestSpec, Io, Nic, Pattern, TestDisk, Work};
use testbed::root_or_skip;

const TAP: &str = "tap0";
const SIZE: u64 = 48 << 20;
const HOPS: usize = 4;

/// A guest with two disks of which this does the I/O moves some times.
fn moves(aio: Aio) {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    for host in [pair.a(), pair.b()] {
        host.add_tap(TAP).unwrap();
    }
    let disks = [("d0.raw", Format::Raw), ("d1.qcow2", Format::Qcow2)].map(|(name, format)| {
        disk::create(&image(pair.a(), name), format, SIZE).unwrap();
        let io =
            Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 400, depth: 4, check_rate: 200 };
        TestDisk {
            aio,
            roles: vec![io.within(24), Work::Journal { rate: 20 }.within(1)],
            ..TestDisk::new(pair.a().local_dir().join(name), format, &name[..2])
        }
    });
    let nic = Nic::new(TAP, 10);
    let address = nic.address;
    let spec =
        GuestSpec { nic: Some(nic), fill_mib: 32, rate: 500, disks: disks.to_vec(), ..pair.spec("vm", 192) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let client = pair.client().unwrap();
    let journals = ["d0", "d1"].map(|serial| client.journal(address, serial).unwrap());
    let mut hosts = [pair.a(), pair.b()];
    for _ in 0..HOPS {
        let report = pair.migrate("vm", hosts[0], hosts[1], &[]);
        report_adds_up(&report, &guest);
        assert!(report.disks.iter().all(|disk| disk.mode == DiskMode::Mirrored), "{:?}", report.disks);
        assert_eq!(report.verification.proof_blocks, 2 * SIZE / 65536);
        let quiesced = report.quiesced.unwrap();
        assert!(quiesced.stops >= 2, "{quiesced:?}");
        eprintln!("downtime {:.1} ms, {:?}; {quiesced:?}", report.downtime_ms, report.pause);
        let writes = guest.status().disks.unwrap().writes;
        until("it writes on", || guest.status().disks.unwrap().writes > writes + 100);
        hosts.reverse();
    }
    let acknowledged = journals.each_ref().map(|journal| journal.acknowledged());
    let verdict = client.check_disks(address).unwrap();
    assert_eq!(verdict.faults.total(), 0, "{}", guest.console().text());
    assert!(verdict.blocks > 1000, "{verdict:?}");
    for (journal, (serial, acknowledged)) in journals.iter().zip(["d0", "d1"].iter().zip(acknowledged)) {
        assert!(acknowledged > 20 && verdict.acknowledged[*serial] >= acknowledged, "{verdict:?}");
        assert_eq!(journal.report().went_back, []);
    }
    guest.sound_since(&before);
}

#[test]
fn nothing_is_lost_of_disks_that_the_kernel_reads_and_writes() {
    moves(Aio::Native);
}

#[test]
fn nothing_is_lost_of_disks_that_threads_read_and_write() {
    moves(Aio::Threads);
}

#[test]
fn nothing_is_lost_of_disks_that_io_uring_reads_and_writes() {
    // Absent, 0: for everyone. 1: not for everyone, but for root.
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    if disabled.trim() == "2" {
        eprintln!("skipped: the kernel has no io_uring");
        return;
    }
    moves(Aio::IoUring);
}
