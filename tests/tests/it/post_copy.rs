//! A guest that outruns its mirror is handed over before its memory is complete, and must never see what it was not given.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use end_to_end::{Guest, OUTRUN, PAGE, Pair, UnderWay, until, vmirror};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use session::Report;
use session::report::{Counted, Outcome, Verdict};
use testbed::guest_spec::GuestSpec;
use testbed::{AgentOptions, Host, Monitor, Status, Testbed, Wire, root_or_skip};

/// What QEMU is made to wait for memory by.
const DEVICE: &str = "/dev/userfaultfd";

/// A guest that was handed over and lacks memory for some seconds more: the link has become slow.
struct Lacking<'a> {
    pair: &'a Pair,
    guest: Guest,
    before: Status,
    migration: UnderWay<'a>,
}

impl Lacking<'_> {
    fn begin(pair: &Pair) -> Lacking<'_> {
        Lacking::begin_with(pair, &outrun(pair))
    }

    fn begin_with<'a>(pair: &'a Pair, spec: &GuestSpec) -> Lacking<'a> {
        let guest = pair.run(pair.a(), "vm", spec);
        let before = guest.status();
        let migration = pair.begin("vm", pair.a(), pair.b(), &["--on-diverge", "post-copy"]);
        migration.reaches("synchronize");
        until("QEMU at the destination waits for memory", || logged(pair.b(), "QEMU loads its devices"));
        pair.link_carries(OUTRUN / 4);
        until("the guest runs there", || logged(pair.b(), "a VM has arrived and runs"));
        Lacking { pair, guest, before, migration }
    }

    /// Asserts that it comes to have everything, there and only there, and that nothing was lost.
    fn lacks_nothing_at_last(&self) {
        let Lacking { pair, guest, before, .. } = self;
        until("it lacks nothing", || logged(pair.b(), "nothing is missing any more"));
        until("it is listed there", || pair.runs_on("vm", pair.b()));
        until("the source has let go", || pair.show("vm", pair.a()).is_none());
        pair.holds_nothing(pair.a());
        guest.sound_since(before);
        until("its QEMU has nothing more to wait by", || wait_by(pair, pair.b()).is_empty());
    }
}

fn logged(host: &Host, words: &str) -> bool {
    times_logged(host, words) > 0
}

fn times_logged(host: &Host, words: &str) -> usize {
    fs::read_to_string(host.agent_log()).unwrap().matches(words).count()
}

/// What the QEMU on a host has open of what post-copy needs.
fn wait_by(pair: &Pair, host: &Host) -> Vec<PathBuf> {
    let open = fs::read_dir(format!("/proc/{}/fd", pair.qemu(host).unwrap())).unwrap();
    // One may be closed while they are looked at.
    let links = open.flatten().filter_map(|open| fs::read_link(open.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("userfaultfd")).collect()
}

fn outrun(pair: &Pair) -> GuestSpec {
    pair.outrun_by(pair.spec("vm", 256))
}

/// What a report of a post-copy has to say.
fn supplied(report: &Report) {
    let verification = &report.verification;
    assert_eq!((verification.gate, verification.proof), (Verdict::Match, Verdict::Match), "{report:#?}");
    assert_eq!(verification.proof_pages, report.memory.pages);
    let post_copy = report.post_copy.as_ref().unwrap_or_else(|| panic!("no post-copy: {report:#?}"));
    assert!(post_copy.pages > 0 && post_copy.faults > 0, "{post_copy:?}");
    assert!(post_copy.longest_fault_ms >= post_copy.mean_fault_ms, "{post_copy:?}");
}

#[test]
fn a_guest_that_outruns_the_link_arrives_and_lacks_nothing() {
    const NAME: &str = "a_guest_that_outruns_the_link_arrives_and_lacks_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let guest = pair.run(pair.a(), "vm", &outrun(&pair));
    let before = guest.status();
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        let report = pair.migrate("vm", from, to, &["--on-diverge", "post-copy"]);
        supplied(&report);
        eprintln!("downtime {:.1} ms, {:?}", report.downtime_ms, report.post_copy);
        pair.holds_nothing(from);
    }
    guest.sound_since(&before);
}

