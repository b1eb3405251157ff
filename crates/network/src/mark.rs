//! A frame of our own, behind all others in the queue of a QEMU's tap.
//!
//! QEMU reads the next frame when its guest has taken the last; if there was no room for it, QEMU holds that one, and throws it away
//! when it stops the guest, with one more that it reads then. When this one is read all before it have been taken. It is for nobody: a
//! card that does not listen to everything drops it.

use std::io;

use super::PacketSocket;
use super::frames::HEADER;

/// From nobody to nobody (locally administered addresses), of the EtherType that IEEE 802 sets aside for local experiments.
const MARK: [u8; 22] = *b"\x02vmir\x02\x02vmir\x01\x88\xb5vmirror\0";
/// The shortest frame that Ethernet has.
const SHORTEST: usize = 60;

/// Puts it into the queue of the tap that the socket leads to.
///
/// # Errors
/// Those of `send(2)`; ENOBUFS where the queue is full.
pub fn send(to: &PacketSocket) -> io::Result<()> {
    let mut content = [0; HEADER + SHORTEST];
    content[HEADER..HEADER + MARK.len()].copy_from_slice(&MARK);
    to.send(&content)
}

/// Whether a frame, from its virtio header on, is one.
pub(super) fn is_mark(content: &[u8]) -> bool {
    content.get(HEADER..HEADER + MARK.len()) == Some(&MARK[..])
}
