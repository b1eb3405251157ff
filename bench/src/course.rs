//! The course of a run: the scene, the guests, the migrations in turns, the checks at the end.

use std::time::Duration;

use readable::{bytes, count, measured_ms as ms};
use session::Report;
use testbed::client::{Echo, EchoReport};
use testbed::surroundings::Surroundings;
use testbed::{AgentOptions, Console, GuestSpec, Host, Inventory, Programs, Status, Testbed};

use crate::baseline::Setting;
use crate::error::BenchError;
use crate::measure::with_heartbeats;
use crate::mirrored::{self, NAME};
use crate::narrator::Narrator;
use crate::present;
use crate::record::{GuestFacts, Method, Record, Sample};
use crate::run::Run;
use crate::scene::{self, ADDRESSES, Scene, TWIN};
use crate::settings::Settings;

/// How long the client listens to the guest that is not moved.
const UNMIGRATED: Duration = Duration::from_secs(3);
/// How long the guest may take to check all of itself once more.
const CHECKED: Duration = Duration::from_secs(120);
/// How long a migration may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long what is being released may take.
const RELEASE: Duration = Duration::from_secs(15);
/// TCP connections from the client to each guest, held through all migrations.
const CONNECTIONS: usize = 2;

/// What a run leaves besides its record.
#[derive(Debug, Default)]
pub struct Course {
    /// Everything that was seen.
    pub record: Record,
    /// vmirror's own page of each of its migrations.
    pub pages: Vec<String>,
}

/// The guests, and their client's connections.
struct Stage {
    // In the order in which they are to go.
    echoes: Vec<Echo>,
    scene: Scene,
    /// What host B held before any guest came.
    empty: Inventory,
}

/// Does all of it. What was seen until an error is in `course` all the same. A migration by vmirror that did not complete ends
/// it too, as a check that did not hold.
pub fn run(
    settings: &Settings,
    run: &Run,
    narrator: &mut Narrator,
    course: &mut Course,
) -> Result<(), BenchError> {
    let programs = Programs::find();
    course.record.started = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S %Z").to_string();
    course.record.surroundings = Surroundings::find(&programs);
    let mut stage = Stage::set(settings, &programs, run, narrator, &mut course.record)?;
    for round in 0..settings.runs {
        for turn in turns(round, settings.alone) {
            run.check()?;
            let sample = match turn {
                Method::Vmirror => {
                    let sample = stage.by_vmirror(round, narrator)?;
                    if let Some(report) = &sample.report {
                        course.pages.push(mirrored::page(scene::hosts(&stage.scene.bed, round)[0], report)?);
                    }
                    sample
                }
                method => stage.by_qemu(method, narrator)?,
            };
            let completed = sample.report.as_ref().is_none_or(|report| report.error.is_none());
            course.record.samples.push(Sample { round, ..sample });
            if !completed {
                check_reports(&mut course.record);
                return Ok(());
            }
        }
    }
    stage.check(settings.runs, narrator, &mut course.record)
}

/// Who moves its guest when: each method goes first as often as any other, and QEMU's two ways bring the twin back.
fn turns(round: u32, alone: bool) -> Vec<Method> {
    if alone {
        return vec![Method::Vmirror];
    }
    let mut turns = Method::DEMO.to_vec();
    let first = round as usize % turns.len();
    turns.rotate_left(first);
    turns
}

impl Stage {
    fn set(
        settings: &Settings,
        programs: &Programs,
        run: &Run,
        narrator: &mut Narrator,
        record: &mut Record,
    ) -> Result<Self, BenchError> {
        let root = rustix::process::geteuid().is_root() && !settings.rootless;
        record.network = root;
        let bed = if root { Testbed::with(programs)? } else { Testbed::rootless_with(programs)? };
        scene::prepare(&bed, &AgentOptions::default(), root)?;
        narrator.step(&format!(
            "two hosts are up, an agent on each: {} and {}{}",
            address(bed.a()),
            address(bed.b()),
            if root {
                ", and a client on the guests' network"
            } else {
                "; without root: no network for guests"
            }
        ));
        let empty = bed.b().inventory()?;
        let spec = |name| -> Result<GuestSpec, BenchError> {
            let common = scene::spec(&bed, name, root)?;
            Ok(GuestSpec { memory_mib: settings.memory, fill_mib: settings.fill, ..common })
        };
        let (spec, twin_spec) = (spec(NAME)?, spec(TWIN)?);
        record.guest = Some(GuestFacts {
            memory_mib: spec.memory_mib,
            fill_mib: spec.fill_mib,
            cpus: spec.cpus,
            accelerator: spec.accelerator.name().to_owned(),
            command_line: spec.command_line(),
        });
        let twin = (!settings.alone).then_some(&twin_spec);
        let scene = Scene::boot(bed, &spec, twin, run, |text| narrator.step(text))?;
        let mut stage = Self { echoes: Vec::new(), scene, empty };
        stage.connect(narrator, record)?;
        Ok(stage)
    }

