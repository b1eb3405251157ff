//! Network: where a machine is found, told to the network when it has moved, and learned from the machine before.
//!
//! A machine keeps its [MAC address](mac) and its IP addresses when it moves; what changes is the port of the switch behind
//! which it is. At the hand-over the destination says so, in the machine's name ([`announce`]). Which IP addresses a machine has
//! nobody but its guest knows, and the guest is not asked: what it tells its neighbours while it is mirrored
//! ([`addresses`]) is listened to at its tap ([`snoop`]).

pub mod addresses;
pub mod announce;
mod frame;
pub mod mac;
mod packet;
pub mod snoop;

pub use packet::PacketSocket;
