//! A machine as the source describes it: everything the destination must provide.

use qemu::qmp::{CpuidWord, RunState, Version};
use qemu::{NicKind, RamBlock};

use crate::disks::{self, Disk};
use crate::hardware::Hardware;
use crate::source::devices;
use finding::Finding;
use host::Host;
use host::Vm;
use host::supervised;
use movable::compatibility::{features_on, too_old, unmovable};
use movable::{blockers, confinement};
use network::interfaces::macvtap::Macvtap;
use network::interfaces::{Interfaces, Kind};
use protocol::wire;
use session::options::{Engine, Options};

/// Everything the destination must provide, and what the source needs to mirror.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) machine: String,
    pub(crate) qemu_version: String,
    pub(crate) cpuid: Vec<CpuidWord>,
    /// By name, where there is no CPUID.
    pub(crate) cpu_features: Vec<String>,
    pub(crate) ram: Vec<RamBlock>,
    pub(crate) kvm: bool,
    /// A disk bypasses the page cache: devices write guest RAM behind the tracking while a read is under way.
    pub(crate) direct_disks: bool,
    pub(crate) disks: Vec<Disk>,
    pub(crate) taps: Vec<wire::Tap>,
    pub(crate) hardware: Hardware,
    /// Of its process.
    pub(crate) limits: cgroup::Limits,
}

impl Machine {
    /// Whether its device state is saved without a migration by QEMU, whose stream would carry all RAM that is no named file.
    pub(crate) fn saves_devices(&self) -> bool {
        self.ram.iter().any(|block| block.in_stream)
    }

    /// Describes a machine of this host, and finds every reason for which it cannot leave it.
    pub(crate) async fn describe(host: &Host, vm: &Vm, options: &Options) -> (Option<Machine>, Vec<Finding>) {
        let mut findings = unmovable(&vm.spec, options.accept_disconnect);
        let supervision = supervised::of(&vm.record, &vm.spec, leaves(options));
        host.left.may_start(&vm.record.name, supervision.as_ref().map(|found| &found.finding));
        findings.extend(supervision.filter(|found| found.refused).map(|found| found.finding));
        if vm.record.post_copy.is_some() {
            findings.push(Finding::new(
                "still-arriving",
                format!("memory of VM {} is still on its way to this host", vm.record.name),
                "wait until it has everything; `vmirror status` at its source shows how far it is",
            ));
        }
        let blocks = |process| qemu::ram_blocks(process, &vm.spec, &vm.record.ram);
        let ram = match vm.record.process.as_ref().map(blocks) {
            Some(Ok(ram)) => ram,
            Some(Err(e)) => {
                findings.push(Finding::new(
                    "ram-not-mirrorable",
                    finding::chain(&e),
                    "see whether its QEMU is still the one that was adopted, and that the agent may trace it",
                ));
                Vec::new()
            }
            None => Vec::new(),
        };
        if options.engine == Engine::Mirror {
            match dirty_tracker::kernel_support() {
                Err(e) => findings.push(Finding::new(
                    "kernel-too-old",
                    finding::chain(&e),
                    "boot this host with Linux 6.7 or newer, or migrate with --engine qemu",
                )),
                Ok(()) => findings.extend(confinement::check(host, &vm.record, &vm.spec).await),
            }
        }
        let facts = facts(vm).await;
        let Facts { machine, qemu_version, cpuid, cpu_features, kvm, running, hardware, blockers } =
            match facts {
                Ok(facts) => facts,
                Err(e) => {
                    findings.push(Finding::new(
                        "qemu-gone",
                        finding::chain(&e),
                        "see what became of the VM with `vmirror show`",
                    ));
                    return (None, findings);
                }
            };
        if !running.running {
            findings.push(Finding::new(
                "not-running",
                format!("VM {} is {}", vm.record.name, running.status),
                "resume it first",
            ));
        }
        findings.extend(blockers);
        findings.extend(hardware.differs_from(&vm.spec));
        findings.extend(too_old("the source", &qemu_version));
        let qemu_version = qemu_version.to_string();
        let (taps, more) = taps(vm, options.forward).await;
        findings.extend(more);
        if options.forward && taps.is_empty() {
            findings.push(Finding::new(
                "forward",
                format!("VM {} has no tap whose network could be forwarded", vm.record.name),
                "migrate it without --forward",
            ));
        }
        let (disks, more) = disks::describe(vm, options).await;
        findings.extend(more);
        let limits = limits(&vm.record).unwrap_or_else(|e| {
            let message = format!("the VM's limits: {}", finding::chain(&e));
            findings.push(Finding::new("cgroup", message, e.hint()));
            cgroup::Limits::default()
        });
        let direct_disks = hardware.has_direct();
        let mirrored: Vec<String> = ram.iter().map(|block| block.id.clone()).collect();
        if ram.iter().any(|block| block.in_stream)
            && options.engine == Engine::Mirror
            && let Some(process) = &vm.record.process
            && let Err(finding) = devices::may_save_alone(&vm.qmp, process, &machine, &mirrored).await
        {
            findings.push(finding);
        }
        let machine = Machine {
            machine,
            qemu_version,
            cpuid,
            cpu_features,
            ram,
            kvm,
            direct_disks,
            disks,
            taps,
            hardware,
            limits,
        };
        (Some(machine), findings)
    }
}

/// How a machine is to leave, for what may start it again.
pub(crate) fn leaves(options: &Options) -> supervised::Leaves {
    supervised::Leaves {
        mirrored: options.disks == session::Disks::Mirror,
        accepted: options.accept_supervisor,
    }
}

