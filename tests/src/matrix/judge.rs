//! What has come of a strike.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use session::Report;
use session::report::Verdict;

use super::cell::{Cell, Kind};
use super::lane::{Lane, NAME, difference};
use crate::{Said, Side, UnderWay, vmirror};

/// How long everything may take to settle by itself before a person decides, and with that in all: what the documents name the
/// longest of is a source that asks every 60 s.
const BY_ITSELF: Duration = Duration::from_secs(75);
const AT_ALL: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(150);
/// What is given back may come a moment after everything else: a tap is held while the guest is announced anew, and a copy is waited for.
const GIVEN_BACK: Duration = Duration::from_secs(30);
/// How long a guest may take to check all of its memory.
const CHECK: Duration = Duration::from_secs(60);

/// What has come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// One runs, it has lost nothing, and nothing is left over; or the machine was lost with what was ended, as the documents say.
    Ok,
    /// Both hosts have run it.
    Doubled,
    /// Nobody has it.
    Lost,
    /// It has lost of its memory or disk.
    Damaged,
    /// Something is left over.
    Leak,
    /// It runs nowhere, and nothing leads out of that; or it cannot be reached.
    Stuck,
}

/// A cell that was run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// Its name.
    pub cell: String,
    /// With which seed.
    pub seed: u64,
    /// What has come of it.
    pub outcome: Outcome,
    /// How that was seen.
    pub detail: String,
    /// The rule by which the machine was lost with what was ended.
    pub rule: Option<String>,
    /// How long it took to settle, from when everything was put right that a person or a service manager would.
    pub settled_ms: u64,
    /// A person had to decide.
    pub person: bool,
    /// What `vmirror migrate` ended with.
    pub code: Option<i32>,
    /// Where it runs.
    #[serde(skip)]
    pub at: Option<Side>,
}

impl Run {
    pub(super) fn not_begun(cell: &Cell, seed: u64, why: &str) -> Run {
        Run {
            cell: cell.to_string(),
            seed,
            outcome: Outcome::Stuck,
            detail: format!("before the strike: {why}"),
            rule: None,
            settled_ms: 0,
            person: false,
            code: None,
            at: None,
        }
    }

    /// What the command said: how it ended, and the comparison of what was frozen at the source with what was sent of it.
    pub(super) fn heard(&mut self, said: &Said) {
        self.code = said.code;
        let report = serde_json::from_str::<Report>(&said.stdout);
        if self.outcome == Outcome::Ok
            && report.is_ok_and(|report| report.verification.proof == Verdict::Mismatch)
        {
            self.outcome = Outcome::Damaged;
            self.detail = format!("the proof fails: {}", said.stdout);
        }
    }

    /// Whether the guest was in the way of the strike, and nothing was shown.
    #[must_use]
    pub fn is_not_begun(&self) -> bool {
        self.detail.starts_with("before the strike")
    }
}

/// Where everything stands.
struct Standing {
    /// What is not as it should be at the end; nothing: all is settled.
    missing: Option<String>,
    at: Option<Side>,
    /// Nothing but what a host holds is wrong.
    leak: bool,
    doubt: bool,
}

/// Judges a strike.
pub(super) struct Judge<'a> {
    lane: &'a Lane,
    cell: &'a Cell,
    from: Side,
    migration: &'a UnderWay<'a>,
    person: bool,
    begun: Instant,
}

