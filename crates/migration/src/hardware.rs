//! What is plugged into a machine. It must be what its command line says, of which the destination makes another; and it must stay
//! that as long as the machine is mirrored.

use std::collections::BTreeSet;

use qemu::{Qmp, QmpError, Spec};

use finding::Finding;

/// Where QEMU lists devices with an id, and those without.
const LISTS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What is plugged into a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hardware {
    /// Ids of devices.
    named: BTreeSet<String>,
    /// Places of devices without one, with their drivers.
    anonymous: BTreeSet<String>,
    /// Drives by the device that has them, what is in each, and how many bytes the guest sees of it.
    drives: BTreeSet<(String, String, u64)>,
    /// Nodes of the block graph that bypass the page cache, as QEMU has them open now: reads through them are DMA to guest memory.
    direct: BTreeSet<String>,
}

impl Hardware {
    /// Looks at a machine.
    pub(crate) async fn of(qmp: &Qmp) -> Result<Hardware, QmpError> {
        let mut lists = [BTreeSet::new(), BTreeSet::new()];
        for (list, devices) in LISTS.iter().zip(&mut lists) {
            let children =
                qmp.qom_list(list).await?.into_iter().filter(|part| part.kind.starts_with("child<"));
            devices.extend(children.map(|device| device.name));
        }
        let [named, anonymous] = lists;
        let drives = qmp.drives().await?.into_iter();
        let drives = drives.map(|drive| {
            (drive.qdev.unwrap_or(drive.device), drive.path.display().to_string(), drive.virtual_size)
        });
        let drives = drives.collect();
        let nodes = qmp.block_nodes().await?;
        let direct = nodes.into_iter().filter(|node| node.direct).map(|node| node.name).collect();
        Ok(Hardware { named, anonymous, drives, direct })
    }

    /// Whether reads of some disk reach guest memory by DMA.
    pub(crate) fn has_direct(&self) -> bool {
        !self.direct.is_empty()
    }

    /// Devices that came or went since the machine was started, by their ids: the destination would have others.
    pub(crate) fn differs_from(&self, spec: &Spec) -> Vec<Finding> {
        let declared: BTreeSet<String> =
            spec.declared_devices().into_iter().filter_map(|device| device.id).collect();
        let came = self.named.difference(&declared).map(|id| {
            let message = format!("device {id} was plugged in after the VM was started");
            Finding::new("hot-plugged", message, "unplug it, or start the VM with it")
        });
        let went = declared.difference(&self.named).map(|id| {
            let message = format!("device {id} was unplugged after the VM was started");
            Finding::new("unplugged", message, "plug it in again, or start the VM without it")
        });
        came.chain(went).collect()
    }

    /// What has changed since, if anything.
    pub(crate) fn changed_to(&self, now: &Hardware) -> Option<Finding> {
        let devices =
            |hardware: &Hardware| hardware.named.union(&hardware.anonymous).cloned().collect::<BTreeSet<_>>();
        let (before, after) = (devices(self), devices(now));
        let drive = |(device, path, size): &(String, String, u64)| {
            format!("the disk of {device}, {path} of {size} bytes,")
        };
        let came = after.difference(&before).map(|device| format!("device {device} was plugged in"));
        let went = before.difference(&after).map(|device| format!("device {device} was unplugged"));
        let new = now.drives.difference(&self.drives).map(|new| format!("{} is new", drive(new)));
        let gone = self.drives.difference(&now.drives).map(|gone| format!("{} is gone", drive(gone)));
        // Scans that did not stop the guest have not seen what its reads bring. Where they did from the beginning, nothing was missed.
        let direct = now.direct.iter().filter(|_| !self.has_direct());
        let direct = direct.map(|node| format!("block node {node} bypasses the page cache now"));
        let what = came.chain(went).chain(new).chain(gone).chain(direct).next()?;
        let disks_are_the_same = self.drives == now.drives && (self.has_direct() || !now.has_direct());
        let kind = if disks_are_the_same { "devices-changed" } else { "disk-changed" };
        Some(Finding::new(
            kind,
            format!("the VM changed while it was mirrored: {what}"),
            "see to the VM's devices, then migrate again",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hardware(named: &[&str], drives: &[(&str, &str, u64)]) -> Hardware {
        Hardware {
            named: named.iter().map(|&id| id.to_owned()).collect(),
            anonymous: BTreeSet::new(),
            drives: drives
                .iter()
                .map(|&(device, path, size)| (device.to_owned(), path.to_owned(), size))
                .collect(),
            direct: BTreeSet::new(),
        }
    }

    #[test]
    fn a_disk_that_was_reopened_without_a_cache_is_not_mirrored_on_as_if_nothing_were() {
        let cached = hardware(&["vd0"], &[("vd0", "/a", 512)]);
        let direct = Hardware { direct: BTreeSet::from(["e0".to_owned()]), ..cached.clone() };
        let finding = cached.changed_to(&direct).unwrap();
        assert_eq!(finding.kind, "disk-changed");
        assert!(finding.message.ends_with("block node e0 bypasses the page cache now"), "{finding:?}");
        // The guest was stopped for each scan anyway, and may be so for nothing.
        let more = Hardware { direct: BTreeSet::from(["e0".to_owned(), "e1".to_owned()]), ..cached.clone() };
        assert_eq!(direct.changed_to(&more), None);
        assert_eq!(direct.changed_to(&cached), None);
        assert!(direct.has_direct() && !cached.has_direct());
    }

    #[test]
    fn what_changed_is_named() {
        let before = hardware(&["nic", "vd0"], &[("vd0", "/a", 512)]);
        assert_eq!(before.changed_to(&before), None);
        for (after, kind, words) in [
            (
                hardware(&["nic", "vd0", "rng"], &[("vd0", "/a", 512)]),
                "devices-changed",
                "rng was plugged in",
            ),
            (hardware(&["nic"], &[]), "disk-changed", "vd0 was unplugged"),
            (
                hardware(&["nic", "vd0"], &[("vd0", "/a", 1024)]),
                "disk-changed",
                "of vd0, /a of 1024 bytes, is new",
            ),
            (
                hardware(&["nic", "vd0"], &[("vd0", "/b", 512)]),
                "disk-changed",
                "of vd0, /b of 512 bytes, is new",
            ),
            (hardware(&["nic", "vd0"], &[]), "disk-changed", "of vd0, /a of 512 bytes, is gone"),
        ] {
            let finding = before.changed_to(&after).unwrap();
            assert_eq!(finding.kind, kind);
            assert!(finding.message.ends_with(words), "{finding:?}");
        }
    }

    #[test]
    fn what_the_command_line_does_not_say_is_named() {
        let spec =
            Spec::parse(&["qemu-system-x86_64", "-device", "virtio-rng-pci,id=rng", "-device", "e1000"])
                .unwrap();
        let kinds = |named: &[&str]| -> Vec<String> {
            hardware(named, &[]).differs_from(&spec).into_iter().map(|finding| finding.kind).collect()
        };
        assert!(kinds(&["rng"]).is_empty());
        assert_eq!(kinds(&["other"]), ["hot-plugged", "unplugged"]);
    }
}
