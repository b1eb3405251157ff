//! What keeps a machine where it is, as its QEMU says: devices that it cannot migrate, and block drivers that are not known to work.

use qemu::spec::BlockDriver;
use qemu::{Qmp, QmpError, Spec};

use finding::Finding;

/// What the nodes that a mirror itself puts into QEMU's graph are called by.
pub const OUR_NODES: &str = "vmirror-disk";

/// What QEMU says that it cannot migrate of a machine, and what it has open in a way that is not known to work.
///
/// # Errors
/// If it does not answer.
pub async fn told_by(qmp: &Qmp, spec: &Spec) -> Result<Vec<Finding>, QmpError> {
    let told: Vec<String> = spec.unknown_drives().into_iter().map(|(_, driver)| driver).collect();
    let mut findings: Vec<Finding> =
        qmp.query_migrate().await?.blocked.iter().map(|reason| not_migratable(reason)).collect();
    for node in qmp.block_nodes().await? {
        let unknown = BlockDriver::of(&node.driver) == BlockDriver::Unknown;
        if unknown && !node.name.starts_with(OUR_NODES) && !told.contains(&node.driver) {
            findings.push(unknown_driver(&format!("block node {}", node.name), &node.driver));
        }
    }
    Ok(findings)
}

/// What the command line has that is not known to work.
pub fn on_command_line(spec: &Spec) -> Vec<Finding> {
    spec.unknown_drives().into_iter().map(|(option, driver)| unknown_driver(&option, &driver)).collect()
}

/// What QEMU itself says.
pub fn not_migratable(reason: &str) -> Finding {
    let reason = reason.trim_end_matches('.');
    let hint = match reason.strip_prefix("non-migratable device: ") {
        Some(_) => {
            "start the VM with a device in its place that QEMU can migrate (virtio-blk or virtio-scsi for nvme, virtio-vga without -gl)"
        }
        None => "start the VM without it, or have the guest give it up",
    };
    Finding::new("not-migratable", format!("QEMU cannot migrate the VM: {reason}"), hint)
}

fn unknown_driver(what: &str, driver: &str) -> Finding {
    let known: Vec<&str> = BlockDriver::Local.names().chain(BlockDriver::Network.names()).collect();
    let known = format!("use one of {}", known.join(", "));
    let (why, hint) = match driver {
        "nvme"
        | "nvme-io_uring"
        | "io_uring"
        | "virtio-blk-vfio-pci"
        | "virtio-blk-vhost-user"
        | "virtio-blk-vhost-vdpa" => (
            "a device of this host's own, which writes guest memory past the tracking",
            "give the VM the disk by the kernel (host_device, file), or over the network (nbd, rbd, iscsi, nfs)",
        ),
        "vvfat" => ("a directory of this host", "put its files into an image"),
        "mirror_top" | "commit_top" | "backup-top" | "copy-before-write" | "snapshot-access" => (
            "a block job or backup of another program, which would not go on at the destination",
            "wait until it has ended, or end it",
        ),
        _ => ("not known to lead to the same from another host", known.as_str()),
    };
    Finding::new("disk-driver", format!("{what} uses QEMU's block driver {driver}: {why}"), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_known_is_refused_by_name_with_what_to_do() {
        let spec = Spec::parse(&[
            "q",
            "-drive",
            "file=nvme://0000:01:00.0/1,id=n",
            "-hda",
            "fat:/dir",
            "-drive",
            "file=/a",
            "-blockdev",
            "driver=quorum,node-name=q",
        ])
        .unwrap();
        let found = on_command_line(&spec);
        let kinds: Vec<&str> = found.iter().map(|finding| finding.kind.as_str()).collect();
        assert_eq!(kinds, ["disk-driver"; 3]);
        for (finding, words) in found.iter().zip([
            ["0000:01:00.0", "block driver nvme: a device of this host's own", "host_device"],
            ["-hda fat:/dir", "vvfat: a directory of this host", "image"],
            ["quorum", "not known to lead to the same", "nbd"],
        ]) {
            let text = format!("{} {}", finding.message, finding.hint);
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn what_qemu_says_is_told_in_its_words() {
        let device = not_migratable("non-migratable device: 0000:00:01.0/nvme");
        assert_eq!(device.message, "QEMU cannot migrate the VM: non-migratable device: 0000:00:01.0/nvme");
        assert!(device.hint.contains("virtio-blk"));
        let other = not_migratable("Migration is disabled when VirtFS export path is mounted in the guest.");
        assert!(other.message.ends_with("mounted in the guest") && other.hint.contains("guest"));
    }
}
