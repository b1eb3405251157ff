//! What of QEMU is known to work, and what is known to be tied to a host: the one place that says so. What is in none of these tables is
//! refused by name ([0048](../../../docs/decisions/0048-what-is-known-to-work.md)).

mod block;
mod devices;
pub(crate) mod of_host;

pub use block::BlockDriver;
pub(crate) use devices::is_guests_device;

/// Kinds that are nothing outside of QEMU, but for files of memory, which get another place.
pub(crate) const OBJECTS: &[&str] = &[
    "acpi-generic-initiator",
    "acpi-generic-port",
    "authz-list",
    "authz-simple",
    "can-bus",
    "cryptodev-backend",
    "cryptodev-backend-builtin",
    "iothread",
    "main-loop",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "rng-builtin",
    "rng-egd",
    "rng-random",
    "secret",
    "thread-context",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// Network back ends that are connected to what has been made ready, to another back end, or to nothing.
pub(crate) const NETWORKS: &[&str] = &["bridge", "hubport", "nic", "none", "tap"];

/// Options whose value is a character device in the short notation, as that of `-gdb` is.
pub(crate) const SHORT_CHARDEVS: &[&str] =
    &["serial", "parallel", "monitor", "debugcon", "qmp", "qmp-pretty"];

/// Kinds of character devices in the short notation that are sockets of TCP.
pub(crate) const SHORT_TCP: &[&str] = &["tcp", "telnet", "websocket", "tn3270"];

/// Whether an option's value is a character device in the short notation.
pub(crate) fn takes_short_chardev(option: &str) -> bool {
    option == "gdb" || SHORT_CHARDEVS.contains(&option)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn nothing_is_said_twice_or_of_two_kinds() {
        let drivers: Vec<&str> = [
            BlockDriver::Local,
            BlockDriver::Network,
            BlockDriver::Nothing,
            BlockDriver::Format,
            BlockDriver::Filter,
        ]
        .into_iter()
        .flat_map(BlockDriver::names)
        .collect();
        for table in [&drivers[..], OBJECTS, NETWORKS] {
            assert_eq!(table.iter().collect::<HashSet<_>>().len(), table.len(), "{table:?}");
        }
        let of_both = |name: &&&str| of_host::object(name).is_some();
        assert_eq!(OBJECTS.iter().find(of_both), None);
        assert_eq!(NETWORKS.iter().find(|name| of_host::network(name).is_some()), None);
        assert_eq!(devices::all().find(|name| of_host::device(name).is_some()), None);
        assert!(devices::all().all(|name| is_guests_device(&name)));
    }

    #[test]
    fn what_reaches_further_than_what_it_is_given_is_not_a_peers_to_name() {
        for driver in BlockDriver::Network.names() {
            assert!(!BlockDriver::is_confined(driver), "{driver}");
        }
        for driver in BlockDriver::Local.names().chain(BlockDriver::Nothing.names()).chain(["raw", "qcow2"]) {
            assert!(BlockDriver::is_confined(driver), "{driver}");
        }
        for driver in ["nvme", "vvfat", "blkdebug", "vmdk", ""] {
            assert!(!BlockDriver::is_confined(driver), "{driver}");
        }
    }
}
