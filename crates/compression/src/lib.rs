//! Compression of what crosses a link, in pieces of up to a megabyte. Whether it is worth it, and how, is measured all the time: that is
//! for the module `balance` to say.

mod balance;

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use rustix::time::{ClockId, clock_gettime};
use zstd::bulk::{Compressor, Decompressor};

use crate::balance::{Balance, METHODS, Method, Written};

/// What `--compress` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Whatever comes out cheapest, by measurement.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always LZ4.
    Lz4,
    /// Always Zstandard.
    Zstd,
}

/// How a payload is encoded on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    None,
    /// An LZ4 block.
    Lz4,
    /// A Zstandard frame.
    Zstd,
}

/// Payloads below this say nothing and gain nothing: they fit a few packets.
const LEAST: usize = 4096;
/// Zstandard's own default.
const DEFAULT_LEVEL: i32 = 3;

/// A payload that is not what it says it is.
#[derive(Debug, thiserror::Error)]
#[error("a compressed payload does not decode to {expected} bytes")]
pub struct DecodeError {
    /// What its table says.
    pub expected: usize,
}

/// Encodes the payloads of one stream.
pub struct Encoder {
    compression: Compression,
    balance: Balance,
    compressor: Methods,
    /// The methods, by their place, that have been used before.
    warm: [bool; METHODS.len()],
}

/// A write that is under way.
pub struct Writing {
    begin: Duration,
    waits: i64,
}

impl Writing {
    /// A frame is about to be written.
    pub fn begin() -> Writing {
        Writing { begin: cpu_time(), waits: waits() }
    }
}

/// The CPU time of this thread: a sample is so short that to be preempted once would be most of what the clock shows.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// How often this thread has given its CPU up to wait for something. To be preempted does not count.
fn waits() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

impl Encoder {
    /// For one of so many streams.
    pub fn new(compression: Compression, streams: u16) -> Encoder {
        Encoder {
            compression,
            balance: Balance::new(streams),
            compressor: Methods::default(),
            warm: Default::default(),
        }
    }

    /// Whether this payload may be compressed, and so has to be in one piece.
    pub fn wants(&mut self, length: usize) -> Option<Attempt> {
        let fixed = match self.compression {
            _ if length < LEAST => return None,
            Compression::Off => return None,
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd => Method::Zstd(DEFAULT_LEVEL),
            Compression::Auto => {
                let all = self.balance.is_try_due();
                let chosen = METHODS[self.balance.choose()];
                return (all || chosen != Method::None).then_some(Attempt(How::Measured { all }));
            }
        };
        Some(Attempt(How::Fixed(fixed)))
    }

    /// Compresses a payload. None where that would not make it smaller, or is not worth it.
    pub fn encode(&mut self, attempt: &Attempt, payload: &[u8]) -> Option<(Encoding, &[u8])> {
        let method = match attempt.0 {
            How::Fixed(method) => method,
            How::Measured { all } => {
                if all {
                    self.try_all(payload);
                }
                METHODS[self.balance.choose()]
            }
        };
        let (encoding, length) = self.compressor.compress(method, payload)?;
        (length < payload.len()).then(|| (encoding, &self.compressor.output[..length]))
    }

    fn try_all(&mut self, payload: &[u8]) {
        for (place, &method) in METHODS.iter().enumerate().skip(1) {
            if self.balance.may_pay(place) {
                if !self.warm[place] {
                    // The first time costs several times as much: the tables are touched for the first time.
                    self.compressor.compress(method, payload);
                    self.warm[place] = true;
                }
                let begin = cpu_time();
                if let Some((_, length)) = self.compressor.compress(method, payload) {
                    self.balance.tried(place, payload.len(), length, cpu_time().saturating_sub(begin));
                }
            }
        }
    }

    /// It was written: so many bytes, and so many by all streams so far.
    pub fn written(&mut self, writing: Writing, bytes: u64, by_all: u64) {
        let took = cpu_time().saturating_sub(writing.begin);
        let waited = waits() > writing.waits;
        self.balance.written(Written { bytes, by_all, took, waited, at: Instant::now() });
    }

    /// Nothing is written for a while.
    pub fn rest(&mut self) {
        self.balance.rest();
    }
}

