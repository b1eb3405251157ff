//! `vmirror run`, `adopt`, `list`, `show`, `stop`, `release`, `forget`, `forget-images`, `resolve`.

use std::path::{Path, PathBuf};

use agent::api::types::{
    AdoptRequest, AgentInfo, Decision, Doubt, ForgetImagesReply, ForgetImagesRequest, KeptView, ReleaseReply,
    ReleaseRequest, ResolveReply, ResolveRequest, RunRequest, StopRequest, VmState, VmView,
};
use host::Origin;
use ownership::VmName;
use readable::{bytes, rate};
use serde::Serialize;

use crate::client::Client;
use crate::failure::{Exit, Failure};
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
    output.warn(&vm.warnings);
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
    output.warn(&vm.warnings);
    Ok(Exit::Done)
}

fn process(vm: &VmView) -> String {
    vm.pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

pub(super) async fn list(client: &Client, output: &Output) -> Result<Exit, Failure> {
    let vms: Vec<VmView> = client.get("/v1/vms").await?;
    output.result(&vms, |vms| table(vms));
    let who: AgentInfo = client.get("/v1/agent").await?;
    output.warn(&who.problems);
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
            if vm.state == VmState::Left { "-".to_owned() } else { bytes(vm.memory) },
            vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            if has_left(vm) { "-" } else { origin(vm.origin) }.to_owned(),
            movement(vm),
        ]);
    }
    let mut text = table.render();
    for (vm, problem) in vms.iter().filter_map(|vm| Some((vm, vm.problem.as_ref()?))) {
        text.push_str(&format!("{}: {}; {}\n", vm.name, problem.message, problem.hint));
    }
    for (vm, kept) in vms.iter().filter_map(|vm| Some((vm, vm.kept.as_ref()?))) {
        for (image, problem) in kept.images.iter().filter_map(|image| Some((image, image.problem.as_ref()?)))
        {
            text.push_str(&format!("{}: {} {problem}; {NOT_KEPT}\n", vm.name, image.path.display()));
        }
    }
    text
}

/// What is to be done about an image that is not kept from others as it should be.
const NOT_KEPT: &str = "see that no QEMU here uses it, and that the VM runs only where it went";

fn has_left(vm: &VmView) -> bool {
    vm.forward.is_some() || vm.state == VmState::Left
}

/// What is kept here of one that has left.
fn locked(kept: &KeptView) -> String {
    match kept.images.len() {
        1 => "1 image kept locked".to_owned(),
        more => format!("{more} images kept locked"),
    }
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
    } else if let (VmState::Left, Some(kept)) = (vm.state, &vm.kept) {
        let to = kept.to.as_deref().unwrap_or("an unknown place");
        format!("left → {to}; {}", locked(kept))
    } else if vm.state == VmState::Left {
        "left".to_owned()
    } else {
        match &vm.doubt {
            Some(Doubt::HandedOver { to, address, .. }) => format!("handed over → {to} ({address})"),
            Some(Doubt::Received { from, .. }) => format!("waits for word from {from}"),
            Some(Doubt::Journal) => "paused: the journal cannot be written".to_owned(),
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
    let mut facts = vec![("name", vm.name.clone()), ("state", state)];
    if vm.state != VmState::Left {
        facts.push(("memory", bytes(vm.memory)));
        facts.push(("process", vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())));
    }
    if !has_left(vm) {
        facts.push(("came by", origin(vm.origin).to_owned()));
        facts.push(("generation", vm.generation.to_string()));
        facts.push(("qmp socket", vm.qmp_socket.display().to_string()));
    }
    facts.extend(vm.log.iter().map(|log| ("output", log.display().to_string())));
    facts.extend(vm.files.iter().map(|file| ("made here", file.display().to_string())));
    facts.extend(vm.taps.iter().map(|tap| ("made here", format!("tap {tap}"))));
    if let Some(host) = &vm.network_of {
        facts.push(("network", format!("that of {host}, through a tunnel, until `vmirror release`")));
    }
    if vm.session.is_some() || vm.doubt.is_some() || has_left(vm) {
        facts.push(("migration", movement(vm)));
    }
    if let Some(progress) = &vm.session {
        facts.push(("lag", bytes(progress.remaining_bytes)));
        facts.push(("dirty rate", rate(progress.dirty_rate)));
    }
    for image in vm.kept.iter().flat_map(|kept| &kept.images) {
        facts.push(("kept locked", image.path.display().to_string()));
        if let Some(problem) = &image.problem {
            facts.push(("problem", format!("{problem}; {NOT_KEPT}")));
        }
    }
    if let Some(problem) = &vm.problem {
        facts.push(("problem", problem.message.clone()));
        facts.push(("", problem.hint.clone()));
    }
    for warning in &vm.warnings {
        facts.push(("warning", warning.message.clone()));
        facts.push(("", warning.hint.clone()));
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

pub(super) async fn forget(client: &Client, name: &VmName, output: &Output) -> Result<Exit, Failure> {
    client.tell(&format!("/v1/vms/{name}/forget"), &()).await?;
    let done = Done { vm: name.as_ref(), done: "forgotten" };
    output.done(&done, |done| format!("{} is let go of, and runs on", done.vm));
    Ok(Exit::Done)
}

pub(super) async fn forget_images(
    client: &Client,
    name: &VmName,
    force: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let request = ForgetImagesRequest { force };
    let reply: ForgetImagesReply = client.post(&format!("/v1/vms/{name}/forget-images"), &request).await?;
    output.done(&reply, |reply| {
        let images: Vec<String> = reply.images.iter().map(|image| image.display().to_string()).collect();
        format!("not kept locked any more: {}", images.join(", "))
    });
    Ok(Exit::Done)
}

/// What came of a person's decision.
#[derive(Serialize)]
struct Resolved<'a> {
    vm: &'a str,
    done: &'a str,
    images: Vec<PathBuf>,
}

impl Resolved<'_> {
    fn words(&self) -> String {
        if self.done == "run-here" {
            return format!("{} runs here", self.vm);
        }
        let removed = format!("what was left of {} here is removed", self.vm);
        if self.images.is_empty() {
            return removed;
        }
        let images: Vec<String> = self.images.iter().map(|image| image.display().to_string()).collect();
        format!(
            "{removed}, but for its disks, which were complete: {}. If its source is lost they are all that there is of them. Remove them \
             yourself once it runs elsewhere",
            images.join(", ")
        )
    }
}