#[test]
fn a_link_that_is_lost_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_link_that_is_lost_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    pair.testbed().cut(pair.a(), Wire::Link).unwrap();
    until("the link is given up", || logged(pair.a(), "the link was lost while memory was supplied"));
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    pair.testbed().mend(pair.a(), Wire::Link).unwrap();
    lacking.lacks_nothing_at_last();
    let report = lacking.migration.ended().report();
    supplied(&report);
    assert!(report.post_copy.unwrap().links > 1);
    assert!(report.health.is_some(), "nothing was heard of it after the link was back");
}

#[test]
fn a_destination_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_destination_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    // A monitor of the user's own: while there is one, QEMU closes nothing of what the agent has given it.
    let socket = pair.a().directory().join("own.qmp");
    let spec = GuestSpec { qmp: Some(socket.clone()), ..outrun(&pair) };
    let lacking = Lacking::begin_with(&pair, &spec);
    let _own = Monitor::connect(&own_socket(pair.b())).unwrap();
    pair.b().kill_agent().unwrap();
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    assert!(wait_by(&pair, pair.b()).iter().any(|open| open == Path::new(DEVICE)));
    pair.b().start_agent().unwrap();
    lacking.lacks_nothing_at_last();
    let report = lacking.migration.ended().done().report();
    supplied(&report);
    assert_eq!(report.post_copy.unwrap().counted, Counted::Part, "what the first agent had counted is gone");
}

#[test]
fn a_destination_agent_that_cannot_take_over_is_not_taken_for_one_that_lacks_nothing() {
    const NAME: &str = "a_destination_agent_that_cannot_take_over_is_not_taken_for_one_that_lacks_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    pair.b().kill_agent().unwrap();
    let missing = pair.b().run_dir().join("vm.missing");
    let aside = missing.with_extension("aside");
    fs::rename(&missing, &aside).unwrap();
    pair.b().start_agent().unwrap();
    until("the source has heard so", || logged(pair.b(), "lacks memory and cannot be given it"));
    let warned = |progress: &serde_json::Value| {
        progress["warning"].as_str().is_some_and(|why| why.contains("vm.missing"))
    };
    lacking.migration.shows("why it does not go on", warned);
    assert!(pair.show("vm", pair.a()).is_some(), "the source threw away what only it has");
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    fs::rename(&aside, &missing).unwrap();
    lacking.lacks_nothing_at_last();
    supplied(&lacking.migration.ended().done().report());
}

#[test]
fn a_destination_without_room_for_the_rest_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_destination_without_room_for_the_rest_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    pair.b().limit_ram(320 << 20).unwrap();
    let lacking = Lacking::begin(&pair);
    let filler = pair.b().ram_dir().join("filler");
    fill(&filler);
    until("the source has heard so", || logged(pair.a(), "the link was lost while memory was supplied"));
    let tried = times_logged(pair.a(), "the link was lost while memory was supplied");
    std::thread::sleep(Duration::from_secs(3));
    // At most every 0.2 s, and ever more seldom while nothing gets through.
    let again = times_logged(pair.a(), "the link was lost while memory was supplied") - tried;
    assert!(again <= 15, "tried {again} times within 3 s");
    fs::remove_file(&filler).unwrap();
    lacking.lacks_nothing_at_last();
    let report = lacking.migration.ended().done().report();
    supplied(&report);
    assert!(report.post_copy.unwrap().links > 1);
}

/// Takes all the room that a file system has left.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let zeros = vec![0; 1 << 20];
    for length in [1 << 20, PAGE as usize] {
        while file.write_all(&zeros[..length]).is_ok() {}
    }
}

