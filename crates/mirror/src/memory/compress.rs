//! Compression of a frame's payload, and whether it is worth it.
//!
//! A worker does one thing after the other: it compresses, then it writes. What a byte of guest memory costs is the sum
//! of both, and both are measured all the time: how fast each encoding is and how much it leaves, and how fast the
//! stream takes bytes. Whichever comes out cheapest is used. So nothing is compressed while the CPU is what limits, and
//! the slower the link the more work is put into saving it.

use std::time::{Duration, Instant};

use zstd::bulk::{Compressor, Decompressor};

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

/// An encoding and how hard it tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    None,
    Lz4,
    /// With this level.
    Zstd(i32),
}

/// What there is to choose from, the least work first.
const METHODS: [Method; 4] = [Method::None, Method::Lz4, Method::Zstd(1), Method::Zstd(6)];
/// Every how many frames a method that is not in use is tried, to learn what it would cost.
const TRY_EVERY: u32 = 24;
/// Payloads below this say nothing and gain nothing: they fit a few packets.
const LEAST: usize = 4096;
/// What is new counts so much against what was measured before.
const NEW: f64 = 0.25;
/// Something must be cheaper by this to be worth the CPU time that the guest might want.
const WORTH: f64 = 0.9;

/// A payload that is not what it says it is.
#[derive(Debug, thiserror::Error)]
#[error("a compressed payload does not decode to {expected} bytes")]
pub struct DecodeError {
    /// What its table says.
    pub expected: usize,
}

/// Nanoseconds per byte, as measured lately.
#[derive(Debug, Clone, Copy, Default)]
struct Pace(Option<f64>);

impl Pace {
    fn learn(&mut self, now: f64) {
        self.0 = Some(self.0.map_or(now, |before| before + NEW * (now - before)));
    }
}

/// What a method is known to do.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// Time per byte that goes in, in nanoseconds.
    work: Pace,
    /// Bytes that come out per byte that goes in.
    left: Pace,
}

/// Chooses a method by measurement.
#[derive(Debug, Default)]
struct Balance {
    known: [Known; METHODS.len()],
    /// Time per byte on the wire, in nanoseconds.
    link: Pace,
    frames: u32,
    next_try: usize,
}

impl Balance {
    /// The index of the method for the next frame.
    fn choose(&mut self) -> usize {
        self.frames = self.frames.wrapping_add(1);
        if self.frames.is_multiple_of(TRY_EVERY) {
            self.next_try = self.next_try % (METHODS.len() - 1) + 1;
            if self.may_pay(self.next_try) {
                return self.next_try;
            }
        }
        let plain = self.cost(0).unwrap_or(0.0);
        let cheapest = (1..METHODS.len())
            .filter_map(|method| Some((method, self.cost(method)?)))
            .min_by(|(_, one), (_, other)| one.total_cmp(other));
        match cheapest {
            Some((method, cost)) if cost < plain * WORTH => method,
            _ => 0,
        }
    }

    /// Whether a method could be worth it at all: one that takes longer to work than the link takes to carry is not.
    fn may_pay(&self, method: usize) -> bool {
        let Some(link) = self.link.0 else { return false };
        self.known[method].work.0.is_none_or(|work| work < link)
    }

    /// What a byte of memory costs with a method, in nanoseconds.
    fn cost(&self, method: usize) -> Option<f64> {
        let known = &self.known[method];
        let link = self.link.0?;
        if method == 0 { Some(link) } else { Some(known.work.0? + known.left.0? * link) }
    }

    fn worked(&mut self, method: usize, input: usize, output: usize, time: Duration) {
        self.known[method].work.learn(time.as_secs_f64() * 1e9 / input as f64);
        self.known[method].left.learn(output as f64 / input as f64);
    }

    fn written(&mut self, bytes: u64, time: Duration) {
        self.link.learn(time.as_secs_f64() * 1e9 / bytes as f64);
    }
}

/// Encodes the payloads of one stream.
pub(super) struct Encoder {
    compression: Compression,
    balance: Balance,
    zstd: Option<(i32, Compressor<'static>)>,
    output: Vec<u8>,
    written: (u64, Duration),
}

/// The stream is judged by so many bytes at least: less may only have gone into a buffer.
const TELLING_BYTES: u64 = 1 << 20;

impl Encoder {
    pub(super) fn new(compression: Compression) -> Encoder {
        Encoder {
            compression,
            balance: Balance::default(),
            zstd: None,
            output: Vec::new(),
            written: (0, Duration::ZERO),
        }
    }

