//! `vmirror check`, `migrate`, `mirror`, `switch`, `cancel`, `verify`.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use agent::api::types::{BandwidthRequest, CheckReply, MigrateRequest, SessionRef, VmView};
use finding::Finding;
use ownership::VmName;
use serde::Serialize;
use session::PlannedDisk;
use session::report::DiskMode;
use session::report::Verification;
use session::{Goal, Options, Outcome};
use uuid::Uuid;

use super::follow::{Followed, Manner, conclude, follow};
use readable::{bytes, count};

use crate::cli::{Limit, Migrate};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::summary;

/// The request, once the options are known to make sense together: what is wrong with them the agent would say
/// too, but only if one runs.
fn request(asked: Migrate) -> Result<(VmName, MigrateRequest), Failure> {
    let options = Options::from(asked.options);
    options
        .validate()
        .map_err(|error| Failure::refused("bad-option", error.to_string(), "see `vmirror migrate --help`"))?;
    Ok((asked.name, MigrateRequest { to: asked.to, options }))
}

pub(super) async fn check(client: &Client, asked: Migrate, output: &Output) -> Result<Exit, Failure> {
    let (name, request) = request(asked)?;
    let reply: CheckReply = client.post(&format!("/v1/vms/{name}/check"), &request).await?;
    output.result(&reply, findings);
    output.warn(&reply.warnings);
    Ok(if reply.findings.is_empty() { Exit::Done } else { Exit::Refused })
}

fn findings(reply: &CheckReply) -> String {
    if reply.findings.is_empty() {
        let disks = reply.disks.iter().map(|disk| format!("\n  {}", told(disk)));
        return format!("{} can move to {}{}", reply.vm, reply.destination, disks.collect::<String>());
    }
    let mut text = match reply.findings.len() {
        1 => format!("{} cannot move to {}:\n", reply.vm, reply.destination),
        n => format!("{} cannot move to {}, for {n} reasons:\n", reply.vm, reply.destination),
    };
    for finding in &reply.findings {
        text.push_str(&format!("\n  {}  [{}]\n    → {}\n", finding.message, finding.kind, finding.hint));
    }
    text
}

/// What would become of a disk.
fn told(disk: &PlannedDisk) -> String {
    let what = match (disk.mode, disk.exists) {
        (DiskMode::Shared, _) => "is shared",
        (DiskMode::Mirrored, false) => "is copied",
        (DiskMode::Mirrored, true) => "is copied over what is there, as far as that differs",
    };
    format!("{}  {}, {what}", disk.name, bytes(disk.size))
}

pub(super) async fn begin(
    client: &Client,
    goal: Goal,
    asked: Migrate,
    detach: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let limit = asked.options.bandwidth();
    let (name, request) = request(asked)?;
    let verb = match goal {
        Goal::Migrate => "migrate",
        Goal::Mirror => "mirror",
    };
    let session: SessionRef = match client.post(&format!("/v1/vms/{name}/{verb}"), &request).await {
        // Asked for again with a limit, and with nothing that can only be asked for at the beginning.
        Err(failure) if failure.kind() == IN_MIGRATION && is_default_but_for_bandwidth(&request.options) => {
            let Some(Limit(bandwidth)) = limit else { return Err(failure) };
            let wanted = BandwidthRequest { bandwidth, to: Some(request.to), goal: Some(goal) };
            return change_bandwidth(client, &name, wanted, output).await;
        }
        begun => begun?,
    };
    let supervised = supervised(client, &name).await;
    let manner = Manner { cancels: Some(&name), until_in_sync: detach };
    let (followed, interrupted) = follow(client, session.id, manner, output).await?;
    // Of one that stays, what kept it here is said.
    if !matches!(&followed, Followed::Ended(report) if report.outcome != Outcome::Completed) {
        output.warn(&supervised);
    }
    let again = started_again(client, &name, &followed, &supervised).await;
    Ok(or_twice(conclude(followed, interrupted, Some(&request.to), output), again, output))
}

/// What has started a machine here, and may start it again.
async fn supervised(client: &Client, name: &VmName) -> Vec<Finding> {
    let vm: Option<VmView> = client.get(&format!("/v1/vms/{name}")).await.ok();
    vm.into_iter().flat_map(|vm| vm.warnings).filter(|found| found.kind == "supervised").collect()
}

/// A machine that has moved and was started here once more may run twice: a person must look, however well it has moved.
fn or_twice(exit: Exit, again: Option<Finding>, output: &Output) -> Exit {
    let Some(Finding { kind, message, hint }) = again else { return exit };
    output.complain(&Failure::new(Exit::Uncertain, &kind, message, hint));
    Exit::Uncertain
}

/// Whether what has started a machine starts it again at once, when it has moved: looked at for a moment, as the agent goes on looking.
async fn started_again(
    client: &Client,
    name: &VmName,
    followed: &Followed,
    supervised: &[Finding],
) -> Option<Finding> {
    let moved = matches!(followed, Followed::Ended(report) if report.outcome == Outcome::Completed);
    if !moved || supervised.is_empty() {
        return None;
    }
    let end = Instant::now() + AT_ONCE;
    while Instant::now() < end {
        tokio::time::sleep(LOOK_AGAIN).await;
        let left: Option<VmView> = client.get(&format!("/v1/vms/{name}")).await.ok();
        if let Some(why) = left.and_then(|vm| vm.problem).filter(|why| why.kind == "started-again") {
            return Some(why);
        }
    }
    None
}