/// What is to be done with a payload.
#[derive(Debug, Clone, Copy)]
pub struct Attempt(How);

#[derive(Debug, Clone, Copy)]
enum How {
    /// What was ordered.
    Fixed(Method),
    /// What measurement says; perhaps after all methods were tried on it.
    Measured { all: bool },
}

/// The compressors of one stream, and the room for what they make.
#[derive(Default)]
struct Methods {
    zstd: Option<(i32, Compressor<'static>)>,
    output: Vec<u8>,
}

impl Methods {
    /// Compresses into `output`. Returns how long it came out. None where it cannot be done.
    fn compress(&mut self, method: Method, input: &[u8]) -> Option<(Encoding, usize)> {
        match method {
            Method::None => None,
            Method::Lz4 => {
                self.output.resize(lz4_flex::block::get_maximum_output_size(input.len()), 0);
                Some((Encoding::Lz4, lz4_flex::block::compress_into(input, &mut self.output).ok()?))
            }
            Method::Zstd(level) => {
                self.output.resize(zstd::zstd_safe::compress_bound(input.len()), 0);
                let zstd = match &mut self.zstd {
                    Some((at, zstd)) => {
                        if *at != level {
                            zstd.set_compression_level(level).ok()?;
                            *at = level;
                        }
                        zstd
                    }
                    none => &mut none.insert((level, Compressor::new(level).ok()?)).1,
                };
                Some((Encoding::Zstd, zstd.compress_to_buffer(input, &mut self.output[..]).ok()?))
            }
        }
    }
}

/// Decodes the payloads of one stream.
#[derive(Default)]
pub struct Decoder {
    zstd: Option<Decompressor<'static>>,
}

impl Decoder {
    /// Decodes a payload into `out`, which then has exactly as many bytes as its table says.
    pub fn decode(
        &mut self,
        encoding: Encoding,
        payload: &[u8],
        expected: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        out.resize(expected, 0);
        let error = DecodeError { expected };
        let decoded = match encoding {
            Encoding::None => {
                if payload.len() == expected {
                    out.copy_from_slice(payload);
                }
                Some(payload.len())
            }
            Encoding::Lz4 => lz4_flex::block::decompress_into(payload, out).ok(),
            Encoding::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Decompressor::new().map_err(|_| DecodeError { expected })?),
                };
                zstd.decompress_to_buffer(payload, &mut out[..]).ok()
            }
        };
        if decoded == Some(expected) { Ok(()) } else { Err(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(
            words in prop::collection::vec(0u16..9, 3000..9000),
            compression in prop_oneof![Just(Compression::Lz4), Just(Compression::Zstd)],
        ) {
            let payload: Vec<u8> = words.into_iter().flat_map(u16::to_le_bytes).collect();
            let mut encoder = Encoder::new(compression, 1);
            let attempt = encoder.wants(payload.len()).unwrap();
            let (encoding, encoded) = encoder.encode(&attempt, &payload).unwrap();
            prop_assert!(encoded.len() < payload.len());
            let (mut decoder, mut out) = (Decoder::default(), Vec::new());
            decoder.decode(encoding, encoded, payload.len(), &mut out).unwrap();
            prop_assert_eq!(&out, &payload);
            for wrong in [payload.len() - 1, payload.len() + 1] {
                prop_assert!(decoder.decode(encoding, encoded, wrong, &mut out).is_err());
            }
        }

        #[test]
        fn no_bytes_of_a_peer_decode_to_more_than_announced(
            bytes in prop::collection::vec(any::<u8>(), 0..500), expected in 0usize..9000,
        ) {
            for encoding in [Encoding::None, Encoding::Lz4, Encoding::Zstd] {
                let mut out = Vec::new();
                let decoded = Decoder::default().decode(encoding, &bytes, expected, &mut out);
                prop_assert!(out.len() == expected || decoded.is_err());
            }
        }
    }

    #[test]
    fn small_payloads_and_those_told_not_to_are_left_alone() {
        assert!(Encoder::new(Compression::Zstd, 1).wants(LEAST - 1).is_none());
        assert!(Encoder::new(Compression::Off, 1).wants(1 << 20).is_none());
    }
}