    /// Whether this payload will be compressed, and so has to be in one piece.
    pub(super) fn wants(&mut self, length: usize) -> Option<Attempt> {
        let method = match self.compression {
            _ if length < LEAST => 0,
            Compression::Off => 0,
            Compression::Lz4 => 1,
            Compression::Zstd => 2,
            Compression::Auto => self.balance.choose(),
        };
        (method != 0).then_some(Attempt(method))
    }

    /// Compresses a payload. None where that would not make it smaller.
    pub(super) fn encode(&mut self, attempt: &Attempt, payload: &[u8]) -> Option<(Encoding, &[u8])> {
        let begin = Instant::now();
        let (encoding, length) = match METHODS[attempt.0] {
            Method::None => return None,
            Method::Lz4 => {
                self.output.resize(lz4_flex::block::get_maximum_output_size(payload.len()), 0);
                (Encoding::Lz4, lz4_flex::block::compress_into(payload, &mut self.output).ok()?)
            }
            Method::Zstd(level) => {
                self.output.resize(zstd::zstd_safe::compress_bound(payload.len()), 0);
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
                (Encoding::Zstd, zstd.compress_to_buffer(payload, &mut self.output[..]).ok()?)
            }
        };
        self.balance.worked(attempt.0, payload.len(), length, begin.elapsed());
        (length < payload.len()).then(|| (encoding, &self.output[..length]))
    }

    /// Takes in how long a frame took to write.
    pub(super) fn written(&mut self, bytes: u64, time: Duration) {
        self.written.0 += bytes;
        self.written.1 += time;
        if self.written.0 >= TELLING_BYTES {
            self.balance.written(self.written.0, self.written.1);
            self.written = (0, Duration::ZERO);
        }
    }
}

/// A method that was chosen for a payload.
pub(super) struct Attempt(usize);

/// Decodes the payloads of one stream.
#[derive(Default)]
pub(super) struct Decoder {
    zstd: Option<Decompressor<'static>>,
}

impl Decoder {
    /// Decodes a payload into `out`, which then has exactly as many bytes as its table says.
    pub(super) fn decode(
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

    /// Which method is settled on where the link and the methods have these paces, in nanoseconds per byte.
    fn settled(link: f64, work: [f64; 4], left: [f64; 4]) -> Method {
        let mut balance = Balance::default();
        let nanos = |each: f64, bytes: f64| Duration::from_nanos((each * bytes) as u64);
        for _ in 0..500 {
            let method = balance.choose();
            let bytes = f64::from(1 << 20) * left[method];
            if method != 0 {
                balance.worked(method, 1 << 20, bytes as usize, nanos(work[method], f64::from(1 << 20)));
            }
            balance.written(bytes as u64, nanos(link, bytes));
        }
        balance.frames = 0;
        METHODS[balance.choose()]
    }

    #[test]
    fn the_slower_the_link_the_more_is_compressed() {
        let work = [0.0, 1.5, 3.5, 12.0];
        let left = [1.0, 0.5, 0.35, 0.3];
        assert_eq!(settled(0.8, work, left), Method::None, "10 Gbit/s");
        assert_eq!(settled(8.0, work, left), Method::Lz4, "1 Gbit/s");
        assert_eq!(settled(80.0, work, left), Method::Zstd(1), "100 Mbit/s");
        assert_eq!(settled(800.0, work, left), Method::Zstd(6), "10 Mbit/s");
    }

    #[test]
    fn what_does_not_get_smaller_is_left_alone() {
        assert_eq!(settled(80.0, [0.0, 1.5, 3.5, 12.0], [1.0; 4]), Method::None);
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(
            words in prop::collection::vec(0u16..9, 3000..9000),
            compression in prop_oneof![Just(Compression::Lz4), Just(Compression::Zstd)],
        ) {
            let payload: Vec<u8> = words.into_iter().flat_map(u16::to_le_bytes).collect();
            let mut encoder = Encoder::new(compression);
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
        assert!(Encoder::new(Compression::Zstd).wants(LEAST - 1).is_none());
        assert!(Encoder::new(Compression::Off).wants(1 << 20).is_none());
        assert!(Encoder::new(Compression::Auto).wants(1 << 20).is_none(), "nothing is known yet");
    }
}
