//! Devices that the guest sees, and those of them that are tied to this host.

use super::Spec;

/// A device that the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredDevice {
    /// Its `id=`, by which `/machine/peripheral` lists it; without one it is in `/machine/peripheral-anon`.
    pub id: Option<String>,
    /// The driver as written, such as `virtio-net-pci`.
    pub driver: String,
}

/// Device drivers (by the beginning of their name) that are part of this host, and why that matters.
const HOST_DRIVERS: &[(&str, &str)] = &[
    ("vfio-", "host device passed through"),
    ("kvm-pci-assign", "host device passed through"),
    ("pci-assign", "host device passed through"),
    ("xen-pci-passthrough", "host device passed through"),
    ("vhost-user-", "device in another process"),
    ("vhost-vdpa-", "vDPA device of the host"),
    ("vhost-scsi", "SCSI target of the host's kernel"),
    ("usb-host", "USB device of the host"),
    ("scsi-generic", "SCSI device of the host"),
    ("scsi-block", "SCSI device of the host"),
    ("ivshmem", "memory shared with another process"),
    ("nvdimm", "persistent memory in a file of the host"),
    ("virtio-pmem", "persistent memory in a file of the host"),
    ("virtio-9p", "directory of the host"),
    ("x-remote-object", "device in another process"),
    ("x-pci-proxy-dev", "device in another process"),
];

/// Objects that tie the machine to this host.
const HOST_OBJECTS: &[(&str, &str)] = &[
    ("sev-guest", "encrypted guest memory"),
    ("sev-snp-guest", "encrypted guest memory"),
    ("tdx-guest", "encrypted guest memory"),
    ("memory-backend-epc", "SGX memory"),
    ("memory-backend-shm", "memory without a file name"),
    ("iommufd", "host device passed through"),
    ("cryptodev-vhost-user", "device in another process"),
];

impl Spec {
    /// Devices from `-device` and from the options that are shorthand for it, in order.
    ///
    /// `-drive if=virtio` and `-virtfs` make a device without id exactly as `-device` would; other shorthands
    /// (`-hda`, `-nic`, `-vga`, …) make parts of the board, which no command can unplug.
    #[must_use]
    pub fn declared_devices(&self) -> Vec<DeclaredDevice> {
        let anonymous = |driver: &str| Some(DeclaredDevice { id: None, driver: driver.to_owned() });
        self.arguments
            .iter()
            .filter_map(|argument| match argument.name() {
                "device" => {
                    let properties = argument.properties();
                    Some(DeclaredDevice { id: properties.get("id"), driver: properties.get("driver")? })
                }
                "drive" if argument.properties().get("if").as_deref() == Some("virtio") => {
                    anonymous("virtio-blk")
                }
                "virtfs" => anonymous("virtio-9p"),
                "watchdog" => anonymous(argument.value()?),
                _ => None,
            })
            .collect()
    }

    /// Whether a balloon device gives back, at any time, the pages that the guest reports free.
    #[must_use]
    pub fn reports_free_pages(&self) -> bool {
        self.arguments.iter().filter(|argument| argument.name() == "device").any(|argument| {
            let properties = argument.properties();
            properties.get("driver").is_some_and(|driver| driver.starts_with("virtio-balloon"))
                && properties.is_on("free-page-reporting")
        })
    }

    /// What ties the machine to this host, each as a phrase that names the option: passed-through devices, devices in
    /// other processes (vhost-user), vDPA, directories and persistent memory of the host. Empty: nothing.
    #[must_use]
    pub fn host_devices(&self) -> Vec<String> {
        self.arguments
            .iter()
            .filter_map(|argument| {
                let value = argument.value().unwrap_or("");
                let reason = match argument.name() {
                    "device" => HOST_DRIVERS.iter().find_map(|(driver, reason)| {
                        argument
                            .properties()
                            .get("driver")
                            .filter(|name| name.starts_with(driver))
                            .map(|_| *reason)
                    })?,
                    "object" => HOST_OBJECTS.iter().find_map(|(object, reason)| {
                        argument.properties().get("qom-type").filter(|name| name == object).map(|_| *reason)
                    })?,
                    "netdev" | "nic" | "net" => match argument.properties().get("type")?.as_str() {
                        "vhost-user" => "device in another process",
                        "vhost-vdpa" => "vDPA device of the host",
                        "af-xdp" => "network queue of the host, whose buffers are pinned in guest memory",
                        "netmap" => "network queue of the host",
                        _ => return None,
                    },
                    "virtfs" | "fsdev" => "directory of the host",
                    "tpmdev" => "TPM whose state is outside QEMU",
                    "usbdevice" if value.starts_with("host:") => "USB device of the host",
                    "xen-attach" => "Xen domain of the host",
                    _ => return None,
                };
                Some(format!("{} {value} ({reason})", argument.word()))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_devices_are_named_with_their_option() {
        let spec = Spec::parse(&[
            "q",
            "-device",
            "vfio-pci,host=01:00.0",
            "-device",
            r#"{"driver":"vhost-user-fs-pci","chardev":"c"}"#,
            "-netdev",
            "type=vhost-vdpa,id=v,vhostdev=/dev/vhost-vdpa-0",
            "-device",
            "virtio-net-pci,netdev=v",
            "-object",
            "memory-backend-epc,id=e,size=1M",
            "-usbdevice",
            "tablet",
        ])
        .unwrap();
        let found = spec.host_devices();
        assert_eq!(found.len(), 4, "{found:?}");
        assert_eq!(found[0], "-device vfio-pci,host=01:00.0 (host device passed through)");
        assert!(found[2].contains("vhost-vdpa-0"));
    }

    #[test]
    fn shorthand_devices_count_as_declared() {
        let spec = Spec::parse(&[
            "q",
            "-device",
            "e1000,id=n",
            "-drive",
            "file=a,if=virtio",
            "-drive",
            "file=b,if=none",
        ]);
        let devices = spec.unwrap().declared_devices();
        assert_eq!(devices.len(), 2);
        assert_eq!(devices[0].id.as_deref(), Some("n"));
        assert_eq!((devices[1].id.as_deref(), devices[1].driver.as_str()), (None, "virtio-blk"));
    }
}