    /// The client's connections, and what it notices before anything is moved.
    fn connect(&mut self, narrator: &mut Narrator, record: &mut Record) -> Result<(), BenchError> {
        let Some(client) = self.scene.bed.client() else { return Ok(()) };
        let guests = if self.scene.twin.is_some() { &ADDRESSES[..] } else { &ADDRESSES[..1] };
        for guest in guests {
            self.echoes.push(client.echo(*guest, CONNECTIONS)?);
        }
        record.unmigrated = self.scene.unmigrated(UNMIGRATED)?;
        if let Some(beats) = record.unmigrated {
            narrator.step(&format!(
                "the client has {CONNECTIONS} TCP connections to each guest; 1,000 heartbeats per second to {NAME}, not \
                 moved: longest gap {}, {} of {} lost",
                ms(beats.longest_gap_ms),
                count(beats.lost),
                count(beats.sent)
            ));
        }
        Ok(())
    }

    fn by_vmirror(&self, round: u32, narrator: &mut Narrator) -> Result<Sample, BenchError> {
        let Scene { bed, run, .. } = &self.scene;
        let [from, to] = scene::hosts(bed, round);
        narrator.step(&format!("{NAME}: {} to {} by vmirror", from.name(), to.name()));
        let order = mirrored::Order { options: &[], disk: None, patience: PATIENCE };
        let migrate = || mirrored::migrate(from, to, &order, run, |phase| narrator.word(phase.name()));
        let (sample, heartbeats) = with_heartbeats(bed.client(), ADDRESSES[0], run, migrate)?;
        let sample = Sample { heartbeats, ..sample };
        narrator.result(&match &sample.report {
            Some(report) => format!("{}; {}", present::in_words(&sample), verified(report)),
            None => present::in_words(&sample),
        });
        Ok(sample)
    }

    fn by_qemu(&mut self, method: Method, narrator: &mut Narrator) -> Result<Sample, BenchError> {
        let Scene { bed, run, twin, .. } = &mut self.scene;
        let twin = twin.as_mut().ok_or_else(|| BenchError::baseline("none", "the twin is gone"))?;
        let [from, to] = [twin.host(), 1 - twin.host()].map(|host| &bed.hosts()[host]);
        narrator.step(&format!("{TWIN}: {} to {} by {}", from.name(), to.name(), method.name()));
        let setting = Setting { method, tls: false, hold: Duration::ZERO };
        let migrate = || twin.migrate(bed.hosts(), setting, PATIENCE);
        let (moved, heartbeats) = with_heartbeats(bed.client(), ADDRESSES[1], run, migrate)?;
        let sample = moved.result.map_err(|miss| BenchError::baseline(method.name(), miss.to_string()))?;
        let sample = Sample { heartbeats, ..sample };
        narrator.result(&present::in_words(&sample));
        Ok(sample)
    }

    /// What had to hold.
    fn check(mut self, rounds: u32, narrator: &mut Narrator, record: &mut Record) -> Result<(), BenchError> {
        check_reports(record);
        if record.network {
            check_heard(record);
        }
        let now = self.scene.console.status();
        let passes = now.as_ref().map_or(0, |status| status.passes);
        narrator.step(&format!("{NAME} checks all its pages from inside once more"));
        // Two ends of passes from now on: the pass between them saw every page after the last migration.
        let status = self.scene.run.wait("the guest to check itself", CHECKED, || {
            Ok(self.scene.console.status().filter(|status| status.passes >= passes + 2))
        })?;
        check_guest(record, &self.scene.console, &status);
        for (echo, name) in self.echoes.drain(..).zip([NAME, TWIN]) {
            let report = echo.stop();
            // The twin's connections are QEMU's affair: told, not held against this run.
            if name == NAME {
                check_echo(record, &report);
            }
        }
        if rounds.is_multiple_of(2) {
            let settled = self.scene.bed.b().settle(&self.empty, RELEASE)?;
            let found = settled.as_ref().err().map_or_else(
                || "no process, file, tap, socket or memory of the guest is left there".to_owned(),
                ToString::to_string,
            );
            record.check("host-b holds what it held before", settled.is_ok(), found);
        }
        narrator.step("done; everything is taken down");
        Ok(())
    }
}

