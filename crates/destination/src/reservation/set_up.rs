//! A machine's place: what it needs is made, its QEMU started, and what only QEMU can tell compared.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use mirror::device::destination::DeviceDestination;
use qemu::{Launch, LaunchError, Process, Qmp, RamAddresses, RamBlock, Spec, User};
use serde_json::Value;

use super::macvtaps::Descriptors;
use super::{Refusal, Request, Reservation, Started, limits};
use crate::images::{Images, Planned};
use crate::waiting;
use cgroup::{CgroupError, make};
use finding::{Finding, chain, kind};
use host::Host;
use host::Record;
use host::firewall;
use host::guest_ram;
use host::hooks::{self, Hook};
use host::paths::Paths;
use host::settings::Settings;
use movable::compatibility::{features_on, too_old};
use protocol::wire;

/// Capabilities of the QEMU that waits. Images are opened for good, and locked, only when the machine is resumed. Its stream carries no RAM;
/// but for the last of these, where RAM is to come by it.
const CAPABILITIES: [&str; 3] = ["events", "late-block-activate", "x-ignore-shared"];

impl Request {
    /// Makes what the machine needs, starts its QEMU, and compares what only QEMU can tell.
    pub(super) async fn set_up(
        &self,
        host: &Host,
        mut record: Record,
        Started { spec, launched }: Started,
        planned: Vec<Planned>,
        descriptors: Descriptors,
    ) -> Result<Reservation, Refusal> {
        let log = host.logs.of(&self.name);
        let Paths { own, device, .. } = Paths::of(host, &self.name);
        let user = host.allow.other_user();
        let place = Launch { directory: Some(&own), user };
        let failed =
            |kind: &str, e: &dyn std::error::Error, hint: &str| vec![Finding::new(kind, chain(e), hint)];
        self.make_taps(host, &mut record).await?;
        self.make_cgroups(host, &mut record).map_err(|finding| vec![finding])?;
        if !self.nft.is_empty() && !self.rehearsal {
            // On record first, so that it goes if the machine does not come.
            host.journal
                .amend(&mut record, |now| now.made.nft = true)
                .map_err(|e| failed("journal", &e, "see to the destination's state_dir"))?;
            firewall::make(host, &self.name, &self.nft).await.map_err(|finding| vec![finding])?;
        }
        hooks::run(host, Hook::Prepare, &record, self.rehearsal).await.map_err(|finding| vec![finding])?;
        // The name is ours now, so what is there under the names of its RAM files is a remnant.
        let made =
            guest_ram::make(host, &self.name, &spec, user).map_err(|e| vec![guest_ram::finding(host, &e)])?;
        // On record from here on, so that they go if the machine does not come.
        let mut by_qemu = launched.files_made();
        by_qemu.retain(|file| !file.starts_with(&own) && std::fs::symlink_metadata(file).is_err());
        let goes_with_it = |now: &mut Record| {
            now.made.shipped = self.shipped.paths().to_vec();
            now.made.by_qemu = by_qemu;
        };
        host.journal
            .amend(&mut record, goes_with_it)
            .map_err(|e| failed("journal", &e, "see to the destination's state_dir"))?;
        // QEMU opens its images when it starts, so they are there before.
        let images = Images::make(host, &mut record, planned, self.whole_room, self.rehearsal, spec.binary())
            .await
            .map_err(|finding| vec![finding])?;
        let descriptors = descriptors
            .open(host)
            .await
            .map_err(|e| failed("network", &e, "let the agent open the devices of macvtaps, or make them"))?;
        make_own(&own, user).map_err(|e| {
            vec![Finding::new(
                "run-dir",
                format!("{} on {} cannot be made: {e}", own.display(), host.name),
                "see to the run_dir of the agent there",
            )]
        })?;
        let launched = qemu::launch(&launched, &log, place, descriptors, |process| {
            host.journal.amend(&mut record, |now| now.process = Some(process.clone()))?;
            // Before it takes any memory: what a process has already taken is not counted again where it comes to.
            Ok(make::enter(&record.made.cgroups, process.pid)?)
        });
        let process = launched.await.map_err(|e| vec![self.not_launched(host, &e)])?;
        let qmp = |e: qemu::QmpError| failed("qemu", &e, "see the log of the destination's agent");
        let monitor = Qmp::connect(&record.qmp_socket).await.map_err(qmp)?;
        self.compare(host, &monitor).await?;
        let ram = self.ram(host, &process, &spec)?;
        made.check(&ram).map_err(|e| vec![guest_ram::finding(host, &e)])?;
        if self.post_copy
            && let Some(finding) = waiting::impossible(host, &ram)
        {
            return Err(vec![finding].into());
        }
        let [events, late, _] = CAPABILITIES;
        let on = if self.qemu_stream || self.saved_devices { &[events, late][..] } else { &CAPABILITIES };
        // Its command line may have set others (`-global migration.…`).
        let before = Settings::of(&monitor).await.map_err(qmp)?;
        host.journal
            .amend(&mut record, |now| now.settings = Some(before.clone()))
            .map_err(|e| failed("journal", &e, "see to the destination's state_dir"))?;
        before.replace(&monitor, on, Value::Null).await.map_err(qmp)?;
        let mut device = DeviceDestination::new(&device);
        monitor.migrate_incoming(&device.uri()).await.map_err(qmp)?;
        let connected = device.connect(process.pid).await;
        connected.map_err(|e| failed("qemu", &e, "see the log of the destination's agent"))?;
        Ok(Reservation { record, spec, qmp: monitor, ram, device, images })
    }

