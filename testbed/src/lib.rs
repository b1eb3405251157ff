//! Two hosts, a switch and a client on one machine: for tests, the demo and the benchmark.
//!
//! ```text
//!   client ───────────┐ guests' network 10.88.0.0/24
//!                  ┌──┴───┐
//!  ┌── host A ──┐  │switch│  ┌── host B ──┐
//!  │ tap─br0 ───┼──┤ br0  ├──┼─── br0─tap │
//!  │      link ─┼──┤ br1  ├──┼─ link      │
//!  └────────────┘  └──────┘  └────────────┘
//!                      agents' network 10.9.0.0/24
//! ```
//!
//! Each box is a network namespace. All links are made inside them, so the machine's own network is never touched. The
//! agents talk over links of their own, whose rate can be set apart from that of the guests' network. Without root, a
//! [`Testbed::rootless`] puts two agents on loopback, for virtual machines that have no network.
//!
//! Everything carries the name of the process that made it: several testbeds live side by side, each is removed when
//! dropped, and what a killed process left is [swept](sweep::sweep) by the next one.

pub mod accelerator;
mod addresses;
mod bed;
pub mod client;
pub mod cpu;
mod detect;
pub mod disk;
mod error;
pub mod fault;
pub mod guest_spec;
mod host;
pub mod huge_pages;
pub mod inventory;
pub mod link;
pub mod memory;
pub mod monitor;
mod name;
mod namespace;
pub mod old_kernel;
mod places;
pub mod programs;
pub mod ram;
mod running;
pub mod shim;
pub mod surroundings;
pub mod sweep;
mod times;
mod tool;
pub mod watch;
mod wire;

pub use addresses::{CLIENT_ADDRESS, GUEST_PREFIX};
pub use bed::Testbed;
pub use client::{Client, Journal};
pub use error::TestbedError;
pub use guest_spec::{GuestSpec, TestDisk};
pub use host::{AgentOptions, Host};
pub use huge_pages::HugePages;
pub use inventory::{Difference, Inventory, files_below};
pub use monitor::Monitor;
pub use places::Places;
pub use programs::Programs;
pub use running::{Console, RunningGuest};
pub use shim::{BadDisk, Shim};
pub use wire::{Disturbance, Wire};

/// What the test guest found in a full check of its disks.
pub use guest::disk::Verdict;
/// The status of the test guest, as it says it itself.
pub use guest::status::Status;

/// Whether this process may make namespaces; if not, says so on standard error, because a test that is skipped in silence
/// passes for one that was run.
pub fn root_or_skip(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {what}: needs root");
    }
    root
}
