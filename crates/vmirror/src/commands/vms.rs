//! `vmirror run`, `adopt`, `list`, `show`, `stop`, `release`, `resolve`.

use std::path::Path;

use agent::api::types::{
    AdoptRequest, Decision, Doubt, ReleaseReply, ReleaseRequest, ResolveRequest, RunRequest, StopRequest,
    VmView,
};
use migration::{Origin, VmName};
use serde::Serialize;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::format::{bytes, rate};
use crate::live;
use crate::output::Output;
use crate::table::Table;

/// Something done that has no document of its own.
#[derive(Debug, Serialize)]
struct Done<'a> {
    vm: &'a str,
    done: &'static str,
}

pub(super) async fn run(
    client: &Client,
    name: VmName,
    argv: Vec<String>,
    stale_disks: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    // The agent has another working directory; relative paths are the user's.
    let directory = std::env::current_dir().map_err(|error| {
        Failure::refused("path", format!("the working directory: {error}"), "change to one that exists")
    })?;
    let vm: VmView = client.post("/v1/vms", &RunRequest { name, argv, directory, stale_disks }).await?;
    output.done(&vm, |vm| format!("{} is {}{}", vm.name, vm.state.name(), process(vm)));
    Ok(Exit::Done)
}

pub(super) async fn adopt(
    client: &Client,
    name: &VmName,
    qmp: &Path,
    output: &Output,
) -> Result<Exit, Failure> {
    // The agent has another working directory.
    let qmp = std::path::absolute(qmp).map_err(|error| {
        Failure::refused("path", format!("--qmp {}: {error}", qmp.display()), "give a path")
    })?;
    let vm: VmView = client.post(&format!("/v1/vms/{name}/adopt"), &AdoptRequest { qmp }).await?;
    output.done(&vm, |vm| format!("{} is taken in, {}{}", vm.name, vm.state.name(), process(vm)));
    Ok(Exit::Done)
}

fn process(vm: &VmView) -> String {
    vm.pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

pub(super) async fn list(client: &Client, output: &Output) -> Result<Exit, Failure> {
    let vms: Vec<VmView> = client.get("/v1/vms").await?;
    output.result(&vms, |vms| table(vms));
    Ok(Exit::Done)
}

fn table(vms: &[VmView]) -> String {
    if vms.is_empty() {
        return "no VMs here; start one with `vmirror run NAME -- qemu-system-x86_64 …`".to_owned();
    }
    let mut table = Table::new(&["NAME", "STATE", "MEMORY", "PID", "CAME BY", "MIGRATION"], &[2, 3]);
    for vm in vms {
        table.row([
            vm.name.clone(),
            vm.state.name().to_owned(),
            bytes(vm.memory),
            vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            if vm.forward.is_some() { "-" } else { origin(vm.origin) }.to_owned(),
            movement(vm),
        ]);
    }
    table.render()
}

fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::Run => "run",
        Origin::Adopted => "adopted",
        Origin::Arrived => "arrived",
    }
}

/// Where it is on its way to.
fn movement(vm: &VmView) -> String {
    if let Some(progress) = &vm.session {
        format!("{} → {}", live::stage(progress), progress.destination)
    } else if let Some(forward) = &vm.forward {
        format!("forwarded → {} ({})", forward.to, forward.address)
    } else {
        match &vm.doubt {
            Some(Doubt::HandedOver { to, address, .. }) => format!("handed over → {to} ({address})"),
            Some(Doubt::Received { from, .. }) => format!("waits for word from {from}"),
            None => match &vm.network_of {
                Some(host) => format!("in the network of {host}"),
                None => "-".to_owned(),
            },
        }
    }
}

pub(super) async fn show(client: &Client, name: &VmName, output: &Output) -> Result<Exit, Failure> {
    let vm: VmView = client.get(&format!("/v1/vms/{name}")).await?;
    output.result(&vm, describe);
    Ok(Exit::Done)
}

