//! vmirror and QEMU's own migration, side by side, in one run.
//!
//! `course::run` boots two equal guests on the testbed, one under vmirror's agents, its twin in plain QEMU
//! processes, and moves them back and forth over the same link in turns, so that whatever else the machine does meets all
//! methods alike. Everything that was seen goes into one `Record`: every report, every sample of CPU time, what the
//! guests' client noticed. `figures` holds the record against the goals, `present` shows it on a terminal, `page` as
//! a page to look at.
//!
//! What is compared, and how it is counted:
//!
//! * **downtime**: from the guest's STOP at the source until it runs at the destination. vmirror's is its own report's, on the
//!   source's clock until word has come back; QEMU's is taken from the time stamps of its STOP event at the source and
//!   its RESUME event at the destination (both hosts share this machine's clock). The downtime that QEMU itself
//!   reports ends when the source has sent everything and is shown beside it.
//! * **total time**: vmirror's from the command to the end of clean-up and health watch, the start of the
//!   destination's QEMU, encryption, verification and proof included; QEMU's `total-time`, its destination being started before.
//! * **bytes**: what the source's link carried away from it during the migration, by the counter of its network interface: the
//!   same for all. What the programs count themselves is kept beside it.
//! * **CPU time**: vmirror's is that of both agents, everything they do; QEMU's that of its migration thread at the source and
//!   of the threads that load at the destination.

#![expect(unreachable_pub, reason = "nothing of it is seen from outside: it is for its two programs")]

mod baseline;
mod budget;
mod cell;
mod compare;
mod contender;
mod course;
mod coverage;
mod demo;
mod disks;
mod document;
mod error;
mod events;
mod figures;
mod file;
#[cfg(test)]
mod fixtures;
mod goals;
mod measure;
mod mirrored;
mod narrator;
mod nbd;
mod outcome;
mod page;
mod plot;
mod present;
mod record;
mod results;
mod run;
mod scene;
mod settings;
mod throughput;
mod trial;

pub use compare::main as compare;
pub use demo::main as demo;