/// How long that is, and between two looks.
const AT_ONCE: Duration = Duration::from_secs(6);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The kind of the agent's answer that a machine is under way already.
const IN_MIGRATION: &str = "in-migration";

fn is_default_but_for_bandwidth(options: &Options) -> bool {
    Options { bandwidth: None, ..options.clone() } == Options::default()
}

/// What became of a limit, for scripts.
#[derive(Debug, Serialize)]
struct Changed {
    id: Uuid,
    vm: VmName,
    /// In bytes per second; none is unlimited.
    bandwidth: Option<NonZeroU64>,
}

/// Changes the limit of a migration under way there, and does not wait for its end: somebody else does.
async fn change_bandwidth(
    client: &Client,
    name: &VmName,
    request: BandwidthRequest,
    output: &Output,
) -> Result<Exit, Failure> {
    let bandwidth = request.bandwidth;
    let what = if request.goal == Some(Goal::Mirror) { "mirror" } else { "migration" };
    let SessionRef { id } = client.post(&format!("/v1/vms/{name}/bandwidth"), &request).await?;
    output.done(&Changed { id, vm: name.clone(), bandwidth }, |changed| match changed.bandwidth {
        Some(limit) => {
            format!("the {what} of {name} that is under way now sends at most {}/s", bytes(limit.get()))
        }
        None => format!("the {what} of {name} that is under way now sends as much as the link takes"),
    });
    Ok(Exit::Done)
}

pub(super) async fn switch(client: &Client, name: &VmName, output: &Output) -> Result<Exit, Failure> {
    let supervised = supervised(client, name).await;
    let session: SessionRef = client.post(&format!("/v1/vms/{name}/switch"), &()).await?;
    let manner = Manner { cancels: Some(name), until_in_sync: false };
    let (followed, interrupted) = follow(client, session.id, manner, output).await?;
    let again = started_again(client, name, &followed, &supervised).await;
    Ok(or_twice(conclude(followed, interrupted, None, output), again, output))
}

pub(super) async fn cancel(client: &Client, name: &VmName, output: &Output) -> Result<Exit, Failure> {
    let session: SessionRef = client.post(&format!("/v1/vms/{name}/cancel"), &()).await?;
    let manner = Manner { cancels: None, until_in_sync: false };
    let (followed, _) = follow(client, session.id, manner, output).await?;
    let Followed::Ended(report) = followed else { return Ok(Exit::Interrupted) };
    output.done(&*report, |report| match report.outcome {
        Outcome::Completed => summary::of(report, None),
        _ => format!("the migration of {} to {} has ended", report.vm, report.destination),
    });
    match report.outcome {
        Outcome::Cancelled | Outcome::Failed => Ok(Exit::Done),
        Outcome::Completed => {
            let message = format!("it was too late to cancel: {name} runs on {}", report.destination);
            output.complain(&Failure::refused("too-late", message, "migrate it back from there"));
            Ok(Exit::Refused)
        }
        Outcome::Uncertain => {
            output.complain(&Failure::ended(&report));
            Ok(Exit::Uncertain)
        }
    }
}

pub(super) async fn verify(client: &Client, name: &VmName, output: &Output) -> Result<Exit, Failure> {
    let found: Verification = client.post(&format!("/v1/vms/{name}/verify"), &()).await?;
    output.done(&found, |found| {
        let mut said = format!(
            "{name} was compared with its copy on both hosts: {} pages looked at, {} repaired",
            count(found.audited_pages),
            count(found.repaired_pages)
        );
        if found.audited_blocks > 0 {
            let (looked_at, repaired) = (count(found.audited_blocks), count(found.repaired_blocks));
            said += &format!("; {looked_at} blocks of disks looked at, {repaired} repaired");
        }
        said
    });
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use finding::Finding;

    use super::*;

    #[test]
    fn a_check_shows_every_reason_with_what_to_do() {
        let finding = |kind: &str, message: &str, hint: &str| Finding::new(kind, message, hint);
        let reply = CheckReply {
            vm: "web1".to_owned(),
            destination: "host-b".to_owned(),
            findings: vec![
                finding("cpu-feature-missing", "host-b lacks avx512f", "start the VM with -cpu Haswell"),
                finding(
                    "no-room",
                    "ram_dir of host-b has 1.0 GiB free, 2.0 GiB are needed",
                    "make room there",
                ),
            ],
            disks: Vec::new(),
            warnings: Vec::new(),
        };
        insta::assert_snapshot!(findings(&reply), @r"
        web1 cannot move to host-b, for 2 reasons:

          host-b lacks avx512f  [cpu-feature-missing]
            → start the VM with -cpu Haswell

          ram_dir of host-b has 1.0 GiB free, 2.0 GiB are needed  [no-room]
            → make room there
        ");
        assert_eq!(
            findings(&CheckReply { findings: Vec::new(), ..reply.clone() }),
            "web1 can move to host-b"
        );
        let disk =
            |name: &str, mode, exists| PlannedDisk { name: name.to_owned(), size: 4 << 30, mode, exists };
        let disks = vec![
            disk("/vms/a.img", DiskMode::Mirrored, false),
            disk("/vms/b.img", DiskMode::Mirrored, true),
            disk("/nfs/c.img", DiskMode::Shared, true),
        ];
        insta::assert_snapshot!(findings(&CheckReply { findings: Vec::new(), disks, ..reply }), @r"
        web1 can move to host-b
          /vms/a.img  4.0 GiB, is copied
          /vms/b.img  4.0 GiB, is copied over what is there, as far as that differs
          /nfs/c.img  4.0 GiB, is shared
        ");
    }
}
