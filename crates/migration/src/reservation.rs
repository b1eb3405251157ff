//! Reservation: the destination proves that it can hold and run a machine, and sets the resources aside.

mod cgroup;
pub(crate) mod disks;
mod kernel_use;
mod macvtaps;
mod taps;

use std::path::{Component, Path, PathBuf};

use link::Peer;
use mirror::device::destination::DeviceDestination;
use mirror::hash::Secret;
use mirror::layout::Layout;
use mirror::storage::layout::DiskLayout;
use qemu::spec::{Destination, FilePurpose};
use qemu::{LaunchError, Process, Qmp, RamBlock, Spec};
use uuid::Uuid;

use crate::boot_files;
use crate::cgroup::{CgroupError, Limits, make};
use crate::destination::forwarded::Tunnels;
use crate::destination::images::Images;
use crate::destination::post_copy;
use crate::failure::{Finding, chain};
use crate::firewall;
use crate::hooks::Hook;
use crate::host::Host;
use crate::lifecycle::{self, Paths, own_ram_files};
use crate::machine;
use crate::occasion;
use crate::options::MAX_STREAMS;
use crate::room;
use crate::vm::{Made, Origin, Ownership, Record, VmName};
use crate::wire;

pub(crate) use disks::{Planned, SECTOR};
use macvtaps::Descriptors;

/// Capabilities of the QEMU that waits. Images are opened for good, and locked, only when the machine is resumed.
const CAPABILITIES: [(&str, bool); 2] = [("events", true), ("late-block-activate", true)];
/// Its stream carries no RAM, unless RAM is to come by it.
const WITHOUT_RAM: &str = "x-ignore-shared";

/// A source's request, understood and within bounds.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) session: Uuid,
    pub(crate) name: VmName,
    pub(crate) generation: u64,
    pub(crate) rehearsal: bool,
    pub(crate) layout: Layout,
    pub(crate) secret: Secret,
    spec: Spec,
    machine: String,
    qemu_version: String,
    cpuid: Vec<wire::CpuidWord>,
    cpu_features: Vec<String>,
    memory: u64,
    /// The size of the huge pages of each RAM block that has such, by its backend's id.
    huge: Vec<(String, u64)>,
    disks: Vec<wire::Disk>,
    /// What it boots from directly.
    boot_files: Vec<wire::BootFile>,
    /// Those that were shipped here for it.
    pub(crate) shipped: boot_files::Shipped,
    /// Networks whose connections end with the move are no reason against it.
    accept_disconnect: bool,
    /// Images that are made get all their room at once.
    whole_room: bool,
    taps: Vec<wire::Tap>,
    /// They stay in the source's network.
    forward: Option<Tunnels>,
    /// Of its process.
    limits: Limits,
    /// Its own table in the firewall.
    nft: String,
    post_copy: bool,
    /// QEMU's own stream carries the memory.
    pub(crate) qemu_stream: bool,
}

/// Bytes in a probe file.
const NONCE: usize = 16;
/// The kind of finding that a source completes with the names of what is missing.
pub(crate) const CPU_FEATURE_MISSING: &str = "cpu-feature-missing";

/// Why nothing was set aside.
#[derive(Debug)]
pub(crate) struct Refusal {
    findings: Vec<Finding>,
    /// What the CPUs here have, where that is less than the guest was given.
    cpu_features: Vec<String>,
}

impl From<Vec<Finding>> for Refusal {
    fn from(findings: Vec<Finding>) -> Refusal {
        Refusal { findings, cpu_features: Vec::new() }
    }
}

impl From<Refusal> for wire::Findings {
    fn from(refusal: Refusal) -> wire::Findings {
        let cpu_features = refusal.cpu_features;
        wire::Findings { cpu_features, ..refusal.findings.into() }
    }
}

