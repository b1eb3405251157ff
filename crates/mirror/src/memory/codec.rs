//! The frames of a data stream.
//!
//! A frame is a header, a table and a payload, all integers little-endian:
//!
//! ```text
//!  header, 16 bytes   kind u8 · encoding u8 · reserved u16 (0) · entries u32 · payload u32 · number u32
//!  table              entries × 24 bytes: what u64 (class 8 bits, length 16, page index 40, from the top) · value u128
//!  payload            the plain pages, deltas and names of twins of the table, in its order, encoded as a whole
//! ```
//!
//! | kind | meaning | `number` | table and payload |
//! | --- | --- | --- | --- |
//! | 0 | invalid | | |
//! | 1 | pages | the round | as below |
//! | 2 | barrier | the barrier | none |
//! | 3 | absent | the round | for each of `entries` chunks 72 bytes: first page u64 · a bit for each page, 64 bytes |
//! | 4, 5 | of disks | | see [there](crate::storage::codec) |
//!
//! The pages of an *absent* frame are ones that the destination is to be without: a switch-over with post-copy begins
//! before they are there.
//!
//! | class | meaning | length | value | payload |
//! | --- | --- | --- | --- | --- |
//! | 0 | invalid | | | |
//! | 1 | zero run | 0 | how many pages | none |
//! | 2 | plain page | 0 | the content hash | 4096 bytes |
//! | 3 | delta | of the delta | the content hash that results | the [delta](super::delta) |
//! | 4 | duplicate | 0 | the content hash | the index u64 of a page of this stream that holds this content already |
//!
//! | encoding | of the payload |
//! | --- | --- |
//! | 0 | as it is |
//! | 1 | one LZ4 block |
//! | 2 | one Zstandard frame |
//!
//! Every count is held against its limit before anything is allocated or read for it.

use std::io::{self, Read, Write};

use compression::Encoding;

use super::delta::MAX_DELTA;
use crate::hash::ContentHash;
use crate::layout::{CHUNK_PAGES, Layout, PAGE_SIZE, PageIndex};
use crate::row::{ROW_LENGTH, Row};

/// Bytes of a frame's header.
pub const HEADER_LENGTH: usize = 16;
/// Most plain pages and deltas of a frame: 1 MiB.
pub const MAX_PLAIN: usize = 256;
/// Most entries of a frame.
pub const MAX_ENTRIES: usize = 4096;
/// Bytes in which a chunk's absent pages are told.
const ABSENT_LENGTH: usize = 72;
/// Most chunks of an absent frame.
pub const MAX_ABSENT: usize = 1024;

const KIND_PAGES: u8 = 1;
const KIND_BARRIER: u8 = 2;
const KIND_ABSENT: u8 = 3;
pub(crate) const KIND_BLOCKS: u8 = 4;
pub(crate) const KIND_SYNC: u8 = 5;
const ENCODINGS: [Encoding; 3] = [Encoding::None, Encoding::Lz4, Encoding::Zstd];
const CLASS_ZERO: u8 = 1;
const CLASS_PLAIN: u8 = 2;
const CLASS_DELTA: u8 = 3;
const CLASS_DUPLICATE: u8 = 4;
/// Bytes of the payload that name a twin.
pub const TWIN_LENGTH: usize = 8;

/// What a frame says about one page, or one run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// So many pages, beginning here, are zero.
    Zero {
        /// The first.
        page: PageIndex,
        /// How many; never more than a chunk holds.
        count: u64,
    },
    /// The page's content is in the payload.
    Plain {
        /// The page.
        page: PageIndex,
        /// The hash of its content.
        hash: ContentHash,
    },
    /// What the page has become, given what it was, is in the payload.
    Delta {
        /// The page.
        page: PageIndex,
        /// The hash of the content that results.
        hash: ContentHash,
        /// Length of the delta in bytes.
        length: u16,
    },
    /// The page holds what another one holds, which the payload names.
    Duplicate {
        /// The page.
        page: PageIndex,
        /// The hash of its content.
        hash: ContentHash,
    },
}

impl Entry {
    /// Bytes of the payload, before it is encoded as a whole.
    fn payload(&self) -> usize {
        match self {
            Entry::Zero { .. } => 0,
            Entry::Plain { .. } => PAGE_SIZE,
            Entry::Delta { length, .. } => usize::from(*length),
            Entry::Duplicate { .. } => TWIN_LENGTH,
        }
    }
}

/// The pages of one chunk that the destination is to be without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Absent {
    /// The chunk's first page.
    pub first: PageIndex,
    /// A bit for each page of the chunk.
    pub pages: [u64; (CHUNK_PAGES / 64) as usize],
}

