//! What must not happen to a machine that moves: each file a promise, or what might break one.
//!
//! All are one program, so that they are linked once. `cargo test --test it crashes::` runs those of one file.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adoption;
mod back_and_forth;
mod bad_clients;
mod balloon;
mod bandwidth;
mod cancel;
mod cgroup;
mod commands;
mod converge;
mod crashes;
mod direct_disk;
mod ended_meanwhile;
mod engine_qemu;
mod fence;
mod huge_pages;
mod in_doubt;
mod known_to_work;
mod large;
mod logs;
mod malicious_peer;
mod matrix;
mod network;
mod network_descriptors;
mod network_forward;
mod network_frames;
mod network_hooks;
mod network_macvtap;
mod network_vlan;
mod one_core;
mod other_user;
mod post_copy;
mod postgresql;
mod private_files;
mod private_ram;
mod refusals;
mod settings;
mod several_blocks;
mod slow_link;
mod soak;
mod socket_paths;
mod stalled;
mod state_lost;
mod state_set_back;
mod storage;
mod storage_back_and_forth;
mod storage_changed;
mod storage_direct;
mod storage_faults;
mod storage_kinds;
mod storage_over;
mod storage_refusals;
mod storage_slow_link;
mod storage_two_at_once;
mod storage_verification;
mod storage_writeback;
mod supervised;
mod two_at_once;
mod unprivileged;
mod untouched;
mod unwritten;
mod verification;
mod versions;