impl<'a> Judge<'a> {
    pub(super) fn new(lane: &'a Lane, cell: &'a Cell, from: Side, migration: &'a UnderWay<'a>) -> Judge<'a> {
        Judge { lane, cell, from, migration, person: false, begun: Instant::now() }
    }

    pub(super) fn judge(mut self) -> Run {
        let mut left_since = None;
        loop {
            if let Some(how) = self.lane.watch.doubled() {
                return self.run(Outcome::Doubled, how, None);
            }
            let standing = self.look();
            let elapsed = self.begun.elapsed();
            left_since = standing.leak.then(|| left_since.unwrap_or_else(Instant::now));
            let is_left = left_since.is_some_and(|since| since.elapsed() > GIVEN_BACK);
            match &standing.missing {
                None => return self.settled(standing.at),
                Some(_) if standing.doubt && !self.person && elapsed > BY_ITSELF => self.decide(),
                Some(missing) if elapsed > AT_ALL || is_left => {
                    let missing = missing.clone();
                    return self.unsettled(&standing, &missing);
                }
                Some(_) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    fn run(&self, outcome: Outcome, detail: String, at: Option<Side>) -> Run {
        Run {
            cell: String::new(),
            seed: 0,
            outcome,
            detail,
            rule: None,
            settled_ms: u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            person: self.person,
            code: None,
            at,
        }
    }

    fn look(&self) -> Standing {
        let mut standing = Standing { missing: None, at: None, leak: false, doubt: false };
        let listed = [Side::A, Side::B].map(|side| self.lane.listed(side));
        let [Ok(a), Ok(b)] = &listed else {
            standing.missing = Some(format!("an agent does not answer: {listed:?}"));
            return standing;
        };
        let states = [a, b].map(|vm| vm.as_ref().map(|vm| vm["state"].as_str().unwrap_or_default()));
        let there: Vec<Side> =
            [Side::A, Side::B].into_iter().filter(|side| states[*side as usize].is_some()).collect();
        standing.doubt = states.iter().flatten().any(|state| !["running", "starting"].contains(state));
        let busy = [a, b].into_iter().flatten().any(|vm| vm["session"] != Value::Null);
        standing.missing = match there[..] {
            _ if busy || !self.migration.has_ended() => Some("the migration has not ended".to_owned()),
            [at] if states[at as usize] == Some("running") => {
                standing.at = Some(at);
                None
            }
            [] if self.cell.loss().is_some() => None,
            _ => Some(format!("listed as {states:?}")),
        };
        if standing.missing.is_none() {
            standing.missing = self.left_over(standing.at);
            standing.leak = standing.missing.is_some();
        }
        if standing.missing.is_none() {
            let running = self.lane.watch.running();
            if running != standing.at.into_iter().collect::<Vec<_>>() {
                standing.missing = Some(format!("listed at {:?}, and {running:?} run it", standing.at));
            }
        }
        standing
    }

    /// What hosts hold beside what they should.
    fn left_over(&self, at: Option<Side>) -> Option<String> {
        let mut found = Vec::new();
        for side in [Side::A, Side::B] {
            let host = self.lane.pair().host(side);
            let now = host.inventory().unwrap();
            let left = if at == Some(side) {
                let held = &self.lane.holding[side as usize];
                let differences: Option<Vec<_>> = held.iter().map(|held| difference(held, &now)).collect();
                differences.map(|differences| {
                    let told: Vec<String> = differences.iter().map(ToString::to_string).collect();
                    told.join(" (as it was before); or ")
                })
            } else {
                self.lane.empty(side).difference(&now).err().map(|difference| difference.to_string())
            };
            found.extend(left.map(|left| format!("{}: {left}", host.name())));
        }
        (!found.is_empty()).then(|| found.join("; "))
    }

    fn settled(&self, at: Option<Side>) -> Run {
        let settled = self.run(Outcome::Ok, String::new(), at);
        let Some(_) = at else {
            return Run { rule: self.cell.loss().map(str::to_owned), ..settled };
        };
        let judged = match self.sound() {
            Ok(()) => settled,
            Err((outcome, detail)) => Run { outcome, detail, ..settled },
        };
        match self.lane.watch.doubled() {
            Some(how) => Run { outcome: Outcome::Doubled, detail: how, ..judged },
            None => judged,
        }
    }

    /// The guest's own word, and over its network.
    fn sound(&self) -> Result<(), (Outcome, String)> {
        let stuck = |why: String| (Outcome::Stuck, why);
        let Some(living) = &self.lane.living else { return Ok(()) };
        let first = self.lane.status().map_err(stuck)?;
        let booted = living.guest.boot_id();
        let start = Instant::now();
        loop {
            let now = self.lane.status().map_err(stuck)?;
            if now.boot_id != booted {
                return Err((Outcome::Damaged, "the guest has rebooted".to_owned()));
            }
            if now.faults() > 0 {
                return Err((Outcome::Damaged, format!("the guest has found faults: {now:?}")));
            }
            if now.passes >= first.passes + 2 {
                break;
            }
            if start.elapsed() > CHECK {
                return Err(stuck(format!(
                    "the guest does not get through its memory: {now:?}, was {first:?}"
                )));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        if self.cell.kind == Kind::Disk {
            let client = self.lane.pair().client().ok_or_else(|| stuck("there is no client".to_owned()))?;
            let verdict = client.check_disks(living.nic.address).map_err(|e| stuck(e.to_string()))?;
            if verdict.blocks == 0 {
                return Err(stuck(
                    "the guest has written nothing to its disk that it could check".to_owned(),
                ));
            }
            if verdict.faults.total() > 0 {
                return Err((Outcome::Damaged, format!("the guest has found faults: {verdict:?}")));
            }
        }
        Ok(())
    }

    fn unsettled(&self, standing: &Standing, missing: &str) -> Run {
        let qemus =
            [Side::A, Side::B].map(|side| self.lane.pair().host(side).processes_of("qemu-system").len());
        let outcome = match standing {
            Standing { leak: true, .. } => Outcome::Leak,
            _ if qemus == [0, 0] => Outcome::Lost,
            _ => Outcome::Stuck,
        };
        let detail = format!("after {:?}: {missing}; {qemus:?} QEMUs", self.begun.elapsed());
        self.run(outcome, detail, standing.at)
    }

    /// What a person does who has read "Uncertain VMs" in docs/operations.md.
    fn decide(&mut self) {
        self.person = true;
        let (source, destination) =
            (self.lane.pair().host(self.from), self.lane.pair().host(self.from.other()));
        let resolve = |host, decision| vmirror(host, &["resolve", NAME, decision, "--json"]);
        let [here, there] = [self.from, self.from.other()].map(|side| self.lane.listed(side).ok().flatten());
        let doubtful = |vm: &Option<Value>| vm.as_ref().is_some_and(|vm| vm["state"] == "uncertain");
        if doubtful(&here) {
            // To run it at the source, unless it runs at the destination.
            let runs_there = there.is_some() && resolve(destination, "--give-up").code != Some(0);
            let _ = resolve(source, if runs_there { "--give-up" } else { "--run-here" });
        } else if doubtful(&there) {
            // The source owns it, or is lost.
            let _ = resolve(destination, if here.is_some() { "--give-up" } else { "--run-here" });
        }
    }
}