impl Absent {
    /// The runs of absent pages.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        let is_absent = |at: u64| self.pages[(at / 64) as usize] & (1 << (at % 64)) != 0;
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (at..CHUNK_PAGES).find(|&at| is_absent(at))?;
            let end = (start..CHUNK_PAGES).find(|&at| !is_absent(at)).unwrap_or(CHUNK_PAGES);
            at = end;
            Some(self.first.0 + start..self.first.0 + end)
        })
    }
}

/// A frame's header, as far as it is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// Pages follow.
    Pages {
        /// The round they belong to.
        round: u32,
        /// Entries of the table.
        entries: usize,
        /// How the payload is encoded.
        encoding: Encoding,
        /// Bytes of the payload, as encoded.
        payload: usize,
    },
    /// Everything before this is to be applied before it is acknowledged.
    Barrier(u32),
    /// Pages that the destination is to be without.
    Absent {
        /// The round they belong to.
        round: u32,
        /// How many chunks are told of.
        chunks: usize,
    },
    /// Blocks of disks follow.
    Blocks {
        /// Entries of the table.
        entries: usize,
        /// How the payload is encoded.
        encoding: Encoding,
        /// Bytes of the payload, as encoded.
        payload: usize,
    },
    /// What came before of disks is to be put on stable storage soon.
    Sync,
}

/// A frame that breaks the protocol.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// Not a kind of frame.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// Not a known way to encode a payload.
    #[error("payload of unknown encoding {0}")]
    Encoding(u8),
    /// Bytes that must be zero.
    #[error("reserved bytes of a frame are {0:#x}")]
    Reserved(u16),
    /// A count above its limit.
    #[error("frame of {entries} entries and {payload} bytes of payload")]
    Length {
        /// Entries announced.
        entries: u32,
        /// Payload announced.
        payload: u32,
    },
    /// Not a kind of entry.
    #[error("entry of unknown class {0}")]
    Class(u8),
    /// Pages that are not RAM, or do not belong to this stream.
    #[error("{count} pages from {page} are not this stream's")]
    Pages {
        /// The first.
        page: u64,
        /// How many.
        count: u128,
    },
    /// Table and payload disagree.
    #[error("a table of {described} bytes of payload, of which {payload} come")]
    Payload {
        /// What the table describes.
        described: usize,
        /// Bytes of the payload.
        payload: usize,
    },
    /// A delta longer than one may be.
    #[error("a delta of {0} bytes")]
    Delta(usize),
}

/// Appends a pages frame's header and table to `out`. The payload, of so many bytes, is to follow on the stream.
pub fn encode_pages(out: &mut Vec<u8>, round: u32, entries: &[Entry], encoding: Encoding, payload: usize) {
    let bounded = |n: usize| u32::try_from(n).expect("a frame is bounded");
    debug_assert!(payload <= MAX_PLAIN * PAGE_SIZE && entries.len() <= MAX_ENTRIES);
    header(out, KIND_PAGES, encoding, bounded(entries.len()), bounded(payload), round);
    for entry in entries {
        let (class, page, detail, value) = match *entry {
            Entry::Zero { page, count } => (CLASS_ZERO, page, 0, u128::from(count)),
            Entry::Plain { page, hash } => (CLASS_PLAIN, page, 0, hash.bits()),
            Entry::Delta { page, hash, length } => (CLASS_DELTA, page, length, hash.bits()),
            Entry::Duplicate { page, hash } => (CLASS_DUPLICATE, page, 0, hash.bits()),
        };
        Row { class, detail, index: page.0, value }.put(out);
    }
}

/// Bytes of the payload that a table describes, before it is encoded as a whole.
#[must_use]
pub fn payload_of(entries: &[Entry]) -> usize {
    entries.iter().map(Entry::payload).sum()
}

/// Appends a barrier frame to `out`.
pub fn encode_barrier(out: &mut Vec<u8>, barrier: u32) {
    header(out, KIND_BARRIER, Encoding::None, 0, 0, barrier);
}

/// Appends an absent frame to `out`.
pub fn encode_absent(out: &mut Vec<u8>, round: u32, chunks: &[Absent]) {
    debug_assert!(chunks.len() <= MAX_ABSENT);
    let count = u32::try_from(chunks.len()).expect("a frame is bounded");
    header(out, KIND_ABSENT, Encoding::None, count, 0, round);
    for chunk in chunks {
        out.extend_from_slice(&chunk.first.0.to_le_bytes());
        chunk.pages.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    }
}

