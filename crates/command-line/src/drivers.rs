//! Drives that use a block driver of QEMU which is not known to work. It is refused by name, since it may reach a device or a
//! directory of this host, or write guest memory past any tracking (DMA of `nvme`, of `virtio-blk-vfio-pci`, …).

use serde_json::{Map, Value};

use crate::argument::Argument;
use crate::disks::{IMAGE_OPTIONS, Protocol, from_file_name, nested};
use crate::known::BlockDriver;
use crate::spec::Spec;

impl Spec {
    /// Drives that use a block driver which is not known to work: the option, and the driver.
    #[must_use]
    pub fn unknown_drives(&self) -> Vec<(String, String)> {
        let unknown = |argument: &Argument| Some((argument.to_string(), unknown_driver(argument)?));
        self.arguments.iter().filter_map(unknown).collect()
    }
}

/// The first driver of an option that is not known to work.
fn unknown_driver(argument: &Argument) -> Option<String> {
    if argument.is_image() {
        return unknown_file(argument.word());
    }
    match argument.name() {
        name if IMAGE_OPTIONS.contains(&name) || name == "pflash" => unknown_file(argument.value()?),
        "drive" => {
            let drive = argument.properties();
            let file = drive.get("file").and_then(|file| unknown_file(&file));
            file.or_else(|| {
                let format = drive.get("format").filter(|name| BlockDriver::of(name) == BlockDriver::Unknown);
                format.or_else(|| unknown_node(&nested(&drive)))
            })
        }
        "blockdev" => {
            let node = argument.properties();
            node.json().map_or_else(|| unknown_node(&nested(&node)), unknown_node)
        }
        _ => None,
    }
}

/// Of a file name in the old style.
fn unknown_file(name: &str) -> Option<String> {
    if let Some(text) = name.strip_prefix("json:") {
        // QEMU refuses what is no JSON object.
        let node: Map<String, Value> = serde_json::from_str(text).ok()?;
        return unknown_node(&node);
    }
    match from_file_name(name, None).protocol {
        Protocol::File => None,
        Protocol::Other(driver) => match BlockDriver::of(&driver) {
            BlockDriver::Network | BlockDriver::Nothing => None,
            // A prefix of another kind (`blkdebug:`) is followed by a file of this host, which nothing else looks at.
            _ => Some(driver),
        },
    }
}

/// Of a node and everything that is spelled out inside it.
fn unknown_node(node: &Map<String, Value>) -> Option<String> {
    let own = node.get("driver").and_then(Value::as_str);
    let own = own.filter(|name| BlockDriver::of(name) == BlockDriver::Unknown).map(str::to_owned);
    own.or_else(|| node.values().filter_map(Value::as_object).find_map(unknown_node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(option: &str, value: &str) -> Option<String> {
        let spec = Spec::parse(&["q", option, value]).unwrap();
        spec.unknown_drives().pop().map(|(_, driver)| driver)
    }

    #[test]
    fn a_driver_that_is_not_known_to_work_is_named_however_it_is_asked_for() {
        for (option, value, driver) in [
            ("-drive", "file=nvme://0000:01:00.0/1,if=virtio", "nvme"),
            ("-drive", "file=fat:rw:/dir,format=raw", "vvfat"),
            ("-hda", "fat:/dir", "vvfat"),
            ("-drive", "file=blkdebug:rules:/image", "blkdebug"),
            ("-drive", "if=pflash,file=nvme://0000:01:00.0/1", "nvme"),
            ("-drive", "driver=nvme,device=0000:01:00.0,namespace=1,id=d", "nvme"),
            ("-drive", "format=sheepdog,file=/x", "sheepdog"),
            ("-drive", "file.driver=vvfat,file.dir=/dir", "vvfat"),
            ("-drive", r#"file=json:{"driver":"raw",,"file":{"driver":"vvfat",,"dir":"/d"}}"#, "vvfat"),
            ("-blockdev", "driver=nvme,node-name=n,device=0000:01:00.0,namespace=1", "nvme"),
            ("-blockdev", "driver=raw,node-name=n,file.driver=io_uring,file.filename=/dev/vdb", "io_uring"),
            (
                "-blockdev",
                r#"{"driver":"virtio-blk-vhost-vdpa","node-name":"n","path":"/dev/v"}"#,
                "virtio-blk-vhost-vdpa",
            ),
            (
                "-blockdev",
                r#"{"driver":"throttle","node-name":"t","file":{"driver":"raw","file":{"driver":"virtio-blk-vfio-pci","path":"/s"}}}"#,
                "virtio-blk-vfio-pci",
            ),
            (
                "-blockdev",
                r#"{"driver":"quorum","node-name":"q","children":["a","b"],"vote-threshold":1}"#,
                "quorum",
            ),
        ] {
            assert_eq!(found(option, value).as_deref(), Some(driver), "{option} {value}");
        }
        assert_eq!(Spec::parse(&["q", "fat:/dir"]).unwrap().unknown_drives()[0].1, "vvfat");
    }

    #[test]
    fn what_is_known_to_work_passes() {
        for (option, value) in [
            ("-drive", "file=/a.qcow2,format=qcow2"),
            ("-drive", "if=none,id=empty"),
            ("-drive", "file=nbd+unix:///x?socket=/s"),
            ("-drive", "file=nbd:localhost:1"),
            ("-drive", "file=rbd:pool/image:id=x"),
            ("-drive", "file=iscsi://t/i/1"),
            ("-drive", "file=gluster+tcp://h/v/i"),
            ("-drive", "file=https://h/cd.iso,media=cdrom"),
            ("-drive", "file=ssh://h/i"),
            ("-drive", "file=null-co://,if=virtio"),
            ("-drive", "file.driver=host_device,file.filename=/dev/sdb"),
            ("-cdrom", "/dev/sr0"),
            ("-hda", "./with:colon"),
            (
                "-blockdev",
                r#"{"driver":"nfs","node-name":"n","server":{"type":"inet","host":"h"},"path":"/i"}"#,
            ),
            ("-blockdev", r#"{"driver":"throttle","node-name":"t","throttle-group":"g","file":"d"}"#),
            ("-blockdev", "driver=qcow2,node-name=d,file.driver=host_device,file.filename=/dev/vg/d"),
        ] {
            assert_eq!(found(option, value), None, "{option} {value}");
        }
    }
}
