//! Device state: QEMU's own migration stream, without guest RAM.
//!
//! With the capability `x-ignore-shared` QEMU's stream carries everything but the shared RAM. The source takes it
//! from a unix socket that QEMU connects to, the destination feeds it to one that QEMU listens on.
//!
//! QEMU sends the stream's beginning while the guest runs. Everything after the pause must wait at the destination
//! until guest RAM is complete, because loading reads it: virtio devices look up their rings. So the destination
//! holds the stream from [`hold`](destination::DeviceDestination::hold) to
//! [`release`](destination::DeviceDestination::release).

pub mod destination;
pub mod saved;
pub mod source;

/// Most bytes of the stream that travel in one message: below the limit of a control message of the link.
pub const MAX_PART: usize = 256 * 1024;

/// Most bytes of the stream that a destination holds: device state is some hundred kilobytes, graphics memory and
/// flash some megabytes.
pub const MAX_HELD: usize = 256 * 1024 * 1024;