pub(super) async fn resolve(
    client: &Client,
    name: &VmName,
    here: bool,
    force: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let decision = if here { Decision::RunHere } else { Decision::GiveUp };
    let request = ResolveRequest { decision, force };
    let ResolveReply { images, .. } = client.post(&format!("/v1/vms/{name}/resolve"), &request).await?;
    let done = Resolved { vm: name.as_ref(), done: if here { "run-here" } else { "given-up" }, images };
    output.done(&done, Resolved::words);
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::api::types::VmState;

    #[test]
    fn who_gives_a_complete_copy_up_is_told_of_its_disks() {
        let words = |done, images: &[&str]| {
            Resolved { vm: "web1", done, images: images.iter().map(PathBuf::from).collect() }.words()
        };
        assert_eq!(words("run-here", &[]), "web1 runs here");
        assert_eq!(words("given-up", &[]), "what was left of web1 here is removed");
        let told = words("given-up", &["/srv/web1.raw"]);
        assert!(told.contains("/srv/web1.raw") && told.contains("Remove them yourself"), "{told}");
    }

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
            log: Some("/var/lib/vmirror/logs/web1.log".into()),
            taps: vec!["tap0".to_owned()],
            session: None,
            doubt: None,
            problem: None,
            warnings: Vec::new(),
            forward: None,
            network_of: None,
            kept: None,
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
        let image = |path: &str, problem: Option<&str>| agent::api::types::KeptImageView {
            path: path.into(),
            problem: problem.map(str::to_owned),
        };
        let images = vec![image("/srv/a.img", None), image("/srv/b.img", Some("is open"))];
        let kept = Some(KeptView { to: Some("host-b".to_owned()), since_unix_ms: 0, images });
        let left = VmView { state: VmState::Left, pid: None, kept, ..vm("mail") };
        let text = table(std::slice::from_ref(&left));
        assert!(text.contains("  left → host-b; 2 images kept locked\n"), "{text}");
        assert!(text.ends_with(&format!("\nmail: /srv/b.img is open; {NOT_KEPT}\n")), "{text}");
        assert!(describe(&left).contains("kept locked /srv/a.img\n"));
        let problem = finding::Finding::new("qemu-silent", "the QEMU of db does not answer: why", "do this");
        let silent = VmView { state: VmState::Unreachable, problem: Some(problem), ..vm("db") };
        assert!(
            table(&[vm("web1"), silent]).ends_with("\ndb: the QEMU of db does not answer: why; do this\n")
        );
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
        output      /var/lib/vmirror/logs/web1.log
        made here   /dev/shm/vmirror-web1
        made here   tap tap0
        command     qemu-system-x86_64 -m 512
        ");
        let warnings = vec![finding::Finding::new("ram-exposed", "every user can read it", "chmod 600 it")];
        let exposed = describe(&VmView { warnings, ..vm("web1") });
        assert!(
            exposed.contains("warning     every user can read it\n            chmod 600 it\n"),
            "{exposed}"
        );
    }
}