    fn not_launched(&self, host: &Host, error: &LaunchError) -> Finding {
        let message = chain(error);
        if let LaunchError::Unrecorded(source) = error {
            if let Some(e) = source.downcast_ref::<CgroupError>() {
                return limits::failed(host, e);
            }
            return Finding::new("journal", message, "see to the destination's state_dir");
        }
        if message.contains("-sandbox support is not enabled") {
            return Finding::new(
                "sandbox",
                format!("QEMU on {} cannot put itself under a seccomp filter", host.name),
                format!(
                    "use a QEMU there that was built with seccomp, or say `unsandboxed = true` in [allow] in the configuration of {}",
                    host.name
                ),
            );
        }
        if message.contains("unsupported machine type") {
            return Finding::new(
                "machine-type",
                format!(
                    "QEMU on {} does not have machine type {}, of the source's QEMU {}",
                    host.name, self.machine, self.qemu_version
                ),
                "use a QEMU there that has it, or start the VM with a machine type that both have",
            );
        }
        Finding::new("qemu-start", format!("on {}: {message}", host.name), "see to what QEMU complains of")
    }

    /// Compares what the guest sees: machine type and CPU features.
    async fn compare(&self, host: &Host, qmp: &Qmp) -> Result<(), Refusal> {
        let failed = |e: qemu::QmpError| {
            vec![Finding::new("qemu", chain(&e), "see the log of the destination's agent")]
        };
        let mut findings = Vec::new();
        let version = qmp.version().await.map_err(failed)?;
        findings.extend(too_old(&host.name, &version));
        let machine = qmp.machine_type().await.map_err(failed)?;
        if machine != self.machine {
            findings.push(Finding::new(
                "machine-type",
                format!(
                    "QEMU on {} makes the VM a {machine}, at the source it is a {}",
                    host.name, self.machine
                ),
                "use a QEMU there that has the source's machine type",
            ));
        }
        let lacking = self.lacking(qmp).await.map_err(failed)?;
        let mut cpu_features = Vec::new();
        if let Some(lacking) = lacking {
            cpu_features = features_on(qmp).await.map_err(failed)?;
            findings.push(Finding::new(
                kind::CPU_FEATURE_MISSING,
                format!("the CPU on {} lacks what the guest was given ({lacking})", host.name),
                "start the VM with a -cpu model that both hosts have in full",
            ));
        }
        if findings.is_empty() { Ok(()) } else { Err(Refusal { findings, cpu_features }) }
    }

    /// What the guest's CPUs have at the source and would not have here, as CPUID has it.
    async fn lacking(&self, qmp: &Qmp) -> Result<Option<String>, qemu::QmpError> {
        if self.cpuid.is_empty() {
            let here = features_on(qmp).await?;
            let missing: Vec<&str> = self
                .cpu_features
                .iter()
                .map(String::as_str)
                .filter(|name| !here.iter().any(|h| h == name))
                .collect();
            return Ok((!missing.is_empty()).then(|| missing.join(", ")));
        }
        let here = qmp.cpuid_words().await?;
        let missing = |there: &wire::CpuidWord| {
            let same = here.iter().find(|here| {
                (here.leaf, here.subleaf, here.register.as_str())
                    == (there.leaf, there.subleaf, there.register.as_str())
            });
            let bits = there.features & !same.map_or(0, |here| here.features);
            (bits != 0).then(|| format!("CPUID {:#x} {}: {bits:#x}", there.leaf, there.register))
        };
        let missing: Vec<String> = self.cpuid.iter().filter_map(missing).collect();
        Ok((!missing.is_empty()).then(|| missing.join(", ")))
    }

    fn ram(&self, host: &Host, process: &Process, spec: &Spec) -> Result<Vec<RamBlock>, Vec<Finding>> {
        let differs = |what: String| {
            vec![Finding::new(
                "ram-differs",
                format!("on {}: {what}", host.name),
                "see the log of the agents",
            )]
        };
        let ram = qemu::ram_blocks(process, spec, &RamAddresses::new()).map_err(|e| differs(chain(&e)))?;
        let bytes =
            |pages: &std::ops::Range<u64>| (pages.end - pages.start) * mirror::layout::PAGE_SIZE as u64;
        let same = ram.len() == self.layout.blocks().len()
            && ram
                .iter()
                .zip(self.layout.blocks())
                .all(|(here, there)| here.id == there.id && here.size == bytes(&there.pages));
        if same { Ok(ram) } else { Err(differs("QEMU has other RAM blocks than at the source".to_owned())) }
    }
}

/// Makes a machine's own directory, empty: the name is this machine's now, so what is there is of one that is gone.
fn make_own(own: &Path, user: Option<&User>) -> std::io::Result<()> {
    match std::fs::remove_dir_all(own) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::DirBuilder::new().mode(0o700).create(own)?;
    user.map_or(Ok(()), |user| user.give(own))
}
