//! Frames, written to one stream of the source.

use std::io::{self, Write};
use std::sync::Arc;

use compression::{Compression, Encoder, Encoding, Writing};

use super::codec::{self, Absent, Entry};
use super::round::Flow;
use super::source_error::SourceError;
use crate::storage::codec as disks;

/// Writes frames to one stream: compressed where that is worth it, counted in any case.
pub(crate) struct FrameWriter<W> {
    stream: u16,
    sink: W,
    encoder: Encoder,
    head: Vec<u8>,
    /// A payload that is to be compressed, in one piece.
    joined: Vec<u8>,
    flow: Arc<Flow>,
}

impl<W: Write> FrameWriter<W> {
    /// For one of so many streams.
    pub(crate) fn new(
        (stream, streams): (u16, u16),
        sink: W,
        compression: Compression,
        flow: Arc<Flow>,
    ) -> FrameWriter<W> {
        FrameWriter {
            stream,
            sink,
            encoder: Encoder::new(compression, streams),
            head: Vec::new(),
            joined: Vec::new(),
            flow,
        }
    }

    /// So many bytes of guest memory were looked at.
    pub(crate) fn looked_at(&self, bytes: u64) {
        self.flow.add(bytes, 0);
    }

    /// Writes entries, and the pieces of their payload. Returns how many bytes that took.
    pub(crate) fn pages<'a>(
        &mut self,
        round: u32,
        entries: &[Entry],
        payload: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<u64, SourceError> {
        let head = |out: &mut Vec<u8>, encoding, length| {
            codec::encode_pages(out, round, entries, encoding, length);
        };
        let written = self.frame(codec::payload_of(entries), payload, head)?;
        self.flow.add(0, written);
        Ok(written)
    }

    /// Writes blocks of disks, and the pieces of their payload. Returns how many bytes that took.
    pub(crate) fn blocks<'a>(
        &mut self,
        entries: &[disks::Entry],
        payload: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<u64, SourceError> {
        let head = |out: &mut Vec<u8>, encoding, length| disks::encode_blocks(out, entries, encoding, length);
        let written = self.frame(entries.iter().map(disks::Entry::payload).sum(), payload, head)?;
        self.flow.add_disk(written);
        Ok(written)
    }

    /// Asks for stable storage. Returns how many bytes that took.
    pub(crate) fn sync(&mut self) -> Result<u64, SourceError> {
        self.head.clear();
        disks::encode_sync(&mut self.head);
        let written = codec::write_frame(&mut self.sink, &self.head, std::iter::empty());
        let written = self.sound(written)?;
        self.flow.add_disk(written);
        Ok(written)
    }

    /// Writes a frame whose payload has so many bytes in these pieces, compressed where that is worth it.
    fn frame<'a>(
        &mut self,
        length: usize,
        payload: impl Iterator<Item = &'a [u8]> + Clone,
        head: impl Fn(&mut Vec<u8>, Encoding, usize),
    ) -> Result<u64, SourceError> {
        let encoded = self.encoder.wants(length).and_then(|attempt| {
            self.joined.clear();
            payload.clone().for_each(|piece| self.joined.extend_from_slice(piece));
            self.encoder.encode(&attempt, &self.joined)
        });
        self.head.clear();
        let writing = Writing::begin();
        let written = match encoded {
            Some((encoding, encoded)) => {
                head(&mut self.head, encoding, encoded.len());
                codec::write_frame(&mut self.sink, &self.head, std::iter::once(encoded))
            }
            None => {
                head(&mut self.head, Encoding::None, length);
                codec::write_frame(&mut self.sink, &self.head, payload)
            }
        };
        let written = self.sound(written)?;
        self.encoder.written(writing, written, self.flow.all_bytes() + written);
        Ok(written)
    }

    /// Writes which pages the destination is to be without. Returns how many bytes that took.
    pub(crate) fn absent(&mut self, round: u32, chunks: &[Absent]) -> Result<u64, SourceError> {
        self.head.clear();
        codec::encode_absent(&mut self.head, round, chunks);
        let written = codec::write_frame(&mut self.sink, &self.head, std::iter::empty());
        self.counted(written)
    }

    /// Writes a barrier, and sees that everything leaves. Returns how many bytes that took.
    pub(crate) fn barrier(&mut self, number: u32) -> Result<u64, SourceError> {
        self.head.clear();
        codec::encode_barrier(&mut self.head, number);
        let written = codec::write_frame(&mut self.sink, &self.head, std::iter::empty());
        let written = self.counted(written)?;
        self.flush()?;
        self.encoder.rest();
        Ok(written)
    }

    /// Sees that everything written so far leaves.
    pub(crate) fn flush(&mut self) -> Result<(), SourceError> {
        let stream = self.stream;
        self.sink.flush().map_err(|source| SourceError::Stream { stream, source })
    }

    fn counted(&self, written: io::Result<u64>) -> Result<u64, SourceError> {
        let written = self.sound(written)?;
        self.flow.add(0, written);
        Ok(written)
    }

    fn sound(&self, written: io::Result<u64>) -> Result<u64, SourceError> {
        let stream = self.stream;
        written.map_err(|source| SourceError::Stream { stream, source })
    }
}