fn describe(vm: &VmView) -> String {
    let state = match &vm.qemu_status {
        Some(status) if status != vm.state.name() => format!("{} (QEMU says {status})", vm.state.name()),
        _ => vm.state.name().to_owned(),
    };
    let mut facts = vec![
        ("name", vm.name.clone()),
        ("state", state),
        ("memory", bytes(vm.memory)),
        ("process", vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
    ];
    if vm.forward.is_none() {
        facts.push(("came by", origin(vm.origin).to_owned()));
        facts.push(("generation", vm.generation.to_string()));
        facts.push(("qmp socket", vm.qmp_socket.display().to_string()));
    }
    facts.extend(vm.files.iter().map(|file| ("made here", file.display().to_string())));
    facts.extend(vm.taps.iter().map(|tap| ("made here", format!("tap {tap}"))));
    if let Some(host) = &vm.network_of {
        facts.push(("network", format!("that of {host}, through a tunnel, until `vmirror release`")));
    }
    if vm.session.is_some() || vm.doubt.is_some() || vm.forward.is_some() {
        facts.push(("migration", movement(vm)));
    }
    if let Some(progress) = &vm.session {
        facts.push(("lag", bytes(progress.remaining_bytes)));
        facts.push(("dirty rate", rate(progress.dirty_rate)));
    }
    if !vm.argv.is_empty() {
        facts.push(("command", vm.argv.join(" ")));
    }
    facts.iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect()
}

pub(super) async fn stop(
    client: &Client,
    name: &VmName,
    force: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    client.tell(&format!("/v1/vms/{name}/stop"), &StopRequest { force }).await?;
    let done = Done { vm: name.as_ref(), done: "stopped" };
    output.done(&done, |done| format!("{} is off", done.vm));
    Ok(Exit::Done)
}

pub(super) async fn release(
    client: &Client,
    name: &VmName,
    force: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let reply: ReleaseReply =
        client.post(&format!("/v1/vms/{name}/release"), &ReleaseRequest { force }).await?;
    output.done(&reply, |reply| match &reply.untold {
        None => format!("nothing that comes for {} here is forwarded any more", reply.vm),
        Some(other) => format!(
            "{} is released on this host; {other} has not been told: give `vmirror release {}` there too",
            reply.vm, reply.vm
        ),
    });
    Ok(Exit::Done)
}

pub(super) async fn resolve(
    client: &Client,
    name: &VmName,
    here: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let decision = if here { Decision::RunHere } else { Decision::GiveUp };
    client.tell(&format!("/v1/vms/{name}/resolve"), &ResolveRequest { decision }).await?;
    let done = Done { vm: name.as_ref(), done: if here { "run-here" } else { "given-up" } };
    output.done(&done, |done| {
        if here {
            format!("{} runs here", done.vm)
        } else {
            format!("what was left of {} here is removed", done.vm)
        }
    });
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::api::types::VmState;

    fn vm(name: &str) -> VmView {
        VmView {
            name: name.to_owned(),
            state: VmState::Running,
            qemu_status: Some("running".to_owned()),
            origin: Origin::Run,
            generation: 3,
            pid: Some(4711),
            memory: 512 << 20,
            qmp_socket: "/run/vmirror/web1.qmp".into(),
            argv: vec!["qemu-system-x86_64".to_owned(), "-m".to_owned(), "512".to_owned()],
            files: vec!["/dev/shm/vmirror-web1".into()],
            taps: vec!["tap0".to_owned()],
            session: None,
            doubt: None,
            forward: None,
            network_of: None,
        }
    }

    #[test]
    fn a_list_lines_up_and_says_where_each_is_going() {
        let uncertain = VmView {
            state: VmState::Uncertain,
            pid: None,
            doubt: Some(Doubt::HandedOver {
                session: uuid::Uuid::nil(),
                to: "host-b".to_owned(),
                address: "10.9.0.3:7600".to_owned(),
            }),
            ..vm("db")
        };
        insta::assert_snapshot!(table(&[vm("web1"), uncertain]), @r"
        NAME  STATE         MEMORY   PID  CAME BY  MIGRATION
        web1  running    512.0 MiB  4711  run      -
        db    uncertain  512.0 MiB     -  run      handed over → host-b (10.9.0.3:7600)
        ");
        assert!(table(&[]).contains("vmirror run"));
    }

    #[test]
    fn a_description_has_everything_that_was_made_here() {
        insta::assert_snapshot!(describe(&vm("web1")), @r"
        name        web1
        state       running
        memory      512.0 MiB
        process     4711
        came by     run
        generation  3
        qmp socket  /run/vmirror/web1.qmp
        made here   /dev/shm/vmirror-web1
        made here   tap tap0
        command     qemu-system-x86_64 -m 512
        ");
    }
}
