//! Macvtaps of a machine that is to come: whether there is a place for them, and given to its QEMU.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use qemu::Spec;
use rustix::io::DupFlags;

use finding::Finding;
use host::Host;
use host::handed_in::HandedIn;
use network::interfaces::{Interfaces, Kind, TapError};
use protocol::wire;

/// Queues of one macvtap: the kernel has no more.
const MAX_QUEUES: u32 = 256;

/// Finds every reason for which a machine cannot have this macvtap here.
pub(super) async fn examine(
    tap: &wire::Tap,
    macvtap: &wire::Macvtap,
    host: &Host,
    interfaces: &Interfaces,
) -> Vec<Finding> {
    let Some(wanted) = macvtap.checked() else {
        let message = format!("interface {} is a macvtap such as there is none", tap.ifname);
        return vec![Finding::new("protocol", message, "update the agents")];
    };
    let (lower, name) = (&macvtap.lower, &tap.ifname);
    if !host.allow.macvtap.contains(lower) {
        return vec![Finding::new(
            "lower-not-allowed",
            format!("{} does not allow macvtaps on {lower}", host.name),
            "add it to [allow] macvtap in that agent's configuration",
        )];
    }
    let Ok(Some(below)) = interfaces.describe(lower).await else {
        return vec![Finding::new(
            "lower-missing",
            format!("{} has no interface {lower} for macvtap {name}", host.name),
            "rename the one there that leads to the same network",
        )];
    };
    let mut findings = Vec::new();
    if let Some(bridge) = &below.bridge {
        findings.push(Finding::new(
            "lower-taken",
            format!(
                "{lower} on {} is a port of bridge {bridge}, and the kernel puts no macvtap on such",
                host.name
            ),
            "name an interface that is no bridge's, or take it out of the bridge",
        ));
    }
    if below.mtu < tap.mtu {
        findings.push(Finding::new(
            "mtu-too-small",
            format!(
                "interface {lower} on {} passes frames of {} bytes, the VM's interface {name} has {}",
                host.name, below.mtu, tap.mtu
            ),
            "give the interface there, and what it leads to, the same MTU",
        ));
    }
    // One that is down is nobody's: it was left by this VM, or made ready for it.
    if let Ok(Some(there)) = interfaces.describe(name).await
        && !matches!(&there.kind, Kind::Macvtap(found) if !there.up && (&found.lower, found.mode) == (&wanted.lower, wanted.mode))
    {
        findings.push(Finding::new(
            "interface-taken",
            format!("{} already has an interface {name} that the VM cannot have", host.name),
            "remove it there, or if it was left by this VM, bring it down",
        ));
    }
    if let Ok(Some(other)) = interfaces.takes_the_same(&wanted, name).await {
        findings.push(Finding::new(
            "interface-taken",
            format!("{other} on {} takes what is for {} from {lower}", host.name, macvtap.mac),
            "remove it there, or give it another address",
        ));
    }
    findings
}

/// Makes it, and leaves it down.
pub(super) async fn make(
    tap: &wire::Tap,
    macvtap: &wire::Macvtap,
    queue_length: Option<u32>,
    interfaces: &Interfaces,
) -> Result<(), TapError> {
    let macvtap = macvtap.checked().ok_or_else(|| TapError::Missing(macvtap.lower.clone()))?;
    interfaces.make_macvtap(&tap.ifname, &macvtap, tap.mtu, queue_length).await
}

/// The descriptors of a QEMU that is to be started: their numbers are on its command line before there is anything behind them.
pub(super) struct Descriptors(Vec<(HandedIn, Vec<OwnedFd>)>);

impl Descriptors {
    /// Takes numbers for the macvtaps among these.
    pub(super) fn take(taps: &[wire::Tap], spec: &Spec) -> io::Result<Descriptors> {
        let mut each = Vec::new();
        for tap in taps {
            let Some(macvtap) = &tap.macvtap else { continue };
            let nic = spec.nics().into_iter().find(|nic| nic.netdev == tap.netdev);
            let queues = nic.map_or(1, |nic| nic.queues).clamp(1, MAX_QUEUES);
            let nothing = || File::open("/dev/null").map(OwnedFd::from);
            let numbers = (0..queues).map(|_| nothing()).collect::<io::Result<_>>()?;
            let (netdev, ifname, mac) = (tap.netdev.clone(), tap.ifname.clone(), macvtap.mac.clone());
            each.push((HandedIn { netdev, ifname, macvtap: Some(mac) }, numbers));
        }
        Ok(Descriptors(each))
    }

    /// The numbers, for the command line.
    pub(super) fn numbers(&self) -> Vec<(String, Vec<i32>)> {
        let numbers = |descriptors: &[OwnedFd]| descriptors.iter().map(|each| each.as_raw_fd()).collect();
        self.0
            .iter()
            .map(|(handed_in, descriptors)| (handed_in.netdev.clone(), numbers(descriptors)))
            .collect()
    }

    /// What they lead to, for the record.
    pub(super) fn handed_in(&self) -> Vec<HandedIn> {
        self.0.iter().map(|(handed_in, _)| handed_in.clone()).collect()
    }

    /// Puts queues behind the numbers: the interfaces have been made.
    pub(super) async fn open(self, host: &Host) -> Result<Vec<OwnedFd>, TapError> {
        let mut all = Vec::new();
        if self.0.is_empty() {
            return Ok(all);
        }
        let interfaces = Interfaces::open()?;
        for (HandedIn { ifname, .. }, numbers) in self.0 {
            let queues = interfaces.open_macvtap(&ifname, numbers.len(), &host.run_dir).await?;
            for (mut number, queue) in numbers.into_iter().zip(queues) {
                let put = rustix::io::dup3(&queue, &mut number, DupFlags::CLOEXEC);
                put.map_err(|e| TapError::Open { name: ifname.clone(), source: e.into() })?;
                all.push(number);
            }
        }
        Ok(all)
    }
}
