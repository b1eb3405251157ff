//! What a host puts on its link, counted where it leaves the host.

use crate::Host;
use crate::wire::LINK;
use procfs_core::FromRead as _;
use procfs_core::net::InterfaceDeviceStatus;

/// Counts what leaves a host through its link, from a time on. Guests and the client have a cable of their own, so their heartbeats are
/// not on it.
#[derive(Debug)]
pub struct LinkWatch<'a> {
    host: &'a Host,
    before: u64,
}

impl<'a> LinkWatch<'a> {
    /// From now on. None where the host has no link of its own, as in a testbed without root.
    pub fn start(host: &'a Host) -> Option<Self> {
        Some(Self { host, before: sent(host)? })
    }

    /// Bytes since then: Ethernet frames as the kernel hands them over, up to 64 KiB each. A wire of 1500-byte packets
    /// would carry some 3 % more headers, for everybody.
    pub fn bytes(&self) -> Option<u64> {
        Some(sent(self.host)?.saturating_sub(self.before))
    }
}

fn sent(host: &Host) -> Option<u64> {
    // Of the thread that reads: /sys shows the network that was there when it was mounted.
    let read = || InterfaceDeviceStatus::from_file("/proc/thread-self/net/dev");
    let InterfaceDeviceStatus(interfaces) = host.on_network(read).ok()?.ok()?;
    Some(interfaces.get(LINK)?.sent_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_over_a_network_of_its_own_is_counted() {
        if !crate::root_or_skip("what_is_sent_over_a_network_of_its_own_is_counted") {
            return;
        }
        let bed = crate::Testbed::new().unwrap();
        let watches = bed.hosts().each_ref().map(|host| LinkWatch::start(host).unwrap());
        let to = bed.b().listen().ip();
        let send = || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            (0..100).try_for_each(|_| socket.send_to(&[0; 1000], (to, 9)).map(drop))
        };
        bed.a().on_network(send).unwrap().unwrap();
        let [from_a, from_b] = watches.map(|watch| watch.bytes().unwrap());
        // 42 bytes of headers each, and a question for the address.
        assert!((104_200..106_000).contains(&from_a), "{from_a}");
        assert!(from_b < 10_000, "{from_b}");
    }
}