/// Everything that was set aside: QEMU waits, paused and empty.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) record: Record,
    pub(crate) spec: Spec,
    pub(crate) qmp: Qmp,
    pub(crate) ram: Vec<RamBlock>,
    pub(crate) device: DeviceDestination,
    /// Where the disks are mirrored to.
    pub(crate) images: Images,
}

impl Request {
    /// Understands a request.
    pub(crate) fn decode(wire: wire::Reserve, peer: &Peer) -> Result<Request, Finding> {
        let violation =
            |what: String| Finding::new("protocol", what, "see whether both agents are of the same version");
        let session = Uuid::from_slice(&wire.session).map_err(|e| violation(format!("session: {e}")))?;
        let name: VmName = wire.name.parse().map_err(|e| violation(format!("{e}")))?;
        let streams = u16::try_from(wire.streams).unwrap_or(u16::MAX);
        if streams > MAX_STREAMS {
            return Err(violation(format!("{streams} data streams, more than {MAX_STREAMS}")));
        }
        if wire.generation == u64::MAX || wire.disks.iter().any(|disk| disk.nonce.len() != NONCE) {
            return Err(violation("a generation or a probe that cannot be".to_owned()));
        }
        let sizes = wire.disks.iter().map(|disk| disk.size).filter(|size| *size > 0);
        DiskLayout::new(sizes, streams).map_err(|e| violation(chain(&e)))?;
        let blocks = wire.ram.iter().map(|block| (block.id.as_str(), block.size));
        let layout = Layout::new(blocks, streams).map_err(|e| violation(chain(&e)))?;
        let secret = Secret::try_from(&wire.secret[..]).map_err(|e| violation(chain(&e)))?;
        let limits = wire.limits.as_ref().map_or(Some(Limits::default()), Limits::decode);
        let limits = limits.ok_or_else(|| violation("limits that no process can have".to_owned()))?;
        let spec = Spec::parse(&wire.argv).map_err(|e| violation(chain(&e)))?;
        let forward = wire.forward.map(|forward| {
            Tunnels::decode(forward, peer)
                .ok_or_else(|| violation(format!("no UDP port is {}", forward.port)))
        });
        Ok(Request {
            session,
            name,
            generation: wire.generation,
            rehearsal: wire.rehearsal,
            memory: layout.page_count() * mirror::layout::PAGE_SIZE as u64,
            layout,
            secret,
            spec,
            huge: wire.ram.into_iter().filter(|b| b.huge_page > 0).map(|b| (b.id, b.huge_page)).collect(),
            machine: wire.machine,
            qemu_version: wire.qemu_version,
            cpuid: wire.cpuid,
            cpu_features: wire.cpu_features,
            disks: wire.disks,
            whole_room: wire.whole_room,
            accept_disconnect: wire.accept_disconnect,
            boot_files: wire.boot_files,
            shipped: boot_files::Shipped::default(),
            taps: wire.taps.into_iter().chain(wire.macvtaps).collect(),
            forward: forward.transpose()?,
            limits,
            nft: wire.nft,
            post_copy: wire.post_copy,
            qemu_stream: wire.qemu_stream,
        })
    }

    /// Whether nothing is known that would be in the way.
    pub(crate) async fn is_welcome(&self, host: &Host, peer: &str) -> bool {
        let (_, _, findings) = self.examine(host, peer).await;
        findings.is_empty()
    }

    /// Which files the machine boots from that this host does not have and can take.
    pub(crate) fn lacking_files(&self, host: &Host) -> Vec<wire::BootFile> {
        let numbers = boot_files::lacking(host, &self.spec, &self.boot_files);
        numbers.into_iter().filter_map(|number| self.boot_files.get(number as usize).cloned()).collect()
    }