fn address(host: &Host) -> String {
    format!("{} ({})", host.name(), host.listen())
}

fn verified(report: &Report) -> String {
    let found = &report.verification;
    match &report.error {
        Some(failure) => format!("it did not complete: {}", failure.finding.message),
        None if mirrored::is_proved(report) => {
            format!("gate and proof match, {} pages proved", count(found.proof_pages))
        }
        None => format!(
            "gate {:?}, proof {:?}, {} pages differ",
            found.gate,
            found.proof,
            count(found.mismatches)
        ),
    }
}

fn check_reports(record: &mut Record) {
    let reports: Vec<&Report> = record.reports().collect();
    let failed: Vec<String> = reports
        .iter()
        .filter(|report| !mirrored::is_proved(report))
        .map(|report| format!("{} to {}: {}", report.source, report.destination, verified(report)))
        .collect();
    let held = failed.is_empty() && !reports.is_empty();
    let found = if held {
        let pages: u64 = reports.iter().map(|report| report.verification.proof_pages).sum();
        let repaired: u64 = reports.iter().map(|report| report.verification.repaired_pages).sum();
        format!("{} of {0}; {} pages proved equal, {} repaired", reports.len(), count(pages), count(repaired))
    } else {
        failed.join("; ")
    };
    record.check("every migration completed, its gate and its proof match", held, found);
}

fn check_heard(record: &mut Record) {
    let silent =
        record.by(Method::Vmirror).filter(|sample| sample.heartbeats.is_none_or(|beats| !beats.heard_again));
    let silent = silent.count();
    let found = if silent == 0 { "each time".to_owned() } else { format!("not after {silent} of them") };
    record.check("the client heard the guest again after every migration", silent == 0, found);
}

fn check_guest(record: &mut Record, console: &Console, status: &Status) {
    let text = console.text();
    let first = text.lines().find_map(Status::from_serial_line);
    let same = first.is_some_and(|first| first.boot_id == status.boot_id);
    record.check(
        "the guest's own check of its pages is clean",
        status.faults() == 0 && status.pages > 0,
        format!(
            "{} pages ({}), {} checks; torn {}, stale {}, lost {}",
            count(status.pages),
            bytes(status.pages * 4096),
            count(status.checked),
            status.torn,
            status.stale,
            status.lost
        ),
    );
    let found = format!("up for {}", ms(status.uptime_ms as f64));
    record.check("the guest never rebooted", same, found);
}

fn check_echo(record: &mut Record, echo: &EchoReport) {
    let held = echo.broken.is_empty() && echo.mismatches == 0 && echo.bytes > 0;
    let found = if echo.broken.is_empty() {
        format!(
            "{} there and back, {} changed blocks, longest wait {}",
            bytes(echo.bytes),
            echo.mismatches,
            ms(echo.longest_stall.as_secs_f64() * 1e3)
        )
    } else {
        echo.broken.join("; ")
    };
    record.check(format!("the client's {} TCP connections survived", echo.connections), held, found);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_turn_in_every_round_and_goes_first_as_often_as_others() {
        let first: Vec<Method> = (0..3).map(|round| turns(round, false)[0]).collect();
        assert_eq!(first, Method::DEMO);
        for round in 0..6 {
            assert!(Method::DEMO.iter().all(|method| turns(round, false).contains(method)));
        }
        assert_eq!(turns(5, true), [Method::Vmirror]);
    }

    #[test]
    fn a_run_without_a_proved_migration_has_not_succeeded() {
        let mut record = Record::default();
        assert!(!record.succeeded());
        check_reports(&mut record);
        assert!(!record.succeeded());
        let mut record = crate::fixtures::run();
        check_reports(&mut record);
        assert!(record.succeeded(), "{:?}", record.checks);
        let mut spoiled = crate::fixtures::run();
        for report in spoiled.samples.iter_mut().filter_map(|sample| sample.report.as_mut()) {
            report.verification.mismatches = 1;
        }
        check_reports(&mut spoiled);
        assert!(!spoiled.succeeded());
    }

    #[test]
    fn a_broken_or_silent_connection_fails_the_run() {
        for echo in [
            EchoReport { broken: vec!["connection 1: reset".into()], bytes: 1, ..EchoReport::default() },
            EchoReport { mismatches: 1, bytes: 1, ..EchoReport::default() },
            EchoReport::default(),
        ] {
            let mut record = Record::default();
            check_echo(&mut record, &echo);
            assert!(!record.succeeded(), "{echo:?}");
        }
    }
}
