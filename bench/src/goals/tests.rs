//! Goals of all kinds, held against cells with round numbers.

use micro::{Engine, Through};
use session::report::{Counted, PostCopy};

use crate::contender::Contender;
use crate::fixtures::{cell, miss, sample};
use crate::measure::Beats;
use crate::outcome::CellRecord;
use crate::record::{DiskCopy, Method, Miss, Sample};

const OWN: Contender = Contender::VMIRROR;
const DEFAULT: Contender = Contender::DEFAULT;
const MULTIFD: Contender = Contender::plain(Method::QemuMultifd);
const NBD: Contender = Contender::NBD;

/// Whether the goal of a case is reached in these cells, and what was measured.
fn judge(cells: &[CellRecord], case: &str) -> (Option<bool>, String) {
    let goal = super::of(cells, None).into_iter().find(|goal| goal.case.starts_with(case)).unwrap();
    (goal.reached, goal.measured)
}

fn judge_one(cell: &CellRecord, case: &str) -> (Option<bool>, String) {
    judge(std::slice::from_ref(cell), case)
}

/// A cell of contenders, each of whose figures are set by its number.
fn cell_with(name: &str, contenders: &[Contender], set: impl Fn(&mut Sample, usize)) -> CellRecord {
    let trials: Vec<_> = contenders.iter().map(|contender| (*contender, 20.0)).collect();
    let mut cell = cell(name, &trials);
    (0..trials.len()).for_each(|trial| set(sample(&mut cell, trial), trial));
    cell
}

#[test]
fn a_goal_needs_both_its_figures() {
    for (downtimes, reached) in [
        (&[(OWN, 8.0), (DEFAULT, 40.0)][..], Some(true)),
        (&[(OWN, 8.0), (DEFAULT, 19.0)], Some(false)),
        (&[(OWN, 11.0), (DEFAULT, 90.0)], Some(false)),
        (&[(OWN, 8.0)], None),
        (&[(DEFAULT, 40.0)], None),
    ] {
        assert_eq!(judge_one(&cell("idle", downtimes), "idle, unshaped").0, reached, "{downtimes:?}");
    }
    let goals = super::of(&[], None);
    assert!(goals.iter().all(|goal| goal.reached.is_none() && goal.measured == "not measured"));
}

#[test]
fn deltas_alone_are_judged_only_where_qemu_does_not_end() {
    const CASE: &str = "dirtying 150 %, small";
    let mut cell = cell("counters-150", &[(OWN, 20.0), (DEFAULT, 300.0)]);
    assert_eq!(judge_one(&cell, CASE).0, Some(false));
    miss(&mut cell, 1, Miss::NotConverged { after_ms: 3e5 });
    let told = "20.0 ms; QEMU: not converged in 300.00 s; 1 of 1 runs".to_owned();
    assert_eq!(judge_one(&cell, CASE), (Some(true), told));
    let mut other = cell.trials[0].clone();
    other.contender = MULTIFD;
    cell.trials.push(other);
    let (_, told) = judge_one(&cell, CASE);
    assert!(told.contains("300.00 s, but QEMU, multifd zstd: 20.0 ms; 1 of 1"), "{told}");
}

#[test]
fn a_guest_that_dirties_less_than_asked_proves_nothing() {
    let reached = |part: f64| {
        let mut cell = cell("steady-100m", &[(OWN, 1.0)]);
        cell.dirtied = cell.dirtied.map(|dirtied| dirtied * part);
        judge_one(&cell, "guest slowdown").0
    };
    assert_eq!([1.0, 0.95, 0.8].map(reached), [Some(true), Some(true), Some(false)]);
}

#[test]
fn bytes_are_judged_on_the_userland_against_both_settings() {
    let all = [OWN, DEFAULT, MULTIFD];
    let sent = |own: u64| {
        let set = |sample: &mut Sample, who| sample.link_bytes = Some([own, 1000, 400][who]);
        judge_one(&cell_with("idle-debian", &all, set), "bytes, Debian userland").0
    };
    assert_eq!([300, 370, 450].map(sent), [Some(true), Some(false), Some(false)]);
    let other = cell_with("idle-text", &all, |_, _| ());
    assert_eq!(judge_one(&other, "bytes, Debian userland").0, None);
}