    /// Sets everything aside, or says why not: all reasons that can be told together are.
    pub(crate) async fn reserve(&self, host: &Host, peer: &str) -> Result<Reservation, Refusal> {
        if !self.rehearsal {
            self.make_way(host, peer).await;
        }
        // Until the name is claimed, and its memory with it, nobody else is promised the same room.
        let promising = host.journal.promise().await;
        let (binary, planned, mut findings) = self.examine(host, peer).await;
        let huge_dirs = self.huge_directories(host, &mut findings);
        let Some(binary) = binary.filter(|_| findings.is_empty()) else { return Err(findings.into()) };
        let paths = Paths::of(host, &self.name);
        let descriptors = Descriptors::take(&self.taps, &self.spec).map_err(|e| {
            vec![Finding::new("qemu-start", chain(&e), "see to the limit of open files of the agent there")]
        })?;
        let taps = self.taps.iter().filter(|tap| tap.macvtap.is_none());
        let taps = taps.map(|tap| (tap.netdev.clone(), tap.ifname.clone())).collect();
        let spec = self.spec.for_destination(&Destination {
            name: self.name.to_string(),
            binary,
            machine: self.machine.clone(),
            host: host.name.clone(),
            ram_dir: host.ram_dir.clone(),
            huge_dirs: huge_dirs.clone(),
            qmp_socket: paths.qmp.clone(),
            pid_file: Some(paths.pid.clone()),
            taps,
            macvtaps: descriptors.numbers(),
        });
        let spec = match spec {
            // A rehearsal ships nothing, and its QEMU boots nothing.
            Ok(spec) if self.rehearsal && !self.lacking_files(host).is_empty() => spec.without_direct_boot(),
            Ok(spec) => spec,
            Err(e) => {
                findings.push(Finding::new("not-mirrorable", chain(&e), "start the VM without it"));
                return Err(findings.into());
            }
        };
        let qmp_socket = paths.qmp.clone();
        let mut files = paths.all();
        files.extend(own_ram_files(host, &spec));
        let record = Record {
            name: self.name.clone(),
            generation: self.generation,
            ownership: Ownership::Incoming { session: self.session, from: peer.to_owned(), ready: false },
            origin: Origin::Arrived,
            arrived_by: Some(self.session),
            arrived_from: Some(peer.to_owned()),
            outgoing: None,
            post_copy: None,
            supplied: None,
            supplies: false,
            pauses: false,
            resuming: false,
            process: None,
            argv: spec.to_argv(),
            qmp_socket,
            memory: self.memory,
            handed_in: descriptors.handed_in(),
            made: Made { files, ..Made::default() },
        };
        if let Err(e) = host.journal.claim(record.clone()) {
            let finding = Finding::new("name-taken", chain(&e), "choose another name, or stop that VM");
            return Err(vec![finding].into());
        }
        drop(promising);
        match self.set_up(host, record, spec, planned, descriptors).await {
            Ok(reservation) => Ok(reservation),
            Err(refusal) => {
                let ours = |record: &Record| record.arrived_by == Some(self.session);
                if let Some(record) = host.journal.get(&self.name).filter(ours) {
                    lifecycle::forget(host, &record, None).await;
                }
                Err(refusal)
            }
        }
    }

    /// A copy that the same source has left here, of a machine that it says is still its own, is worthless.
    async fn make_way(&self, host: &Host, peer: &str) {
        let Some(record) = host.journal.get(&self.name) else { return };
        if let Ownership::Incoming { from, .. } = &record.ownership
            && from == peer
            && record.generation <= self.generation
        {
            tracing::info!(vm = %self.name, from, "discarding the copy of an earlier migration");
            lifecycle::forget(host, &record, None).await;
        }
    }

