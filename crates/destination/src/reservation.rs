//! Reservation: the destination proves that it can hold and run a machine, and sets the resources aside.

pub(crate) mod allowed;
mod arguments;
mod as_user;
mod chains;
mod disks;
mod examine;
mod kernel_use;
mod limits;
mod macvtaps;
mod others;
mod set_up;
mod taps;

use std::net::SocketAddr;
use std::path::Path;

use link::Peer;
use mirror::device::destination::DeviceDestination;
use mirror::hash::Secret;
use mirror::layout::Layout;
use mirror::storage::layout::DiskLayout;
use qemu::spec::Destination;
use qemu::spec::render::QMP_SOCKET;
use qemu::{Qmp, RamBlock, Spec};
use uuid::Uuid;

use crate::boot_files;
use crate::forwarded::Tunnels;
use crate::images::Images;
use cgroup::Limits;
use finding::{Finding, chain};
use host::Host;
use host::guest_ram;
use host::lifecycle;
use host::paths::Paths;
use host::{Made, Origin, Record};
use ownership::JournalError;
use ownership::VmName;
use ownership::{self, Effect, Event, OnRecord as _, Standing};
use protocol::wire;
use session::options::MAX_STREAMS;

use macvtaps::Descriptors;

/// A source's request, understood and within bounds.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) session: Uuid,
    pub(crate) name: VmName,
    pub(crate) generation: u64,
    /// Where the source can be asked.
    source: Option<SocketAddr>,
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
    /// It may be handed over before its memory is complete.
    pub(crate) post_copy: bool,
    /// QEMU's own stream carries the memory.
    pub(crate) qemu_stream: bool,
    saved_devices: bool,
    /// The source waits for as long as it hears that this is worked on.
    pub(crate) patient: bool,
    /// Earlier migrations whose copies it says are worthless; of an agent that says nothing of them, all are.
    abandoned: Option<Vec<Uuid>>,
}

/// Bytes in a probe file.
const NONCE: usize = 16;

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

/// A command line as it is on record, with everything where its user has it; and the one that QEMU is started with.
struct Started {
    spec: Spec,
    launched: Spec,
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
        let limits = wire.limits.as_ref().map_or(Some(Limits::default()), wire::CgroupLimits::checked);
        let limits = limits.ok_or_else(|| violation("limits that no process can have".to_owned()))?;
        let spec = Spec::parse(&wire.argv).map_err(|e| violation(chain(&e)))?;
        let forward = wire.forward.map(|forward| {
            Tunnels::decode(forward, peer)
                .ok_or_else(|| violation(format!("no UDP port is {}", forward.port)))
        });
        let abandoned = wire.abandoned.as_deref().map(identities).transpose();
        let abandoned = abandoned.map_err(|left| violation(format!("{left} bytes are no identity")))?;
        let source = u16::try_from(wire.link_port).ok().filter(|port| *port != 0);
        Ok(Request {
            source: source.map(|port| SocketAddr::new(peer.address.ip().to_canonical(), port)),
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
            saved_devices: wire.saved_devices,
            patient: wire.patient,
            abandoned,
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
            qmp_socket: paths.own.join(QMP_SOCKET),
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
        let launched = match self.render(host, &spec) {
            Ok(rendered) => rendered,
            Err(refused) => return Err(refused.into()),
        };
        let spec = spec.sandboxed_as(&launched.spec);
        let qmp_socket = paths.own.join(QMP_SOCKET);
        let files = guest_ram::own(host, &self.name, &spec);
        let standing = ownership::on(None, self.event(peer)).standing.unwrap_or_else(Standing::own);
        let record = Record {
            arrived_from_address: self.source.map(|address| address.to_string()),
            argv: spec.to_argv(),
            qmp_socket,
            memory: self.memory,
            handed_in: descriptors.handed_in(),
            made: Made { files, places: launched.places, rehearsal: self.rehearsal, ..Made::default() },
            ..Record::new(self.name.clone(), standing, Origin::Arrived)
        };
        if let Err(e) = host.journal.claim(record.clone()) {
            return Err(vec![not_claimed(host, &e)].into());
        }
        drop(promising);
        let started = Started { spec, launched: launched.spec };
        match self.set_up(host, record, started, planned, descriptors).await {
            Ok(reservation) => Ok(reservation),
            Err(refusal) => {
                let ours = |record: &Record| record.arrived_by == Some(self.session);
                if let Some(record) = host.journal.get(&self.name).filter(ours) {
                    lifecycle::forget(host, &record, None).await.kept_on_record();
                }
                Err(refusal)
            }
        }
    }

    fn event(&self, peer: &str) -> Event {
        Event::Reserved {
            session: self.session,
            from: peer.to_owned(),
            generation: self.generation,
            abandoned: self.abandoned.clone(),
        }
    }

    /// A copy that the same source has left here, of a machine that it says is still its own, is worthless; and so are the images of one
    /// that is not on record any more.
    async fn make_way(&self, host: &Host, peer: &str) {
        self.abandoned.iter().flatten().for_each(|session| host.left.source_has_it(*session));
        let _deciding = host.journal.decide(&self.name).await;
        let Some(record) = host.journal.get(&self.name) else { return };
        let effects = ownership::on(Some(&record.standing()), self.event(peer)).effects;
        if let [Effect::Discard(mark)] = effects[..] {
            tracing::info!(vm = %self.name, from = peer, "discarding the copy of an earlier migration");
            // One that lingers keeps its name, and is found so.
            let _ = lifecycle::forget_decided(host, &record, None, mark).await;
            if let Some(session) = record.arrived_by {
                host.left.source_has_it(session);
            }
        }
    }
}

/// Identities that stand one after the other; how many bytes are left over where these are others.
fn identities(bytes: &[u8]) -> Result<Vec<Uuid>, usize> {
    let (identities, left) = bytes.as_chunks::<16>();
    if left.is_empty() {
        Ok(identities.iter().copied().map(Uuid::from_bytes).collect())
    } else {
        Err(left.len())
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

/// Why the machine cannot be put on record.
fn not_claimed(host: &Host, error: &JournalError) -> Finding {
    let (kind, hint) = match error {
        JournalError::NameTaken(_) => ("name-taken", "choose another name, or stop that VM".to_owned()),
        JournalError::Unreadable(name) => {
            ("record-unreadable", format!("see `vmirror show {name}` on {}", host.name))
        }
        _ => {
            ("journal-unusable", format!("make room in the state_dir of {}, and see to its disk", host.name))
        }
    };
    Finding::new(kind, chain(error), hint)
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy()
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