/// Reads the chunks of an absent frame, and checks that their pages are RAM of this stream.
///
/// # Errors
/// Those of the reader; [`FrameError`] for the first chunk that is wrong, as its inner value.
pub fn read_absent(
    reader: &mut impl Read,
    chunks: usize,
    layout: &Layout,
    stream: u16,
) -> io::Result<Result<Vec<Absent>, FrameError>> {
    let mut bytes = vec![0; chunks * ABSENT_LENGTH];
    reader.read_exact(&mut bytes)?;
    Ok(bytes.chunks_exact(ABSENT_LENGTH).map(|bytes| decode_absent(bytes, layout, stream)).collect())
}

fn decode_absent(bytes: &[u8], layout: &Layout, stream: u16) -> Result<Absent, FrameError> {
    let word = |n: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[n * 8 + i]));
    let absent = Absent { first: PageIndex(word(0)), pages: std::array::from_fn(|n| word(n + 1)) };
    // Before its runs are looked at: those of a chunk beyond all pages would go beyond all numbers.
    let is_chunk = absent.first.0 < layout.end() && absent.first.0.is_multiple_of(CHUNK_PAGES);
    if !is_chunk || layout.stream_of(absent.first) != stream {
        return Err(FrameError::Pages { page: absent.first.0, count: CHUNK_PAGES.into() });
    }
    let last = absent.runs().last();
    let in_ram = |run: &std::ops::Range<u64>| layout.in_one_chunk(absent.first, run.end - absent.first.0);
    if last.as_ref().is_none_or(in_ram) {
        Ok(absent)
    } else {
        Err(FrameError::Pages { page: absent.first.0, count: CHUNK_PAGES.into() })
    }
}

/// Appends a header to `out`.
pub(crate) fn header(
    out: &mut Vec<u8>,
    kind: u8,
    encoding: Encoding,
    entries: u32,
    payload: u32,
    number: u32,
) {
    out.extend_from_slice(&[kind, encoding as u8, 0, 0]);
    for field in [entries, payload, number] {
        out.extend_from_slice(&field.to_le_bytes());
    }
}

/// Understands a header.
///
/// # Errors
/// [`FrameError`] when it is none, or announces more than a frame may hold.
pub fn decode_header(bytes: &[u8; HEADER_LENGTH]) -> Result<Header, FrameError> {
    let [kind, encoding, r0, r1, rest @ ..] = *bytes;
    let field = |n: usize| u32::from_le_bytes(std::array::from_fn(|i| rest[n * 4 + i]));
    let (entries, payload, number) = (field(0), field(1), field(2));
    let encoding = *ENCODINGS.get(usize::from(encoding)).ok_or(FrameError::Encoding(encoding))?;
    match u16::from_le_bytes([r0, r1]) {
        0 => {}
        reserved => return Err(FrameError::Reserved(reserved)),
    }
    let too_long = FrameError::Length { entries, payload };
    match kind {
        KIND_PAGES | KIND_BLOCKS
            if entries as usize > MAX_ENTRIES || payload as usize > MAX_PLAIN * PAGE_SIZE =>
        {
            Err(too_long)
        }
        KIND_PAGES => {
            let (entries, payload) = (entries as usize, payload as usize);
            Ok(Header::Pages { round: number, entries, encoding, payload })
        }
        KIND_BLOCKS => {
            let (entries, payload) = (entries as usize, payload as usize);
            Ok(Header::Blocks { entries, encoding, payload })
        }
        KIND_SYNC if entries != 0 || payload != 0 => Err(too_long),
        KIND_SYNC => Ok(Header::Sync),
        KIND_ABSENT if payload != 0 || entries as usize > MAX_ABSENT => Err(too_long),
        KIND_ABSENT => Ok(Header::Absent { round: number, chunks: entries as usize }),
        KIND_BARRIER if entries != 0 || payload != 0 => Err(too_long),
        KIND_BARRIER => Ok(Header::Barrier(number)),
        kind => Err(FrameError::Kind(kind)),
    }
}

