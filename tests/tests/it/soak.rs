//! Twenty machines that are mirrored, moved and disturbed for hours: what the agents take stays level, and nothing is left over.
//!
//! `SOAK=10m` (`2h`, `30s`) is how long, `SEED=N` what is done.

use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use end_to_end::matrix::Chance;
use end_to_end::{Guest, Level, Pair, Side, Trend, until, vmirror};
use serde_json::Value;
use testbed::guest_spec::GuestSpec;
use testbed::{Programs, Status, Wire, fault, root_or_skip};

/// How many machines. All of them boot a kernel; one in five has its memory checked by it all the time.
const MACHINES: usize = 20;
const CHECKED: usize = 5;
/// Where not said otherwise.
const TWO_HOURS: Duration = Duration::from_secs(2 * 60 * 60);
const SEED: u64 = 14;
/// Between looks at the agents.
const LOOK: Duration = Duration::from_secs(5);

fn soak(default: Duration) -> Duration {
    let Ok(text) = std::env::var("SOAK") else { return default };
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "h" => 3600,
        "m" => 60,
        "s" | "" => 1,
        other => panic!("SOAK={text}: {other:?} is no unit of time"),
    };
    Duration::from_secs(number.parse::<u64>().unwrap() * unit)
}

/// The machines of a pair of hosts.
struct Herd {
    pair: Pair,
    guests: Vec<(Guest, Status)>,
}

impl Herd {
    /// Some of them on host B, if that is wanted.
    fn new(on_both: bool) -> Herd {
        let pair = Pair::start();
        let guests = (0..MACHINES).map(|number| {
            let name = format!("vm{number}");
            let checked = number % CHECKED == 0;
            let spec = GuestSpec {
                fill_mib: 8,
                rate: 20,
                check: checked,
                check_rate: Some(64),
                ..pair.spec(&name, 96)
            };
            let host = if on_both && number % 2 == 1 { pair.b() } else { pair.a() };
            let guest = pair.run(host, &name, &spec);
            let status = guest.status();
            (guest, status)
        });
        let guests = guests.collect();
        Herd { pair, guests }
    }

    fn lists(&self) -> [Vec<Value>; 2] {
        [self.pair.a(), self.pair.b()]
            .map(|host| vmirror(host, &["list", "--json"]).done().json().as_array().unwrap().clone())
    }

    /// Where a machine runs, if it is nowhere else and in no migration.
    fn settled(lists: &[Vec<Value>; 2], name: &str) -> Option<Side> {
        // Of one that has left images are kept.
        let listed = |vm: &&Value| vm["name"] == name && vm["state"] != "left";
        let of = |list: &Vec<Value>| list.iter().find(listed).cloned();
        let (side, vm) = match (of(&lists[0]), of(&lists[1])) {
            (Some(vm), None) => (Side::A, vm),
            (None, Some(vm)) => (Side::B, vm),
            _ => return None,
        };
        (vm["state"] == "running" && vm["session"] == Value::Null).then_some(side)
    }

    /// Waits until each runs in one place and none is in a migration, ends mirrors that stand, and looks at the agents.
    fn comes_to_rest(&self, level: &mut Level) {
        until("all machines are settled", || {
            let lists = self.lists();
            let all = (0..MACHINES).all(|number| Herd::settled(&lists, &format!("vm{number}")).is_some());
            if !all {
                for (list, host) in lists.iter().zip([self.pair.a(), self.pair.b()]) {
                    for vm in list.iter().filter(|vm| vm["session"]["goal"] == "mirror") {
                        // One that has just ended need not be.
                        let _ = vmirror(host, &["cancel", vm["name"].as_str().unwrap()]);
                    }
                }
            }
            all
        });
        thread::sleep(Duration::from_secs(2));
        level.look([self.pair.a(), self.pair.b()]);
    }

    /// Stops all of them, and asserts that nothing is left.
    fn ends(self) {
        for (guest, before) in self.guests.iter().step_by(CHECKED) {
            let _ = guest.sound_since(before);
        }
        let lists = self.lists();
        for (list, host) in lists.iter().zip([self.pair.a(), self.pair.b()]) {
            for vm in list {
                let _ = vmirror(host, &["stop", vm["name"].as_str().unwrap(), "--force"]).done();
            }
        }
        for host in [self.pair.a(), self.pair.b()] {
            self.pair.holds_nothing(host);
        }
    }
}

fn told(what: &str, trend: &Trend) {
    eprintln!(
        "{what}: {:.0} min, {} looks: memory of both agents {:.0} MiB, {:+.1} along the line that fits best; descriptors {:.0}, {:+.1}",
        trend.over.as_secs_f64() / 60.0,
        trend.looks,
        trend.mib,
        trend.mib_grown,
        trend.descriptors,
        trend.descriptors_grown,
    );
}