#[test]
fn memory_and_speed_are_judged() {
    let cell = cell("steady-100m", &[(OWN, 1.0)]);
    assert_eq!(judge_one(&cell, "ledger").0, Some(true));
    let told = "4.0 % at 100.0 MiB/s; 1 of 1 runs".to_owned();
    assert_eq!(judge_one(&cell, "guest slowdown"), (Some(true), told));
}

#[test]
fn no_goal_is_reached_where_vmirror_missed_a_run_or_its_guest_is_not_known_to_be_whole() {
    let whole = cell("idle", &[(OWN, 8.0), (OWN, 8.0), (DEFAULT, 40.0)]);
    let reached = |cell: &CellRecord| judge_one(cell, "idle, unshaped");
    assert_eq!(reached(&whole).0, Some(true));
    let mut missed = whole.clone();
    miss(&mut missed, 1, Miss::Failed { message: "no".into() });
    let (verdict, measured) = reached(&missed);
    assert_eq!(verdict, Some(false));
    assert!(measured.ends_with("; 1 of 2 runs, then: no"), "{measured}");
    missed.trials.remove(0);
    assert_eq!(reached(&missed), (Some(false), "0 of 2 runs, then: no".into()));
    let mut fewer = whole.clone();
    fewer.trials.remove(0);
    assert_eq!(reached(&fewer).0, Some(false));
    for faults in [None, Some(1)] {
        let cell = CellRecord { faults, ..whole.clone() };
        assert_eq!(reached(&cell).0, Some(false), "{faults:?}");
    }
}

#[test]
fn a_stall_that_only_the_client_saw_counts() {
    let mut cell = cell("random-150", &[(OWN, 20.0)]);
    cell.unmigrated = Some(Beats { sent: 9, lost: 0, longest_gap_ms: 3.0, heard_again: true });
    let judge = |cell: &CellRecord| judge_one(cell, "dirtying 150 %, incompressible");
    let heard = |cell: &mut CellRecord, longest_gap_ms, heard_again| {
        let sample = sample(cell, 0);
        let report = sample.report.as_mut().unwrap();
        report.rounds.retain(|round| round.n == 0);
        report.post_copy = Some(PostCopy {
            pages: 1000,
            faults: 10,
            longest_fault_ms: 2.0,
            mean_fault_ms: 1.0,
            duration_ms: 100.0,
            links: 1,
            counted: Counted::All,
        });
        sample.heartbeats = Some(Beats { sent: 9, lost: 0, longest_gap_ms, heard_again });
    };
    heard(&mut cell, 90.0, true);
    let (reached, measured) = judge(&cell);
    assert_eq!(reached, Some(true), "{measured}");
    assert!(measured.starts_with("longest stall 90.0 ms (worst 90.0 ms; not migrated, gap 3.00 ms), 1 pass"));
    sample(&mut cell, 0).report.as_mut().unwrap().post_copy = None;
    assert_eq!(judge(&cell).0, Some(false), "it arrived in some other way");
    heard(&mut cell, 101.0, true);
    assert_eq!(judge(&cell).0, Some(false));
    heard(&mut cell, 5.0, false);
    assert_eq!(judge(&cell).0, Some(false));
}

#[test]
fn bytes_are_those_of_the_link_and_memory_is_vmirrors() {
    let set = |sample: &mut Sample, who| sample.link_bytes = Some([30 << 20, 100 << 20, 40 << 20][who]);
    let mut cell = cell_with("idle-debian", &[OWN, DEFAULT, MULTIFD], set);
    // QEMU's memory is not held against vmirror.
    cell.trials[1].overhead_bytes = Some(1 << 40);
    assert_eq!(["bytes, Debian", "ledger"].map(|case| judge_one(&cell, case).0), [Some(true); 2]);
    sample(&mut cell, 0).link_bytes = None;
    assert_eq!(judge_one(&cell, "bytes, Debian").0, None);
}