/// Understands a table, and checks that its pages are RAM, of this stream where one is given. Returns the bytes of payload that it
/// describes, at most 1 MiB.
///
/// # Errors
/// [`FrameError`] for the first entry that is wrong.
pub fn decode_table(
    bytes: &[u8],
    layout: &Layout,
    stream: Option<u16>,
    entries: &mut Vec<Entry>,
) -> Result<usize, FrameError> {
    entries.clear();
    let mut described = 0;
    for Row { class, detail: length, index, value } in Row::all(bytes) {
        let (page, hash) = (PageIndex(index), ContentHash::from_bits(value));
        let (entry, count) = match class {
            CLASS_ZERO => {
                let count = u64::try_from(value).ok().filter(|&count| count <= CHUNK_PAGES);
                (Entry::Zero { page, count: count.unwrap_or(0) }, count.unwrap_or(0))
            }
            CLASS_PLAIN => (Entry::Plain { page, hash }, 1),
            CLASS_DELTA if usize::from(length) > MAX_DELTA => {
                return Err(FrameError::Delta(usize::from(length)));
            }
            CLASS_DELTA => (Entry::Delta { page, hash, length }, 1),
            CLASS_DUPLICATE => (Entry::Duplicate { page, hash }, 1),
            class => return Err(FrameError::Class(class)),
        };
        let foreign = || stream.is_some_and(|stream| layout.stream_of(page) != stream);
        if !layout.in_one_chunk(page, count) || foreign() {
            return Err(FrameError::Pages { page: page.0, count: value });
        }
        described += entry.payload();
        if described > MAX_PLAIN * PAGE_SIZE {
            return Err(FrameError::Payload { described, payload: MAX_PLAIN * PAGE_SIZE });
        }
        entries.push(entry);
    }
    Ok(described)
}

