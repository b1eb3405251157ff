//! `vmirror status` and `events`: what goes on.

use std::io::IsTerminal as _;
use std::time::Duration;

use agent::api::types::{Event, EventKind, HistoryEntry, Place, ReleaseReason, RemovalReason, VmView};
use futures::StreamExt as _;
use ownership::VmName;
use readable::{bytes, moment, ms, rate};
use session::{Goal, Outcome, Progress};

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::live;
use crate::output::{Output, print};
use crate::summary::short;
use crate::table::Table;

/// How often `--watch` looks again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Clears a terminal and goes to its first line (ECMA-48).
const CLEAR: &str = "\x1b[H\x1b[2J";

pub(super) async fn status(client: &Client, name: Option<&VmName>, output: &Output) -> Result<Exit, Failure> {
    let sessions = sessions(client, name).await?;
    let last = match name.filter(|_| sessions.is_empty()) {
        Some(name) => client.get(&format!("/v1/history?limit=1&vm={name}")).await?,
        None => Vec::<HistoryEntry>::new(),
    };
    let last = last.first().map(HistoryEntry::how_it_ended).unwrap_or_default();
    output.result(&sessions, |sessions| table(sessions, name, &last));
    Ok(Exit::Done)
}

pub(super) async fn status_for_ever(
    client: &Client,
    name: Option<&VmName>,
    output: &Output,
) -> Result<Exit, Failure> {
    let clears = !output.is_json() && std::io::stdout().is_terminal();
    loop {
        let sessions = sessions(client, name).await?;
        output.item(&sessions, |sessions| {
            let clear = if clears { CLEAR } else { "" };
            format!("{clear}{}", table(sessions, name, ""))
        });
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn sessions(client: &Client, name: Option<&VmName>) -> Result<Vec<Progress>, Failure> {
    match name {
        None => client.get("/v1/sessions").await,
        // By way of the machine, so that one that is not there is told apart from one that stays.
        Some(name) => {
            let vm: VmView = client.get(&format!("/v1/vms/{name}")).await?;
            Ok(vm.session.into_iter().collect())
        }
    }
}

fn table(sessions: &[Progress], name: Option<&VmName>, last: &str) -> String {
    if sessions.is_empty() {
        return match name {
            Some(name) => format!("{name} has no mirror and is not being migrated{last}"),
            None => "nothing is being migrated or mirrored".to_owned(),
        };
    }
    let headings = [
        "VM", "TO", "GOAL", "PHASE", "FOR", "LAG", "SENT", "RATE", "DIRTY", "PAUSE", "LEFT", "AUDITED",
        "REPAIRED",
    ];
    let mut table = Table::new(&headings, &[4, 5, 6, 7, 8, 9, 10, 11, 12]);
    for progress in sessions {
        let optional = |time: Option<f64>| time.map_or_else(|| "-".to_owned(), ms);
        table.row([
            progress.vm.clone(),
            progress.destination.clone(),
            goal(progress.goal).to_owned(),
            live::stage(progress).to_owned(),
            ms(progress.elapsed_ms),
            bytes(progress.remaining_bytes),
            bytes(progress.wire_bytes),
            rate(progress.throughput),
            rate(progress.dirty_rate),
            optional(progress.predicted_downtime_ms),
            optional(progress.time_left_ms),
            (progress.verification.audited_pages + progress.verification.audited_blocks).to_string(),
            (progress.verification.repaired_pages + progress.verification.repaired_blocks).to_string(),
        ]);
    }
    let mut text = table.render();
    let mut disks = Table::new(&["VM", "DISK", "SIZE", "LEFT", "READ", "SENT"], &[2, 3, 4, 5]);
    for progress in sessions {
        for disk in &progress.disks {
            disks.row([
                progress.vm.clone(),
                disk.name.clone(),
                bytes(disk.size),
                bytes(disk.remaining_bytes),
                bytes(disk.raw_bytes),
                bytes(disk.wire_bytes),
            ]);
        }
    }
    if sessions.iter().any(|progress| !progress.disks.is_empty()) {
        text.push_str(&format!("\n{}", disks.render()));
    }
    for progress in sessions {
        if progress.throttle > 0.0 {
            text.push_str(&format!(
                "{}: its CPUs are stopped for {:.0} % of the time, as it outran the mirror\n",
                progress.vm,
                progress.throttle * 100.0
            ));
        }
        if let Some(warning) = &progress.warning {
            text.push_str(&format!("{}: {warning}\n", progress.vm));
        }
    }
    text
}

fn goal(goal: Goal) -> &'static str {
    match goal {
        Goal::Migrate => "migrate",
        Goal::Mirror => "mirror",
    }
}

pub(super) async fn events(client: &Client, follow: bool, output: &Output) -> Result<Exit, Failure> {
    let mut events = client.events(follow).await?;
    let mut last = None;
    while let Some(event) = events.next().await {
        let event = event?;
        if !output.is_json() && last.is_some_and(|last| event.seq > last + 1) {
            print(&format!("… {} events were missed", event.seq - last.unwrap_or(0) - 1));
        }
        last = Some(event.seq);
        output.item(&event, line);
    }
    Ok(Exit::Done)
}

fn line(event: &Event) -> String {
    let vm = event.vm.as_deref().unwrap_or("-");
    format!("{}  {vm}  {}", moment(event.at_unix_ms), words(&event.kind))
}

fn words(kind: &EventKind) -> String {
    match kind {
        EventKind::VmAdded { origin: host::Origin::Run } => "started".to_owned(),
        EventKind::VmAdded { origin: host::Origin::Adopted } => "taken in".to_owned(),
        EventKind::VmAdded { origin: host::Origin::Arrived } => "arrived, and runs here".to_owned(),
        EventKind::VmRemoved { reason } => match reason {
            RemovalReason::Migrated => "runs elsewhere now".to_owned(),
            RemovalReason::Stopped => "stopped".to_owned(),
            RemovalReason::Ended => "ended by itself".to_owned(),
            RemovalReason::Forgotten => "let go of; it runs on".to_owned(),
            RemovalReason::GivenUp => "given up here".to_owned(),
            RemovalReason::Withdrawn => "the copy here was taken back".to_owned(),
        },
        EventKind::VmPaused => "paused".to_owned(),
        EventKind::VmResumed => "resumed".to_owned(),
        EventKind::VmPanicked => "the guest panicked".to_owned(),
        EventKind::SessionStarted { session, goal: what, to } => {
            format!("{} to {to} begun ({})", goal(*what), short(&session.to_string()))
        }
        EventKind::PhaseEntered { phase, .. } => phase.name().to_owned(),
        EventKind::Progress { progress } => live::line(progress),
        EventKind::SessionFinished { outcome, downtime_ms, error, session } => {
            let id = session.to_string();
            match (outcome, error) {
                (Outcome::Completed, _) => {
                    format!("migrated, downtime {} ({})", ms(*downtime_ms), short(&id))
                }
                (_, Some(failure)) => {
                    format!("migration ended: {} ({})", failure.finding.message, short(&id))
                }
                (_, None) => format!("migration ended ({})", short(&id)),
            }
        }
        EventKind::StartedAgain { pid, has } => {
            format!("has left, and process {pid} here has its {}: two copies may run", has.join(", "))
        }
        EventKind::ImageNotKept { image, problem } => format!("{} {problem}", image.display()),
        EventKind::ImageReleased { image, reason: ReleaseReason::Forgotten } => {
            format!("{} is not kept locked any more, as somebody said", image.display())
        }
        EventKind::ImageReleased { image, reason: ReleaseReason::Removed } => {
            format!("{} was removed, and is not kept any more", image.display())
        }
        EventKind::Settled { runs: Place::Here } => "settled: runs here".to_owned(),
        EventKind::Settled { runs: Place::There } => "settled: runs at the destination".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::progress;

    #[test]
    fn status_shows_what_an_operator_steers_by() {
        let mirror = Progress {
            vm: "database".to_owned(),
            goal: Goal::Mirror,
            in_sync: true,
            remaining_bytes: 0,
            warning: Some("dirtying outruns the link".to_owned()),
            time_left_ms: None,
            ..progress()
        };
        insta::assert_snapshot!(table(&[progress(), mirror], None, ""), @r"
        VM        TO      GOAL     PHASE           FOR       LAG       SENT       RATE       DIRTY    PAUSE    LEFT  AUDITED  REPAIRED
        web1      host-b  migrate  synchronize  1.50 s  20.0 MiB  150.0 MiB  1.1 GiB/s  19.1 MiB/s  12.5 ms  800 ms        0         0
        database  host-b  mirror   in sync      1.50 s       0 B  150.0 MiB  1.1 GiB/s  19.1 MiB/s  12.5 ms       -        0         0
        database: dirtying outruns the link
        ");
        assert_eq!(table(&[], None, ""), "nothing is being migrated or mirrored");
    }
}
