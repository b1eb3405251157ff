//! The tracking program may die at any instant: the tracked one never notices, and can be tracked again.

use crate::tracee::{Ram, Tracee};
use crate::unharmed::{Portrait, open_files, until_settled};
use dirty_tracker::{AttachError, DescriptorSource, InjectError, Scan, Tracker};
use std::ops::Range;
use std::time::{Duration, Instant};

/// How many instants are tried.
const DEATHS: u32 = 300;
/// How long the orphaned injection may take to finish its work. It takes microseconds where a CPU is free.
const PATIENCE: Duration = Duration::from_secs(10);

/// The role of a tracking program, to be killed. Arguments: pid, start and end of the range.
pub(crate) fn agent(arguments: &[&str]) {
    let number = |index: usize| arguments[index].parse::<u64>().unwrap();
    let pid = u32::try_from(number(0)).unwrap();
    println!("ready");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let range = number(1)..number(2);
    match Tracker::attach(pid, &[range], DescriptorSource::Injected) {
        Ok(mut tracker) => {
            println!("attached");
            let mut regions = Vec::new();
            while tracker.scan(Scan::TwoStep, &mut regions).is_ok() {
                regions.clear();
            }
        }
        Err(error) => println!("refused: {error}"),
    }
}

/// Attaches as soon as the orphaned injection of a dead agent, if any, is through.
fn attach_after_death(pid: u32, range: &Range<u64>) -> Tracker {
    let begin = Instant::now();
    loop {
        match Tracker::attach(pid, std::slice::from_ref(range), DescriptorSource::Injected) {
            Ok(tracker) => return tracker,
            Err(
                AttachError::Busy { .. }
                | AttachError::Inject { source: InjectError::AlreadyTraced { .. }, .. },
            ) if begin.elapsed() < PATIENCE => std::thread::yield_now(),
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
fn the_death_of_the_agent_at_any_instant_leaves_no_trace() {
    let ram = Ram::new(1024);
    // The one tracee lives through all of it. It spins, checking its registers, while another thread answers.
    let mut tracee = Tracee::start("spin", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    until_settled(&tracee);
    let before = Portrait::of(tracee.pid());
    let files = open_files(tracee.pid());
    let arguments = [tracee.pid().to_string(), range.start.to_string(), range.end.to_string()];
    let (mut attached, mut held) = (0, 0);
    // Deaths fall between the begin of the attachment and this long after. It follows how long attaching takes on this
    // machine at this time, such that about half of the agents die before they have attached.
    let mut latest = Duration::from_millis(4);
    for death in 0..DEATHS {
        let mut agent = Tracee::start("agent", &arguments.each_ref().map(String::as_str));
        assert_eq!(agent.line(), "ready");
        let begin = Instant::now();
        // Spread evenly, in an order without trend. Sleeping would be too coarse.
        let instant = latest * (death * 7919 % DEATHS) / DEATHS;
        agent.say("go");
        if death % 2 == 0 {
            while begin.elapsed() < instant {
                std::hint::spin_loop();
            }
        } else {
            // At the very moment the process is held.
            while begin.elapsed() < 4 * latest && !is_traced(tracee.pid()) {}
        }
        held += u32::from(is_traced(tracee.pid()));
        agent.kill();
        let had_attached = agent.last_words().is_some();
        attached += u32::from(had_attached);
        latest = if had_attached { latest * 19 / 20 } else { latest * 21 / 20 };
        attach_after_death(tracee.pid(), &range).detach().unwrap();
        assert_eq!(open_files(tracee.pid()), files, "after death {death}");
    }
    eprintln!(
        "{DEATHS} deaths of agents: {attached} after attaching, {held} or more while they held the process"
    );
    assert!((1..DEATHS).contains(&attached), "all deaths fell on the same side of attaching: {attached}");
    assert!(held > 0, "no death fell into a hold");
    before.assert_unchanged(tracee.pid());
    assert_eq!(tracee.ask("stop"), "every register kept");
    assert!(tracee.finish().success());
}

/// Whether a tracer holds the process at this moment.
fn is_traced(pid: u32) -> bool {
    !std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains("TracerPid:\t0\n")
}
