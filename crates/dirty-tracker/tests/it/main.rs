//! Tracking of real processes: each is this test program started again in a role of `tracee`.

#![expect(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod confined;
mod direct_io;
mod empty;
mod gone_and_busy;
mod hugetlbfs;
mod kernel_too_old;
mod killed_agent;
mod kvm_guest;
mod missing;
mod no_write_is_missed;
mod throttled;
mod tracee;
mod unharmed;
