//! Addresses of the guests' network.

use std::net::Ipv4Addr;

/// The client's address in the guests' network.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// The bits of the guests' network.
pub const GUEST_PREFIX: u8 = 24;

/// The address of the guest of that number, 1 to 254.
pub(crate) fn of_guest(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, number)
}