#[test]
fn throughput_is_judged_by_one_stream_against_iperf3() {
    for (plain, reached) in [(2.1e9, true), (1.9e9, false)] {
        let through = |streams| Through { streams, iperf3: 4e9, plain, tls: plain / 2.0 };
        let through = vec![through(1), through(2)];
        let engine = Engine { measured_unix_s: 1_700_000_000, memcpy: 8e9, through };
        let goals = super::of(&[], Some(&engine));
        let goal = goals.iter().find(|goal| goal.case.starts_with("throughput")).unwrap();
        assert!(goal.measured.contains("; memcpy 8.00 GB/s (2023-11-1"), "{}", goal.measured);
        assert_eq!(goal.reached, Some(reached));
    }
}

#[test]
fn time_and_bytes_of_disks_are_parts_of_qemus() {
    let with = |name, contenders: &[Contender], seconds: f64, mib: u64| {
        cell_with(name, contenders, |sample, who| {
            let (seconds, mib) = [(seconds, mib), (10.0, 1000)][who];
            sample.until_running_ms = seconds * 1e3;
            sample.link_bytes = Some(mib << 20);
            sample.disk = Some(DiskCopy { began_ms: 500.0, copied_ms: seconds * 1e3 - 500.0 });
        })
    };
    for (seconds, mib, time, bytes) in [(7.0, 500, true, true), (9.0, 600, false, false)] {
        let cell = with("disk-4g-1gbit", &[OWN, NBD], seconds, mib);
        assert_eq!(judge_one(&cell, "disk of 4 GiB, 1 Gbit/s").0, Some(time), "{seconds}");
        assert_eq!(judge_one(&cell, "bytes, disk half").0, Some(bytes), "{mib}");
    }
    assert_eq!(judge_one(&with("disk-4g", &[OWN], 1.0, 1), "disk of 4 GiB, unshaped").0, None);
}

#[test]
fn a_guest_is_to_be_fast_while_its_disk_is_copied_and_after() {
    for (during, copied, reached) in [(95.0, 95.0, true), (85.0, 95.0, false), (95.0, 85.0, false)] {
        let mut cell = cell("disk-write", &[(OWN, 20.0), (NBD, 20.0)]);
        for (trial, (during, copied)) in cell.trials.iter_mut().zip([(during, copied), (100.0, 100.0)]) {
            (trial.throughput.during, trial.throughput.copied) = (Some(during), Some(copied));
        }
        assert_eq!(judge_one(&cell, "guest's writes").0, Some(reached), "{during} {copied}");
    }
}

#[test]
fn added_downtime_is_judged_by_the_larger_of_both_ways_to_see_it() {
    for (with, in_pause, reached) in [(12.0, 4.0, true), (14.0, 4.0, false), (9.0, 6.0, false)] {
        let mut disk = cell("disk-4g", &[(OWN, with)]);
        let pause = &mut sample(&mut disk, 0).report.as_mut().unwrap().pause;
        pause.disks_ms = pause.stopped_ms + in_pause;
        let none = cell("disk-none", &[(OWN, 8.0)]);
        assert_eq!(judge(&[disk, none], "downtime with a disk").0, Some(reached), "{with} {in_pause}");
    }
}

#[test]
fn no_frame_may_be_lost_and_no_gap_be_longer_than_the_pause() {
    for (gap, lost, heard, kept) in [(22.5, 0, true, true), (24.0, 1, false, false)] {
        let cell = cell_with("idle-zero", &[OWN, DEFAULT], |sample, who| {
            let (longest_gap_ms, lost) = [(gap, lost), (90.0, 40)][who];
            sample.heartbeats = Some(Beats { sent: 9000, lost, longest_gap_ms, heard_again: true });
        });
        assert_eq!(judge_one(&cell, "heartbeat gap").0, Some(heard), "{gap}");
        assert_eq!(judge_one(&cell, "frames lost").0, Some(kept), "{lost}");
    }
}

#[test]
fn what_frames_add_is_told_beside_a_guest_whose_frames_are_lost() {
    let with = cell("idle-zero", &[(OWN, 10.0)]);
    assert_eq!(judge_one(&with, "downtime with frames").0, None);
    for (without, expected) in [(9.0, true), (7.0, false)] {
        let without = cell("idle-zero-no-frames", &[(OWN, without)]);
        assert_eq!(judge(&[with.clone(), without], "downtime with frames").0, Some(expected));
    }
}
