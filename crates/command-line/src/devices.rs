//! Devices that the guest sees, and those of them that are tied to this host.

use crate::argument::Argument;
use crate::known;
use crate::spec::Spec;

/// A device that the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredDevice {
    /// Its `id=`, by which `/machine/peripheral` lists it; without one it is in `/machine/peripheral-anon`.
    pub id: Option<String>,
    /// The driver as written, such as `virtio-net-pci`.
    pub driver: String,
}

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

    /// Whether there is a device by which the guest may give memory back to the host while it runs: a balloon, with or without reports
    /// of free pages, or virtio-mem.
    #[must_use]
    pub fn gives_memory_back(&self) -> bool {
        let gives = |device: DeclaredDevice| {
            device.driver.contains("balloon") || device.driver.starts_with("virtio-mem")
        };
        self.declared_devices().into_iter().any(gives)
    }

    /// What ties the machine to this host, each as a phrase that names the option: passed-through devices, devices in
    /// other processes (vhost-user), vDPA, directories and persistent memory of the host. Empty: nothing.
    #[must_use]
    pub fn host_devices(&self) -> Vec<String> {
        self.arguments
            .iter()
            .filter_map(|argument| {
                let reason = host_device(argument)?;
                Some(format!("{} {} ({reason})", argument.word(), argument.value().unwrap_or("")))
            })
            .collect()
    }
}

/// How an argument ties the machine to this host, if it does.
pub(crate) fn host_device(argument: &Argument) -> Option<&'static str> {
    let kind = |key: &str| argument.properties().get(key);
    Some(match argument.name() {
        "device" => known::of_host::device(&kind("driver")?)?,
        "object" => known::of_host::object(&kind("qom-type")?)?,
        "netdev" | "nic" | "net" => known::of_host::network(&kind("type")?)?,
        "virtfs" | "fsdev" => "directory of the host",
        "tpmdev" => "TPM whose state is outside QEMU",
        "usbdevice" if argument.value().is_some_and(|value| value.starts_with("host:")) => {
            "USB device of the host"
        }
        "xen-attach" => "Xen domain of the host",
        _ => return None,
    })
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
    fn a_device_that_gives_memory_back_is_known_whatever_it_is_called() {
        for (device, gives) in [
            ("virtio-balloon-pci,free-page-reporting=on", true),
            ("virtio-balloon-ccw", true),
            ("virtio-balloon-pci-non-transitional", true),
            (r#"{"driver":"virtio-balloon-pci","id":"b"}"#, true),
            ("hv-balloon", true),
            ("virtio-mem-pci,memdev=v,id=m", true),
            ("virtio-rng-pci", false),
        ] {
            let spec = Spec::parse(&["q", "-device", device]).unwrap();
            assert_eq!(spec.gives_memory_back(), gives, "{device}");
        }
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