struct Facts {
    machine: String,
    qemu_version: Version,
    cpuid: Vec<CpuidWord>,
    cpu_features: Vec<String>,
    kvm: bool,
    running: RunState,
    hardware: Hardware,
    blockers: Vec<Finding>,
}

async fn facts(vm: &Vm) -> Result<Facts, qemu::QmpError> {
    let cpuid = vm.qmp.cpuid_words().await?;
    let cpu_features = if cpuid.is_empty() { features_on(&vm.qmp).await? } else { Vec::new() };
    Ok(Facts {
        machine: vm.qmp.machine_type().await?,
        qemu_version: vm.qmp.version().await?,
        cpuid,
        cpu_features,
        kvm: vm.qmp.kvm_enabled().await?,
        running: vm.qmp.status().await?,
        hardware: Hardware::of(&vm.qmp).await?,
        blockers: blockers::told_by(&vm.qmp, &vm.spec).await?,
    })
}

async fn taps(vm: &Vm, forward: bool) -> (Vec<wire::Tap>, Vec<Finding>) {
    let nics: Vec<_> = vm
        .spec
        .nics()
        .into_iter()
        .filter(|nic| matches!(nic.kind, NicKind::Tap { .. } | NicKind::Bridge { .. }))
        .collect();
    if nics.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let interfaces = match Interfaces::open() {
        Ok(interfaces) => interfaces,
        Err(e) => {
            let finding = Finding::new("network", finding::chain(&e), "let the agent use netlink");
            return (Vec::new(), vec![finding]);
        }
    };
    let (mut taps, mut findings) = (Vec::new(), Vec::new());
    for nic in nics {
        let Some(ifname) = vm.record.interface(&nic) else {
            findings.push(Finding::new(
                "tap-name",
                format!("network {} does not name its tap interface", nic.netdev),
                "start the VM with -netdev tap,ifname=NAME,script=no,downscript=no",
            ));
            continue;
        };
        match interfaces.describe(&ifname).await {
            Ok(Some(tap)) => {
                let macvtap = match &tap.kind {
                    Kind::Macvtap(macvtap) => wire::Macvtap::of(macvtap),
                    Kind::Tap | Kind::Other(_) => None,
                };
                if macvtap.is_none() && tap.kind != Kind::Tap {
                    findings.push(not_carried(&nic.netdev, &ifname, &tap.kind));
                    continue;
                }
                let forwarded = vm.record.made.forwarded.iter().find(|forwarded| forwarded.tap == ifname);
                // In another host's network it is on a bridge that is for that only.
                let (bridge, port) = match (forwarded, tap.bridge) {
                    (Some(forwarded), _) => (forwarded.home.clone(), Ok(forwarded.port.clone())),
                    (None, Some(bridge)) => {
                        let port = interfaces.port(&ifname, &bridge).await.map(Some);
                        (bridge, port)
                    }
                    (None, None) if forward && macvtap.is_some() => {
                        findings.push(Finding::new(
                            "forward",
                            format!("interface {ifname} is a macvtap, which cannot be forwarded to"),
                            "give the VM a tap on a bridge, or migrate without --forward",
                        ));
                        (String::new(), Ok(None))
                    }
                    (None, None) if forward => {
                        findings.push(Finding::new(
                            "forward",
                            format!("interface {ifname} is a port of no bridge, so that nothing can be forwarded to it"),
                            "make it one, or migrate without --forward and let a hook turn its routes",
                        ));
                        (String::new(), Ok(None))
                    }
                    (None, None) => (String::new(), Ok(None)),
                };
                let port = port.unwrap_or_else(|e| {
                    findings.push(Finding::new("network", finding::chain(&e), "let the agent use netlink"));
                    None
                });
                taps.push(wire::Tap {
                    netdev: nic.netdev,
                    ifname: ifname.clone(),
                    bridge,
                    mtu: tap.mtu,
                    queue_length: tap.queue_length.unwrap_or_default(),
                    multi_queue: nic.queues > 1,
                    mac: nic.mac.unwrap_or_default(),
                    port: port.as_ref().map(Into::into),
                    macvtap,
                });
            }
            Ok(None) => findings.push(Finding::new(
                "tap-missing",
                format!(
                    "tap interface {ifname} of network {} is not in the agent's network namespace",
                    nic.netdev
                ),
                "run the agent in the network namespace of its VMs",
            )),
            Err(e) => findings.push(Finding::new(
                "network",
                finding::chain(&e),
                "see whether the interface is still there",
            )),
        }
    }
    (taps, findings)
}

/// Why an interface cannot be carried over that is no tap, and no macvtap such as can be made elsewhere.
fn not_carried(netdev: &str, ifname: &str, kind: &Kind) -> Finding {
    match kind {
        Kind::Macvtap(Macvtap { lower: None, .. }) => Finding::new(
            "lower-missing",
            format!(
                "what macvtap {ifname} of network {netdev} is on is not in the agent's network namespace"
            ),
            "run the agent in the network namespace of that, and make the macvtap there",
        ),
        Kind::Macvtap(macvtap) => Finding::new(
            "macvtap-mode",
            format!(
                "macvtap {ifname} of network {netdev} is in mode {}, which cannot be carried over",
                macvtap.mode
            ),
            "use mode bridge, vepa, private or passthru",
        ),
        Kind::Tap | Kind::Other(_) => Finding::new(
            "network-kind",
            format!("interface {ifname} of network {netdev} is neither a tap nor a macvtap"),
            "use a tap on a bridge, or a macvtap",
        ),
    }
}
/// The limits that are its process's own.
fn limits(record: &host::Record) -> Result<cgroup::Limits, cgroup::CgroupError> {
    let Some(process) = &record.process else { return Ok(cgroup::Limits::default()) };
    cgroup::read::limits(process.pid, &record.made.cgroups)
}