/// Reads a header. `None` at the stream's orderly end.
///
/// # Errors
/// Those of the reader.
pub fn read_header(reader: &mut impl Read) -> io::Result<Option<[u8; HEADER_LENGTH]>> {
    let mut bytes = [0; HEADER_LENGTH];
    let mut filled = 0;
    while filled < bytes.len() {
        match reader.read(&mut bytes[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Some(bytes))
}

/// Reads a frame's table and payload into buffers that are reused from frame to frame.
///
/// # Errors
/// Those of the reader.
pub fn read_body(
    reader: &mut impl Read,
    entries: usize,
    payload: usize,
    table: &mut Vec<u8>,
    pages: &mut Vec<u8>,
) -> io::Result<()> {
    table.resize(entries * ROW_LENGTH, 0);
    reader.read_exact(table)?;
    pages.resize(payload, 0);
    reader.read_exact(pages)
}

/// Writes a frame: its head as encoded, then the payload's parts.
///
/// # Errors
/// Those of the writer.
pub fn write_frame<'a>(
    writer: &mut impl Write,
    head: &[u8],
    payload: impl Iterator<Item = &'a [u8]>,
) -> io::Result<u64> {
    writer.write_all(head)?;
    let mut written = head.len() as u64;
    for part in payload {
        writer.write_all(part)?;
        written += part.len() as u64;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new([("ram", 4096 * 1500)], 2).unwrap()
    }

    fn entry() -> impl Strategy<Value = Entry> {
        // Pages of chunks 0 and 2: those of stream 0.
        let page = prop_oneof![0u64..500, 1024u64..1490].prop_map(PageIndex);
        prop_oneof![
            (page.clone(), 1u64..10).prop_map(|(page, count)| Entry::Zero { page, count }),
            (page.clone(), 1u128..)
                .prop_map(|(page, hash)| Entry::Plain { page, hash: ContentHash::from_bits(hash) }),
            (page.clone(), 1u128..)
                .prop_map(|(page, hash)| Entry::Duplicate { page, hash: ContentHash::from_bits(hash) }),
            (page, 1u128.., 0..=MAX_DELTA as u16).prop_map(|(page, hash, length)| Entry::Delta {
                page,
                hash: ContentHash::from_bits(hash),
                length
            }),
        ]
    }

    /// Found by the fuzz target `copy_stream`: the end of a run beyond all pages was beyond all numbers.
    #[test]
    fn pages_beyond_all_numbers_are_nobodys() {
        let last = PageIndex(u64::MAX - (CHUNK_PAGES - 1));
        for pages in [[u64::MAX; 8], [0; 8]] {
            let mut frame = Vec::new();
            encode_absent(&mut frame, 1, &[Absent { first: last, pages }]);
            let read = read_absent(&mut &frame[HEADER_LENGTH..], 1, &layout(), 0).unwrap();
            assert_eq!(read, Err(FrameError::Pages { page: last.0, count: CHUNK_PAGES.into() }));
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(entries in prop::collection::vec(entry(), 0..200), round: u32) {
            let mut bytes = Vec::new();
            let payload = payload_of(&entries);
            encode_pages(&mut bytes, round, &entries, Encoding::Zstd, payload);
            let (head, table) = bytes.split_at(HEADER_LENGTH);
            let header = decode_header(head.try_into().unwrap()).unwrap();
            prop_assert_eq!(header, Header::Pages { round, entries: entries.len(), encoding: Encoding::Zstd, payload });
            let mut decoded = Vec::new();
            prop_assert_eq!(decode_table(table, &layout(), Some(0), &mut decoded).unwrap(), payload);
            prop_assert_eq!(decoded, entries);
        }

        #[test]
        fn no_bytes_of_a_peer_make_a_frame_beyond_the_limits(
            head: [u8; HEADER_LENGTH], table in prop::collection::vec(any::<u8>(), 0..240),
        ) {
            if let Ok(Header::Pages { entries, payload, .. }) = decode_header(&head) {
                prop_assert!(entries <= MAX_ENTRIES && payload <= MAX_PLAIN * PAGE_SIZE);
            }
            let (layout, mut entries) = (layout(), Vec::new());
            if let Ok(payload) = decode_table(&table, &layout, Some(0), &mut entries) {
                prop_assert!(payload <= MAX_PLAIN * PAGE_SIZE);
                for entry in entries {
                    let (page, count) = match entry { Entry::Zero { page, count } => (page, count), Entry::Plain { page, .. } | Entry::Delta { page, .. } | Entry::Duplicate { page, .. } => (page, 1) };
                    prop_assert!(layout.in_one_chunk(page, count) && layout.stream_of(page) == 0);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn absent_pages_come_back_and_no_bytes_of_a_peer_name_others(
            chunk in prop::sample::select(vec![0u64, 2]), pages: [u64; 8], bytes: [u8; 72],
        ) {
            let layout = layout();
            let mut absent = Absent { first: PageIndex(chunk * CHUNK_PAGES), pages };
            if chunk == 2 {
                // The last chunk has 476 pages.
                absent.pages[7] &= (1 << 28) - 1;
            }
            let mut frame = Vec::new();
            encode_absent(&mut frame, 3, &[absent]);
            let (head, mut body) = frame.split_at(HEADER_LENGTH);
            prop_assert_eq!(decode_header(head.try_into().unwrap()), Ok(Header::Absent { round: 3, chunks: 1 }));
            prop_assert_eq!(read_absent(&mut body, 1, &layout, 0).unwrap(), Ok(vec![absent]));
            prop_assert_eq!(absent.runs().map(|run| run.end - run.start).sum::<u64>(),
                absent.pages.iter().map(|word| u64::from(word.count_ones())).sum::<u64>());
            if let Ok(absent) = read_absent(&mut &bytes[..], 1, &layout, 0).unwrap() {
                for page in absent.iter().flat_map(|absent| absent.runs().flatten().collect::<Vec<_>>()) {
                    prop_assert!(layout.locate(PageIndex(page)).is_some() && layout.stream_of(PageIndex(page)) == 0);
                }
            }
        }
    }

    #[test]
    fn frames_that_break_the_protocol_are_refused_by_name() {
        let head = |kind, encoding, reserved, entries: u32| {
            let mut bytes = [kind, encoding, reserved, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes[4..8].copy_from_slice(&entries.to_le_bytes());
            decode_header(&bytes)
        };
        assert_eq!(head(0, 0, 0, 0), Err(FrameError::Kind(0)));
        assert_eq!(head(1, 9, 0, 0), Err(FrameError::Encoding(9)));
        assert_eq!(head(1, 0, 9, 0), Err(FrameError::Reserved(9)));
        assert_eq!(head(1, 0, 0, 1 << 30), Err(FrameError::Length { entries: 1 << 30, payload: 0 }));
        assert_eq!(head(2, 0, 0, 1), Err(FrameError::Length { entries: 1, payload: 0 }));
        let table = |entry| {
            let mut bytes = Vec::new();
            encode_pages(&mut bytes, 0, &[entry], Encoding::None, 0);
            decode_table(&bytes[HEADER_LENGTH..], &layout(), Some(0), &mut Vec::new())
        };
        let page = PageIndex(600);
        assert!(
            matches!(table(Entry::Zero { page, count: 1 }), Err(FrameError::Pages { .. })),
            "another stream"
        );
        let page = PageIndex(0);
        assert!(
            matches!(table(Entry::Zero { page, count: 513 }), Err(FrameError::Pages { .. })),
            "beyond a chunk"
        );
        let hash = ContentHash::from_bits(5);
        assert_eq!(table(Entry::Plain { page, hash }), Ok(PAGE_SIZE));
        assert_eq!(table(Entry::Delta { page, hash, length: 2049 }), Err(FrameError::Delta(2049)));
    }
}