    /// Everything that can be told without starting anything.
    async fn examine(&self, host: &Host, peer: &str) -> (Option<PathBuf>, Vec<Planned>, Vec<Finding>) {
        let mut findings = Vec::new();
        if peer == host.name {
            findings.push(Finding::new(
                "same-host",
                format!("{peer} is both source and destination"),
                "name another host's agent with --to",
            ));
            return (None, Vec::new(), findings);
        }
        if let Some(record) = host.journal.get(&self.name) {
            findings.push(Finding::new(
                "name-taken",
                format!("{} already has a VM named {}", host.name, record.name),
                "stop that VM, or adopt this one under another name",
            ));
        }
        let macs = || self.taps.iter().map(|tap| tap.mac.as_str());
        if let Some(other) = host.forwards.of(&self.name).filter(|forward| !forward.macs.iter().eq(macs())) {
            findings.push(Finding::new(
                "name-forwarded",
                format!(
                    "what comes on {} for another VM named {} is forwarded to {}",
                    host.name, self.name, other.to
                ),
                "end that with `vmirror release` there, or adopt this one under another name",
            ));
        }
        let binary = self.binary(host);
        if binary.is_none() {
            findings.push(Finding::new(
                "qemu-not-allowed",
                format!("{} allows no {}", host.name, file_name(self.spec.binary())),
                format!("add one to [allow] qemu in the configuration of {}", host.name),
            ));
        }
        self.examine_consistency(&mut findings);
        self.examine_memory(host, &mut findings);
        self.examine_files(host, &mut findings);
        let planned = self.examine_disks(host, &mut findings);
        self.examine_taps(host, &mut findings).await;
        findings.extend(firewall::examine(host, &self.nft));
        findings.extend(host.hooks.examine().map(|error| error.finding(&host.name)));
        findings.extend(self.examine_limits(host));
        (binary, planned, findings)
    }

    /// The allowed QEMU that comes nearest to the source's: the same path, else the same name.
    fn binary(&self, host: &Host) -> Option<PathBuf> {
        let wanted = self.spec.binary();
        let same_name = |allowed: &&PathBuf| file_name(allowed) == file_name(wanted);
        let allowed = &host.allow.qemu;
        allowed.iter().find(|path| *path == wanted).or_else(|| allowed.iter().find(same_name)).cloned()
    }

    /// What the source lists must be what the command line has: it is the command line that is run.
    fn examine_consistency(&self, findings: &mut Vec<Finding>) {
        findings.extend(machine::unmovable(&self.spec, self.accept_disconnect));
        let listed = |path: &Path| self.disks.iter().any(|disk| Path::new(&disk.path) == path);
        for disk in self.spec.disks() {
            if let Some(path) = disk.host_path().filter(|path| !listed(path)) {
                let message = format!("disk {} is on the command line and was not announced", path.display());
                findings.push(Finding::new(
                    "protocol",
                    message,
                    "see whether both agents are of the same version",
                ));
            }
        }
        for nic in self.spec.nics() {
            let is_tap = matches!(nic.kind, qemu::NicKind::Tap { .. } | qemu::NicKind::Bridge { .. });
            if is_tap && !self.taps.iter().any(|tap| tap.netdev == nic.netdev) {
                let message = format!("network {} is on the command line and was not announced", nic.netdev);
                findings.push(Finding::new(
                    "protocol",
                    message,
                    "see whether both agents are of the same version",
                ));
            }
        }
    }

    fn examine_memory(&self, host: &Host, findings: &mut Vec<Finding>) {
        let (in_use, limit) = (room::in_use(host), host.allow.max_memory);
        if in_use.saturating_add(self.memory) > limit {
            findings.push(Finding::new(
                "memory-limit",
                format!(
                    "the VM has {} of RAM; {} allows {}, of which {} are taken",
                    mib(self.memory),
                    host.name,
                    mib(limit),
                    mib(in_use)
                ),
                format!("raise [allow] max_memory in the configuration of {}", host.name),
            ));
        }
        let bytes =
            |pages: &std::ops::Range<u64>| (pages.end - pages.start) * mirror::layout::PAGE_SIZE as u64;
        let demand = |block: &mirror::layout::Block| {
            let directory = self.huge_directory(host, &block.id).unwrap_or_else(|| host.ram_dir.clone());
            (directory, bytes(&block.pages))
        };
        let demands: Vec<room::Demand> = self.layout.blocks().iter().map(demand).collect();
        for short in room::shortages(host, &demands) {
            findings.push(Finding::new("no-room", short.to_string(), short.hint()));
        }
    }

