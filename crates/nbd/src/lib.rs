//! The Network Block Device protocol, both ends, over unix stream sockets, for plain threads that block.
//!
//! It is the protocol that QEMU's block jobs write to and that its storage daemon serves images with. What is spoken
//! here is the part of it that both need, after the [protocol document] (`doc/proto.md` of NetworkBlockDevice/nbd):
//!
//! ```text
//!  server                                client
//!  "NBDMAGIC" "IHAVEOPT" flags      →
//!                                   ←    flags
//!                                   ←    option: list, info, go, …      ┐ fixed newstyle: any number of options,
//!  reply, reply, …, acknowledgement →                                   ┘ until one is "go" or "abort"
//!                                   ←    request: cookie, offset, length, data
//!                                   ←    request
//!  simple reply: cookie, error, data →                                    in any order
//! ```
//!
//! Not offered and not asked for: TLS (the sockets are this host's own), structured replies, block status, extended
//! headers, several connections to one export.
//!
//! | side | |
//! | --- | --- |
//! | [`server::Server`] | serves one [`server::Export`]; every request comes with a [`server::Reply`] to answer when it pleases |
//! | [`client::Client`] | reads and writes an export; several requests are under way at a time |
//!
//! Whatever length a peer gives is held against its limit before anything is allocated for it.
//!
//! [protocol document]: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md

pub mod client;
mod connection;
mod export;
mod haggling;
mod reply;
pub mod server;
mod socket;
mod wire;

pub use wire::{BlockSizes, WireError};
