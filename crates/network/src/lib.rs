//! Links and frames: interfaces as they are and made alike elsewhere, where a machine is found in its network, and what is on its way to
//! it while it moves. This crate knows interfaces and frames, and no VM, phase or message between agents.
//!
//! A machine keeps its [MAC address](mac) and its IP addresses when it moves; what changes is the port of the switch behind
//! which it is. At the hand-over the destination says so, in the machine's name ([`announce`]). Which IP addresses a machine has
//! nobody but its guest knows, and the guest is not asked: what it tells its neighbours while it is mirrored
//! ([`addresses`]) is listened to at its tap ([`snoop`]).
//!
//! Nothing that is on its way to the machine when it moves is lost: the [`source`] diverts what comes, and the
//! [`destination`] gives it to the guest.
//!
//! Its taps, bridges' ports and tunnels are [`interfaces`]; what a host's firewall knows of it are [`conntrack`] and [`nft`].

pub mod addresses;
pub mod announce;
pub mod conntrack;
pub mod destination;
pub mod diversion;
mod frame;
pub mod frames;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod interfaces;
pub mod mac;
pub mod mark;
pub mod nft;
mod packet;
pub mod snoop;
pub mod source;
pub mod tap;
mod ways;

pub use packet::PacketSocket;
