//! What a firewall knows of a machine, at one host and at another: network namespaces of this machine. Needs root, and `nft`.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod connections;
mod namespaces;
mod nft;
