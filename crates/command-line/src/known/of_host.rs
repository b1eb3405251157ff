//! What is part of this host whatever QEMU says of it, with the reason: a machine that has it stays.

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

/// Network back ends that are this host's.
const HOST_NETWORKS: &[(&str, &str)] = &[
    ("vhost-user", "device in another process"),
    ("vhost-vdpa", "vDPA device of the host"),
    ("af-xdp", "network queue of the host, whose buffers are pinned in guest memory"),
    ("netmap", "network queue of the host"),
];

/// Why a device is this host's, if it is.
pub(crate) fn device(driver: &str) -> Option<&'static str> {
    HOST_DRIVERS.iter().find(|(begin, _)| driver.starts_with(begin)).map(|(_, why)| *why)
}

/// Why an object is.
pub(crate) fn object(kind: &str) -> Option<&'static str> {
    named(HOST_OBJECTS, kind)
}

/// Why a network back end is.
pub(crate) fn network(kind: &str) -> Option<&'static str> {
    named(HOST_NETWORKS, kind)
}

fn named(table: &[(&str, &'static str)], kind: &str) -> Option<&'static str> {
    table.iter().find(|(name, _)| *name == kind).map(|(_, why)| *why)
}