#[test]
fn a_machine_that_ends_while_it_lacks_memory_is_not_said_to_have_arrived() {
    const NAME: &str = "a_machine_that_ends_while_it_lacks_memory_is_not_said_to_have_arrived";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    let qemu = Pid::from_raw(pair.qemu(pair.b()).unwrap()).unwrap();
    kill_process(qemu, Signal::KILL).unwrap();
    let said = lacking.migration.ended();
    assert_eq!(said.code, Some(3), "{said:?}\n{}", pair.logs());
    let report = said.report();
    assert_eq!(report.outcome, Outcome::Uncertain, "{report:#?}");
    let error = report.error.as_ref().unwrap();
    assert_eq!(error.finding.kind, "ended-there", "{error:?}");
    // That nothing was proved is no word of what was not tracked.
    assert_eq!(report.verification.proof, Verdict::NotMade, "{report:#?}");
    assert_eq!(report.post_copy.as_ref().unwrap().counted, Counted::Nothing);
    for host in [pair.a(), pair.b()] {
        pair.holds_nothing(host);
    }
}

#[test]
fn a_balloon_that_moves_while_the_guest_lacks_memory_spoils_no_page() {
    const NAME: &str = "a_balloon_that_moves_while_the_guest_lacks_memory_spoils_no_page";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let socket = pair.a().directory().join("own.qmp");
    let extra = vec!["-device".into(), "virtio-balloon-pci".into()];
    let spec = GuestSpec { qmp: Some(socket.clone()), extra, ..outrun(&pair) };
    let lacking = Lacking::begin_with(&pair, &spec);
    // The socket of that name is the source's until that has supplied everything.
    let mut qmp = Monitor::connect(&own_socket(pair.b())).unwrap();
    qmp.execute("balloon", json!({ "value": 160u64 << 20 })).unwrap();
    until("the balloon takes memory", || balloon(&mut qmp) < 250 << 20);
    qmp.execute("balloon", json!({ "value": 256u64 << 20 })).unwrap();
    until("the balloon gives memory back", || balloon(&mut qmp) == 256 << 20);
    lacking.lacks_nothing_at_last();
    supplied(&lacking.migration.ended().done().report());
}

/// Where the only socket of the user's is that a machine has at its destination.
fn own_socket(host: &Host) -> PathBuf {
    host.run_dir().join("vm.d").join("socket1")
}

fn balloon(qmp: &mut Monitor) -> u64 {
    qmp.execute("query-balloon", json!({})).unwrap()["actual"].as_u64().unwrap()
}

#[test]
fn post_copy_is_refused_before_anything_begins_where_a_guest_cannot_be_made_to_wait() {
    const NAME: &str = "post_copy_is_refused_before_anything_begins_where_a_guest_cannot_be_made_to_wait";
    if !root_or_skip(NAME) {
        return;
    }
    let anybody_may = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    if anybody_may.trim() != "0" || !Path::new(DEVICE).exists() {
        eprintln!("SKIPPED {NAME}: this kernel lets anybody have a userfaultfd, or has no {DEVICE}");
        return;
    }
    let testbed = Testbed::new().unwrap();
    let pair = Pair::of(testbed);
    pair.run_tiny(pair.a(), "vm", &[]);
    pair.b().stop_agent().unwrap();
    pair.b()
        .start_agent_with(&AgentOptions { hidden: vec![DEVICE.into()], ..AgentOptions::default() })
        .unwrap();
    let address = pair.b().listen().to_string();
    let options = ["vm", "--to", &address, "--on-diverge", "post-copy"];
    let check = vmirror(pair.a(), &[&["check", "--json"], &options[..]].concat());
    let found = &check.json()["findings"];
    assert_eq!((check.code, &found[0]["kind"]), (Some(2), &json!("post-copy")), "{check:?}");
    assert_eq!(found.as_array().unwrap().len(), 1, "{check:?}");
    let refusal = pair.refused(pair.a(), &[&["migrate"], &options[..]].concat());
    refusal.is("post-copy", &[DEVICE, "host-b", "udev"]);
    // What does not need it does not ask for it.
    let _ = vmirror(pair.a(), &["check", "vm", "--to", &address]).done();
}

#[test]
fn a_source_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_source_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    pair.a().kill_agent().unwrap();
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    pair.a().start_agent().unwrap();
    lacking.lacks_nothing_at_last();
}
