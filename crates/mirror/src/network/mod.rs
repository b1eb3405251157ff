//! Network: where a machine is found, told to the network when it has moved, and learned from the machine before.
//!
//! A machine keeps its [MAC address](mac) and its IP addresses when it moves; what changes is the port of the switch behind
//! which it is. At the hand-over the destination says so, in the machine's name ([`announce`]). Which IP addresses a machine has
//! nobody but its guest knows, and the guest is not asked: what it tells its neighbours while it is mirrored
//! ([`addresses`]) is listened to at its tap ([`snoop`]).

//!
//! Nothing that is on its way to the machine when it moves is lost: the [`source`] diverts what comes, and the
//! [`destination`] gives it to the guest.

pub mod addresses;
pub mod announce;
pub mod destination;
pub mod diversion;
mod frame;
pub mod frames;
pub mod mac;
pub mod mark;
mod packet;
pub mod snoop;
pub mod source;
pub mod tap;
mod ways;

pub use packet::PacketSocket;