    /// Where RAM in huge pages goes here: to `ram_dir` if that has pages of their size, else to the directory where the
    /// source has it. None where neither has.
    fn huge_directory(&self, host: &Host, id: &str) -> Option<PathBuf> {
        let (_, page_size) = self.huge.iter().find(|(huge, _)| huge == id)?;
        let backend = self.spec.ram_backends().into_iter().find(|backend| backend.id == id)?;
        let path = backend.mem_path?;
        [Some(host.ram_dir.as_path()), Some(&path), path.parent()]
            .into_iter()
            .flatten()
            .find(|directory| directory.is_dir() && qemu::huge_page_size(directory) == Some(*page_size))
            .map(Path::to_owned)
    }

    /// [`Request::huge_directory`] of every block that needs one.
    fn huge_directories(&self, host: &Host, findings: &mut Vec<Finding>) -> Vec<(String, PathBuf)> {
        let mut directories = Vec::new();
        for (id, page_size) in &self.huge {
            if let Some(directory) = self.huge_directory(host, id) {
                directories.push((id.clone(), directory));
                continue;
            }
            let source = self.spec.ram_backends().into_iter().find(|backend| backend.id == *id);
            let source = source.and_then(|backend| backend.mem_path).unwrap_or_default();
            findings.push(Finding::new(
                "huge-pages",
                format!(
                    "RAM block {id} has huge pages of {} KiB; on {} neither {} nor the directory of {} has such",
                    page_size >> 10,
                    host.name,
                    host.ram_dir.display(),
                    source.display()
                ),
                "mount a hugetlbfs there, under the same path as at the source or as ram_dir, with pages enough",
            ));
        }
        directories
    }

    fn examine_files(&self, host: &Host, findings: &mut Vec<Finding>) {
        for file in self.spec.files() {
            // Flash that can be written is among the disks.
            if file.purpose == FilePurpose::Flash && file.writable {
                continue;
            }
            // A bare name of firmware is looked up among QEMU's own files.
            let own = matches!(file.purpose, FilePurpose::Firmware | FilePurpose::Rom);
            if own && matches!(file.path.components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
                continue;
            }
            let is_listed = self.boot_files.iter().any(|listed| Path::new(&listed.path) == file.path);
            // It is shipped.
            if is_listed && !file.path.exists() && disks::creatable(host, &file.path).is_ok() {
                continue;
            }
            if !file.path.exists() {
                findings.push(Finding::new(
                    "file-missing",
                    format!("{} does not exist on {}", file.path.display(), host.name),
                    "copy it there, under the same path",
                ));
            } else if !disks::allowed(host, &file.path) {
                findings.push(disks::outside(host, &file.path));
            }
        }
    }