#[test]
#[ignore = "takes ten minutes"]
fn twenty_machines_mirrored_at_once_take_no_more_with_time() {
    let herd = Herd::new(false);
    let (a, b) = (herd.pair.a(), herd.pair.b());
    for (guest, _) in &herd.guests {
        let _ = herd.pair.mirror(&guest.name, a, b, &[]);
    }
    until("all mirrors are in sync", || {
        let sessions = vmirror(a, &["status", "--json"]).done().json();
        let sessions = sessions.as_array().unwrap();
        sessions.len() == MACHINES && sessions.iter().all(|session| session["in_sync"] == true)
    });
    let mut level = Level::default();
    let begun = Instant::now();
    while begun.elapsed() < soak(Duration::from_secs(600)) {
        level.look([a, b]);
        thread::sleep(LOOK);
    }
    let sessions = vmirror(a, &["status", "--json"]).done().json();
    assert_eq!(sessions.as_array().unwrap().len(), MACHINES, "mirrors have ended: {sessions}");
    told("mirrored at once", &level.trend());
    level.trend().is_level();
    for (guest, _) in &herd.guests {
        let _ = vmirror(a, &["cancel", &guest.name]).done();
    }
    herd.ends();
}

#[test]
#[ignore = "takes two hours"]
fn machines_that_are_moved_and_disturbed_for_hours_leave_nothing_behind() {
    if !root_or_skip("a soak with faults of the link") {
        return;
    }
    let seed = std::env::var("SEED").map_or(SEED, |seed| seed.parse().unwrap());
    eprintln!("seed {seed}");
    let mut chance = Chance::new(seed, "soak");
    let herd = Herd::new(true);
    let pair = &herd.pair;
    let mut level = Level::default();
    let (time, begun) = (soak(TWO_HOURS), Instant::now());
    let mut counts = [0_usize; 4];
    let mut commands: Vec<Child> = Vec::new();
    while begun.elapsed() < time {
        // Several at once, and then a fault.
        for _ in 0..1 + chance.number() % 4 {
            let name = format!("vm{}", chance.number() % MACHINES as u64);
            let Some(side) = Herd::settled(&herd.lists(), &name) else { continue };
            let (from, to) = (pair.host(side), pair.host(side.other()).listen().to_string());
            let stands = chance.number().is_multiple_of(3);
            counts[usize::from(stands)] += 1;
            let mut command = from.command(Programs::find().vmirror.unwrap());
            command.args(if stands { &["mirror", "--detach"][..] } else { &["migrate"] });
            command.args([&name, "--to", &to, "--quiet"]).stdout(Stdio::null()).stderr(Stdio::null());
            commands.push(command.spawn().unwrap());
        }
        // Those that have ended.
        commands.retain_mut(|command| command.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(chance.number() % 3000));
        disturb(pair, &mut chance, &mut counts);
        if chance.number().is_multiple_of(3) {
            herd.comes_to_rest(&mut level);
        }
    }
    herd.comes_to_rest(&mut level);
    let [migrations, mirrors, cancels, faults] = counts;
    eprintln!("{migrations} migrations, {mirrors} mirrors, {cancels} cancelled, {faults} faults");
    told("moved and disturbed", &level.trend());
    level.trend().is_level();
    herd.ends();
}

/// A fault after which both agents are the ones that they were: what they take is followed.
fn disturb(pair: &Pair, chance: &mut Chance, counts: &mut [usize; 4]) {
    let host = *chance.one(&[pair.a(), pair.b()]);
    let lasts = Duration::from_millis(*chance.one(&[200, 1000, 3000, 12_000]));
    match chance.number() % 6 {
        0 => {
            pair.testbed().cut(host, Wire::Link).unwrap();
            thread::sleep(lasts);
            pair.testbed().mend(host, Wire::Link).unwrap();
            counts[3] += 1;
        }
        1 => {
            let stopped = fault::pause(host.agent_pid().unwrap());
            thread::sleep(lasts);
            drop(stopped);
            counts[3] += 1;
        }
        2 => {
            // A copy's QEMU. It is not to become a machine's in between: only where nothing but mirrors stand.
            let lists = [pair.a(), pair.b()]
                .map(|host| vmirror(host, &["list", "--json"]).done().json().as_array().unwrap().clone());
            let listed: Vec<&Value> = lists.iter().flatten().collect();
            let stand = |vm: &&Value| vm["session"] == Value::Null || vm["session"]["goal"] == "mirror";
            let is_machines = |pid: i32| listed.iter().any(|vm| vm["pid"].as_i64() == Some(i64::from(pid)));
            let copy = host.processes_of("qemu-system").into_iter().find(|pid| !is_machines(*pid));
            if let Some(copy) = copy.filter(|_| listed.iter().all(stand)) {
                fault::kill(copy);
                counts[3] += 1;
            }
        }
        3 => {
            let list = vmirror(host, &["list", "--json"]).done().json();
            let busy = list.as_array().unwrap().iter().find(|vm| vm["session"] != Value::Null).cloned();
            if let Some(vm) = busy {
                let _ = vmirror(host, &["cancel", vm["name"].as_str().unwrap()]);
                counts[2] += 1;
            }
        }
        _ => {}
    }
}
