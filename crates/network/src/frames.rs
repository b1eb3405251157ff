//! Frames on their way: which interface each belongs to, and how they travel on a stream of their own.
//!
//! ```text
//!   interface u8 │ length u32, little-endian │ struct virtio_net_hdr, 10 bytes │ the frame from its Ethernet header on │ …
//! ```
//!
//! The header (linux/virtio_net.h) says what a card has yet to do: make a checksum, cut what is larger than a frame. Length 0 says that
//! the network has turned.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use super::mac::Mac;

/// Bytes of `struct virtio_net_hdr`.
pub(super) const HEADER: usize = 10;
/// The longest frame: the largest MTU of a tap, its Ethernet header and two VLAN tags, and what precedes it.
pub const LONGEST: usize = HEADER + 65_535 + 14 + 8;
/// Where the sender's address is in an Ethernet header.
const SENDER: std::ops::Range<usize> = HEADER + 6..HEADER + 12;

/// A frame for a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// By its place among the machine's interfaces.
    pub(super) interface: u8,
    /// From its virtio header on.
    pub(super) content: Vec<u8>,
}

impl Frame {
    /// Says that what comes for the guest at the source has come: whatever is sent later reaches it at the destination.
    pub(super) fn turned(interface: u8) -> Frame {
        Frame { interface, content: Vec::new() }
    }

    pub(super) fn is_turned(&self) -> bool {
        self.content.is_empty()
    }

    /// Whether everybody in the network is to have it.
    pub(super) fn is_for_many(&self) -> bool {
        self.content.get(HEADER).is_some_and(|first| first & 1 == 1)
    }

    /// Whether it is for this address alone.
    pub(super) fn is_to(&self, mac: Mac) -> bool {
        self.content.get(HEADER..HEADER + 6) == Some(&mac.bytes()[..])
    }

    /// Whether it says to be from there.
    pub(super) fn is_from(&self, mac: Mac) -> bool {
        self.content.get(SENDER) == Some(&mac.bytes()[..])
    }

    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.content.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        to.write_all(&[self.interface])?;
        to.write_all(&length.to_le_bytes())?;
        to.write_all(&self.content)
    }

    /// The next one; none at the end of the stream.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
        let mut interface = [0];
        if from.read(&mut interface)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            let why = format!("a frame of {length} bytes, of at most {LONGEST}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let mut content = vec![0; length];
        from.read_exact(&mut content)?;
        Ok(Some(Frame { interface: interface[0], content }))
    }
}

/// Frames that wait, in order, as many as there is room for.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    frames: VecDeque<Frame>,
    bytes: usize,
    dropped: u64,
}

impl Backlog {
    /// Room for the frames of a second at 200 Mbit/s: a guest that is paused for longer has lost its connections for other reasons.
    const ROOM: usize = 32 << 20;
    /// A short frame takes room as well.
    const OVERHEAD: usize = 64;

    /// One more waits, or is dropped and counted.
    pub(super) fn push(&mut self, frame: Frame) {
        let bytes = frame.content.len() + Self::OVERHEAD;
        if self.bytes + bytes > Self::ROOM {
            self.dropped += 1;
            return;
        }
        self.bytes += bytes;
        self.frames.push_back(frame);
    }

    /// What waits already comes after these.
    pub(super) fn precede(&mut self, frames: Vec<Frame>) {
        let later = std::mem::take(&mut self.frames);
        self.bytes = 0;
        frames.into_iter().chain(later).for_each(|frame| self.push(frame));
    }

    /// All that waits, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Frame> {
        self.frames.iter()
    }

    /// The one that has waited longest.
    pub(super) fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.content.len() + Self::OVERHEAD;
        Some(frame)
    }

    /// How many there was no room for.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_come_as_they_were_sent(
            sent in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..200)), 0..20)
        ) {
            let frames: Vec<Frame> =
                sent.into_iter().map(|(interface, content)| Frame { interface, content }).collect();
            let mut stream = Vec::new();
            frames.iter().for_each(|frame| frame.write(&mut stream).unwrap());
            let mut rest = stream.as_slice();
            for frame in frames {
                prop_assert_eq!(Frame::read(&mut rest).unwrap(), Some(frame));
            }
            prop_assert_eq!(Frame::read(&mut rest).unwrap(), None);
        }

        #[test]
        fn arbitrary_bytes_are_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = bytes.as_slice();
            while let Ok(Some(_)) = Frame::read(&mut rest) {}
        }
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let mut backlog = Backlog::default();
        let frame = |interface| Frame { interface, content: vec![0; 60_000] };
        for interface in 0..=255 {
            (0..3).for_each(|_| backlog.push(frame(interface)));
        }
        let mut kept = 0;
        while backlog.pop().is_some() {
            kept += 1;
        }
        assert!(kept > 500 && kept + backlog.dropped() == 768, "{kept}, {}", backlog.dropped());
        backlog.push(frame(1));
        assert_eq!(backlog.pop(), Some(frame(1)), "there is room again");
    }
}