    /// Makes what the machine needs, starts its QEMU, and compares what only QEMU can tell.
    async fn set_up(
        &self,
        host: &Host,
        mut record: Record,
        spec: Spec,
        planned: Vec<Planned>,
        descriptors: Descriptors,
    ) -> Result<Reservation, Refusal> {
        let Paths { log, device, .. } = Paths::of(host, &self.name);
        let failed =
            |kind: &str, e: &dyn std::error::Error, hint: &str| vec![Finding::new(kind, chain(e), hint)];
        record.made.rehearsal = self.rehearsal;
        self.make_taps(host, &mut record).await?;
        self.make_cgroups(host, &mut record).map_err(|finding| vec![finding])?;
        if !self.nft.is_empty() && !self.rehearsal {
            // On record first, so that it goes if the machine does not come.
            record.made.nft = true;
            host.journal
                .update(&record)
                .map_err(|e| failed("journal", &e, "see to the destination's state_dir"))?;
            firewall::make(host, &self.name, &self.nft).await.map_err(|finding| vec![finding])?;
        }
        occasion::run(host, Hook::Prepare, &record, self.rehearsal).await.map_err(|finding| vec![finding])?;
        // The name is ours now, so a RAM file of that name is a remnant.
        for stale in own_ram_files(host, &spec) {
            let _ = std::fs::remove_file(stale);
        }
        // On record from here on, so that they go if the machine does not come.
        record.made.shipped = self.shipped.paths().to_vec();
        record.made.by_qemu = spec.files_made();
        record.made.by_qemu.retain(|file| std::fs::symlink_metadata(file).is_err());
        // QEMU opens its images when it starts, so they are there before.
        let images = Images::make(host, &mut record, planned, self.whole_room, self.rehearsal, spec.binary())
            .await
            .map_err(|finding| vec![finding])?;
        let descriptors = descriptors
            .open(host)
            .await
            .map_err(|e| failed("network", &e, "let the agent open the devices of macvtaps, or make them"))?;
        let launched = qemu::launch(&spec, &log, descriptors, |process| {
            record.process = Some(process.clone());
            host.journal.update(&record)?;
            // Before it takes any memory: what a process has already taken is not counted again where it comes to.
            Ok(make::enter(&record.made.cgroups, process.pid)?)
        });
        let process = launched.await.map_err(|e| vec![self.not_launched(host, &e)])?;
        let qmp = |e: qemu::QmpError| failed("qemu", &e, "see the log of the destination's agent");
        let monitor = Qmp::connect(&record.qmp_socket).await.map_err(qmp)?;
        self.compare(host, &monitor).await?;
        let ram = self.ram(host, &process, &spec)?;
        if self.post_copy
            && let Some(finding) = post_copy::impossible(host, &ram)
        {
            return Err(vec![finding].into());
        }
        let [events, late] = CAPABILITIES;
        monitor.set_capabilities(&[events, late, (WITHOUT_RAM, !self.qemu_stream)]).await.map_err(qmp)?;
        let mut device = DeviceDestination::new(&device);
        monitor.migrate_incoming(&device.uri()).await.map_err(qmp)?;
        let connected = device.connect().await;
        connected.map_err(|e| failed("qemu", &e, "see the log of the destination's agent"))?;
        Ok(Reservation { record, spec, qmp: monitor, ram, device, images })
    }

    fn not_launched(&self, host: &Host, error: &LaunchError) -> Finding {
        let message = chain(error);
        if let LaunchError::Unrecorded(source) = error {
            if let Some(e) = source.downcast_ref::<CgroupError>() {
                return cgroup::failed(host, e);
            }
            return Finding::new("journal", message, "see to the destination's state_dir");
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
        findings.extend(machine::too_old(&host.name, &version));
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
            cpu_features = machine::features_on(qmp).await.map_err(failed)?;
            findings.push(Finding::new(
                CPU_FEATURE_MISSING,
                format!("the CPU on {} lacks what the guest was given ({lacking})", host.name),
                "start the VM with a -cpu model that both hosts have in full",
            ));
        }
        if findings.is_empty() { Ok(()) } else { Err(Refusal { findings, cpu_features }) }
    }

    /// What the guest's CPUs have at the source and would not have here, as CPUID has it.
    async fn lacking(&self, qmp: &Qmp) -> Result<Option<String>, qemu::QmpError> {
        if self.cpuid.is_empty() {
            let here = machine::features_on(qmp).await?;
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
        let ram = qemu::ram_blocks(process, spec).map_err(|e| differs(chain(&e)))?;
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

/// Reads a probe file. Its name is the peer's, so whatever else lies there is not read: no other file's content, and
/// nothing that would block.
fn read_probe(path: &Path) -> std::io::Result<[u8; NONCE]> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() != NONCE as u64 {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut nonce = [0; NONCE];
    file.read_exact(&mut nonce)?;
    Ok(nonce)
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy()
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
