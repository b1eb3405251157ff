//! What two controllers say to each other over the link's control connection. See `docs/protocol.md`.
//!
//! These types are the wire format and nothing else: the controllers turn them into their own types where they come
//! in, and check every length and number there. A field is never given another meaning and a tag never used again; new
//! fields are optional, and a peer that does not know them ignores them. A message without a known kind is a
//! violation. The link bounds a whole message to 1 MiB before any of it is decoded.

pub mod bounds;
mod limits;
mod names;
mod network;
mod reserve;

use mirror::memory::pages::PageSet;
use prost::{Message, Oneof};

pub use limits::CgroupLimits;
pub use network::{Forward, Known, Macvtap, Neighbour, Port, Tap, Vlan};
pub use reserve::{CpuidWord, Disk, FORMATS, RamBlock, Reserve};

/// The data stream with frames that were on their way to the guest.
pub const NETWORK_STREAM: u16 = u16::MAX;

/// From source to destination.
#[derive(Clone, PartialEq, Message)]
pub struct ToDestination {
    /// One of them.
    #[prost(oneof = "Request", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15")]
    pub request: Option<Request>,
}

/// What the source asks for.
#[expect(clippy::large_enum_variant, reason = "a session has one Reserve, which is taken apart at once")]
#[derive(Clone, PartialEq, Oneof)]
pub enum Request {
    /// Set aside what this machine needs. First message of a session.
    #[prost(message, tag = "1")]
    Reserve(Reserve),
    /// Device state from here on waits until RAM is complete.
    #[prost(message, tag = "2")]
    HoldDevices(Nothing),
    /// A part of QEMU's stream.
    #[prost(bytes = "vec", tag = "3")]
    DeviceState(Vec<u8>),
    /// Compare the whole copy with the ledger now.
    #[prost(message, tag = "4")]
    Audit(Nothing),
    /// Everything has been sent: if the sums are equal, load the device state.
    #[prost(message, tag = "5")]
    Load(Sums),
    /// The machine is yours. In a session, or as the first message of a connection that settles one.
    #[prost(message, tag = "6")]
    Commit(Commit),
    /// The source has given everything back; tell how the machine does.
    #[prost(message, tag = "7")]
    Release(Nothing),
    /// Throw the copy away. In a session, or as the first message of a connection about one that broke.
    #[prost(message, tag = "8")]
    Cancel(Commit),
    /// The machine will be handed over before its memory is complete: be ready to ask for what is missing.
    #[prost(message, tag = "9")]
    PostCopy(Nothing),
    /// Go on with a post-copy whose link was lost. First message of a connection.
    #[prost(message, tag = "10")]
    Resume(Resume),
    /// A part of a file that the destination lacks: one file after the other, in the order in which it named them.
    #[prost(bytes = "vec", tag = "11")]
    FilePart(Vec<u8>),
    /// What is known of the guest outside of it, in one or more parts. Before `Commit`.
    #[prost(message, tag = "12")]
    Known(Known),
    /// What comes for the machine at its former host is not sent on any more: it is to be in the network that is there. First message
    /// of a connection.
    #[prost(message, tag = "13")]
    EndForwarding(Commit),
    /// From the destination: whose is the machine? Only message of a connection, to the source.
    #[prost(message, tag = "14")]
    Whose(Commit),
    /// Nothing of the machine is kept any more by who has handed it over, and nobody will ask what became of it. First message of a
    /// connection.
    #[prost(message, tag = "15")]
    Released(Commit),
}

/// From destination to source.
#[derive(Clone, PartialEq, Message)]
pub struct ToSource {
    /// One of them.
    #[prost(oneof = "Reply", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20")]
    pub reply: Option<Reply>,
}

/// What the destination answers or reports.
#[derive(Clone, PartialEq, Oneof)]
pub enum Reply {
    /// Everything is set aside; the data streams may come.
    #[prost(message, tag = "1")]
    Reserved(Reserved),
    /// It cannot be done; for a rehearsal, an empty list says that it could.
    #[prost(message, tag = "2")]
    Refused(Findings),
    /// All streams have applied everything before this barrier.
    #[prost(message, tag = "3")]
    Barrier(Sums),
    /// These pages are not what they should be at the destination: send them again.
    #[prost(message, tag = "4")]
    Mismatch(Pages),
    /// The whole copy was compared.
    #[prost(message, tag = "5")]
    Audited(Audited),
    /// Memory and devices are complete, the machine is paused.
    #[prost(message, tag = "6")]
    Ready(Nothing),
    /// It failed; the copy is gone or going.
    #[prost(message, tag = "7")]
    Failed(Findings),
    /// The machine runs here.
    #[prost(message, tag = "8")]
    Running(Running),
    /// How the machine did while it was watched.
    #[prost(message, tag = "9")]
    Health(Health),
    /// The copy is gone and nothing of it is left.
    #[prost(message, tag = "10")]
    Cancelled(Nothing),
    /// From here on what is missing is asked for.
    #[prost(message, tag = "11")]
    PostCopyReady(Nothing),
    /// The guest waits for these pages.
    #[prost(message, tag = "12")]
    Wanted(Pages),
    /// Nothing is missing any more.
    #[prost(message, tag = "13")]
    Supplied(Supplied),
    /// What is still missing, in as many messages as it takes.
    #[prost(message, tag = "14")]
    Missing(Missing),
    /// What an image that was there before holds, in as many messages as it takes.
    #[prost(message, tag = "15")]
    Holds(Holds),
    /// These blocks of disks are not what they should be at the destination: send them again.
    #[prost(message, tag = "16")]
    WrongBlocks(WrongBlocks),
    /// Before anything is set aside: files that the machine boots from are not here, and can be shipped.
    #[prost(message, tag = "17")]
    Lacking(Lacking),
    /// The machine is in the network that is here.
    #[prost(message, tag = "18")]
    ForwardingEnded(Nothing),
    /// The reservation is still worked on. Only to a source that has said that it is patient.
    #[prost(message, tag = "19")]
    Working(Nothing),
    /// Whose the machine is, as the source knows it.
    #[prost(message, tag = "20")]
    Belongs(Belongs),
}

/// No content.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Nothing {}

/// Files that are not at the destination.
#[derive(Clone, PartialEq, Message)]
pub struct Lacking {
    /// Their paths, as the source has named them.
    #[prost(string, repeated, tag = "1")]
    pub paths: Vec<String>,
}

/// A file that the machine boots from directly.
#[derive(Clone, PartialEq, Message)]
pub struct BootFile {
    /// Its path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// The hash of its content, 16 bytes, little-endian.
    #[prost(bytes = "vec", tag = "3")]
    pub hash: Vec<u8>,
}

/// What is set aside.
#[derive(Clone, PartialEq, Message)]
pub struct Reserved {
    /// Which of the disks are to be mirrored, by their place in the request; the others are shared.
    #[prost(uint32, repeated, tag = "1")]
    pub mirrored: Vec<u32>,
    /// Which of these hold something already, by their place among the mirrored: what they hold is told next.
    #[prost(uint32, repeated, tag = "2")]
    pub known: Vec<u32>,
    /// Which of these have images that were there before, in the same way.
    #[prost(uint32, repeated, tag = "3")]
    pub existing: Vec<u32>,
    /// Identity of this agent's state directory, 16 bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub keeper: Vec<u8>,
}

/// What a part of an image holds.
#[derive(Clone, PartialEq, Message)]
pub struct Holds {
    /// The disk, by its place among the mirrored.
    #[prost(uint32, tag = "1")]
    pub disk: u32,
    /// The first block of it.
    #[prost(uint64, tag = "2")]
    pub first: u64,
    /// Content hashes, 16 bytes each, little-endian.
    #[prost(bytes = "vec", tag = "3")]
    pub hashes: Vec<u8>,
    /// Nothing more follows, of any disk.
    #[prost(bool, tag = "4")]
    pub last: bool,
}

/// Blocks of disks, by their index.
#[derive(Clone, PartialEq, Message)]
pub struct WrongBlocks {
    /// The blocks.
    #[prost(uint64, repeated, tag = "1")]
    pub blocks: Vec<u64>,
    /// They are not what a check expected, which a guest that runs explains.
    #[prost(bool, tag = "2")]
    pub checked: bool,
}

/// Ledger sums of all streams at a barrier.
#[derive(Clone, PartialEq, Message)]
pub struct Sums {
    /// The barrier.
    #[prost(uint32, tag = "1")]
    pub barrier: u32,
    /// For each stream 16 bytes, little-endian.
    #[prost(bytes = "vec", tag = "2")]
    pub sums: Vec<u8>,
    /// Pages that the destination's audit has compared so far.
    #[prost(uint64, tag = "3")]
    pub audited: u64,
    /// The sums of the ledgers of disks, likewise.
    #[prost(bytes = "vec", tag = "4")]
    pub disks: Vec<u8>,
    /// Blocks of disks that the destination's audit has compared so far.
    #[prost(uint64, tag = "5")]
    pub audited_blocks: u64,
}

/// Page indices.
#[derive(Clone, PartialEq, Message)]
pub struct Pages {
    /// The pages.
    #[prost(uint64, repeated, tag = "1")]
    pub pages: Vec<u64>,
}

/// What a full audit found.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Audited {
    /// Pages compared.
    #[prost(uint64, tag = "1")]
    pub pages: u64,
    /// Pages that were not what they should be.
    #[prost(uint64, tag = "2")]
    pub differing: u64,
    /// Blocks of disks compared.
    #[prost(uint64, tag = "3")]
    pub blocks: u64,
    /// Blocks that were not what they should be.
    #[prost(uint64, tag = "4")]
    pub differing_blocks: u64,
}

/// Which hand-over is meant.
#[derive(Clone, PartialEq, Message)]
pub struct Commit {
    /// The migration's identity, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Name of the machine.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Generation of the machine at its new owner.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
}

/// Whose a machine is, as its source knows it.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Belongs {
    /// Whose.
    #[prost(enumeration = "Owner", tag = "1")]
    pub owner: i32,
}

/// Whose a machine may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Owner {
    /// The source knows nothing of it.
    Unknown = 0,
    /// The source's own.
    Mine = 1,
    /// Who asks has it, by the migration that it asks about.
    Yours = 2,
}

/// A post-copy that goes on.
#[derive(Clone, PartialEq, Message)]
pub struct Resume {
    /// The hand-over that it followed.
    #[prost(message, optional, tag = "1")]
    pub commit: Option<Commit>,
    /// Key material of the content hashes from here on.
    #[prost(bytes = "vec", tag = "2")]
    pub secret: Vec<u8>,
}

/// How a post-copy went.
#[derive(Clone, PartialEq, Message)]
pub struct Supplied {
    /// Ledger sums, for each stream 16 bytes, little-endian. Empty when another agent began it.
    #[prost(bytes = "vec", tag = "1")]
    pub sums: Vec<u8>,
    /// Pages that the guest had to wait for.
    #[prost(uint64, tag = "2")]
    pub faults: u64,
    /// Its longest wait, in microseconds.
    #[prost(uint64, tag = "3")]
    pub longest_us: u64,
    /// All its waits together, in microseconds.
    #[prost(uint64, tag = "4")]
    pub total_us: u64,
    /// Another agent began it, whose part of the waits is not known.
    #[prost(bool, tag = "5")]
    pub taken_over: bool,
}

impl From<ownership::Supplied> for Supplied {
    fn from(supplied: ownership::Supplied) -> Supplied {
        let ownership::Supplied { faults, longest_us, total_us, taken_over } = supplied;
        Supplied { sums: Vec::new(), faults, longest_us, total_us, taken_over }
    }
}

/// The machine runs here, or has run here.
#[derive(Clone, PartialEq, Message)]
pub struct Running {
    /// Answering Resume: its memory has become complete, and this is how.
    #[prost(message, optional, tag = "1")]
    pub supplied: Option<Supplied>,
    /// Answering Resume: it has ended while it lacked memory.
    #[prost(bool, tag = "2")]
    pub lacked: bool,
}

/// A part of what is missing.
#[derive(Clone, PartialEq, Message)]
pub struct Missing {
    /// The page of the first bit; a multiple of 64.
    #[prost(uint64, tag = "1")]
    pub first: u64,
    /// A bit for each page, little-endian words of 8 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub bits: Vec<u8>,
    /// More follows.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

/// Reasons.
#[derive(Clone, PartialEq, Message)]
pub struct Findings {
    /// The reasons.
    #[prost(message, repeated, tag = "1")]
    pub findings: Vec<Finding>,
    /// Where CPU features are missing, those that there are, by name: the source can tell which ones it misses.
    #[prost(string, repeated, tag = "2")]
    pub cpu_features: Vec<String>,
    /// For a rehearsal that found none, what would be set aside.
    #[prost(message, optional, tag = "3")]
    pub reserved: Option<Reserved>,
    /// Identity of the state directory of the agent that says so, 16 bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub keeper: Vec<u8>,
}

/// A reason.
#[derive(Clone, PartialEq, Message)]
pub struct Finding {
    /// Stable name of the kind.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// What is wrong.
    #[prost(string, tag = "2")]
    pub message: String,
    /// What to do.
    #[prost(string, tag = "3")]
    pub hint: String,
}

/// How a machine did while it was watched.
#[derive(Clone, PartialEq, Message)]
pub struct Health {
    /// Milliseconds.
    #[prost(double, tag = "1")]
    pub watched_ms: f64,
    /// Virtual CPUs.
    #[prost(uint32, tag = "2")]
    pub vcpus: u32,
    /// Those that used CPU time.
    #[prost(uint32, tag = "3")]
    pub progressing: u32,
    /// QEMU's word for the machine's state at the end.
    #[prost(string, tag = "4")]
    pub status: String,
    /// What went wrong with its network.
    #[prost(message, repeated, tag = "5")]
    pub problems: Vec<Finding>,
    /// Frames that were on their way to it, and that it did not get: there was no room for them.
    #[prost(uint64, tag = "6")]
    pub frames_dropped: u64,
}

impl Request {
    /// The machine that it is about, where it may be the first message of a connection; else empty.
    pub fn vm(&self) -> &str {
        match self {
            Request::Reserve(reserve) => &reserve.name,
            Request::Commit(commit) | Request::Cancel(commit) | Request::EndForwarding(commit) => {
                &commit.name
            }
            Request::Resume(resume) => resume.commit.as_ref().map_or("", |commit| &commit.name),
            _ => "",
        }
    }
}

impl From<Request> for ToDestination {
    fn from(request: Request) -> ToDestination {
        ToDestination { request: Some(request) }
    }
}

impl From<Reply> for ToSource {
    fn from(reply: Reply) -> ToSource {
        ToSource { reply: Some(reply) }
    }
}

impl From<finding::Finding> for Finding {
    fn from(finding: finding::Finding) -> Finding {
        Finding { kind: finding.kind, message: finding.message, hint: finding.hint }
    }
}

impl From<Finding> for finding::Finding {
    fn from(finding: Finding) -> finding::Finding {
        finding::Finding { kind: finding.kind, message: finding.message, hint: finding.hint }
    }
}

impl From<Vec<finding::Finding>> for Findings {
    fn from(findings: Vec<finding::Finding>) -> Findings {
        Findings { findings: findings.into_iter().map(Into::into).collect(), ..Findings::default() }
    }
}

/// Bytes of bits in one [`Missing`]: 2 GiB worth of pages in 64 KiB.
pub const MISSING_BYTES: usize = 64 << 10;

impl Missing {
    /// A set of pages, in as many messages as it takes.
    pub fn of(pages: &PageSet) -> Vec<Missing> {
        let bytes: Vec<u8> = pages.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut first = 0;
        let mut parts: Vec<Missing> = Vec::new();
        for bits in bytes.chunks(MISSING_BYTES) {
            parts.push(Missing { first, bits: bits.to_vec(), more: true });
            first += bits.len() as u64 * 8;
        }
        match parts.last_mut() {
            Some(last) => last.more = false,
            None => parts.push(Missing::default()),
        }
        parts
    }

    /// Adds this part to a set. False when it names pages that the set cannot hold.
    #[must_use]
    pub fn add_to(&self, pages: &mut PageSet) -> bool {
        let (words, rest) = self.bits.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        rest.is_empty() && self.first.is_multiple_of(64) && pages.insert_words(self.first, &words)
    }
}

fn bytes_of(sums: &[mirror::ledger::Sum]) -> Vec<u8> {
    sums.iter().flat_map(|sum| sum.0.to_le_bytes()).collect()
}

fn sums_of(bytes: &[u8]) -> Option<Vec<mirror::ledger::Sum>> {
    let (sums, rest) = bytes.as_chunks::<16>();
    rest.is_empty().then(|| sums.iter().map(|sum| mirror::ledger::Sum(u128::from_le_bytes(*sum))).collect())
}

/// Hashes in one [`Holds`]: 2 GiB worth of blocks in 512 KiB.
pub const HOLDS_HASHES: usize = 32 << 10;

impl Holds {
    /// What a part of a disk holds.
    pub fn of(disk: u32, first: u64, hashes: &[mirror::hash::ContentHash]) -> Holds {
        let hashes = hashes.iter().flat_map(|hash| hash.bits().to_le_bytes()).collect();
        Holds { disk, first, hashes, last: false }
    }

    /// The hashes; none where they are not whole.
    pub fn decode(&self) -> Option<Vec<Option<mirror::hash::ContentHash>>> {
        let (hashes, rest) = self.hashes.as_chunks::<16>();
        let hash = |bytes: &[u8; 16]| Some(mirror::hash::ContentHash::from_bits(u128::from_le_bytes(*bytes)));
        rest.is_empty().then(|| hashes.iter().map(hash).collect())
    }
}

impl Sums {
    /// Sums of all streams, for the wire.
    pub fn new(barrier: u32, sums: &[mirror::ledger::Sum], audited: u64) -> Sums {
        Sums { barrier, sums: bytes_of(sums), audited, disks: Vec::new(), audited_blocks: 0 }
    }

    /// The same with the sums of disks, of all streams too.
    #[must_use]
    pub fn with_disks(self, sums: &[mirror::ledger::Sum], audited_blocks: u64) -> Sums {
        Sums { disks: bytes_of(sums), audited_blocks, ..self }
    }

    /// The sums, when there is one for each of so many streams.
    pub fn decode(&self, streams: usize) -> Option<Vec<mirror::ledger::Sum>> {
        sums_of(&self.sums).filter(|sums| sums.len() == streams)
    }

    /// The sums of disks, when there is one for each of so many streams. A peer without disks tells none: they are as good as
    /// nothing.
    pub fn decode_disks(&self, streams: usize) -> Option<Vec<mirror::ledger::Sum>> {
        if self.disks.is_empty() {
            return Some(vec![mirror::ledger::Sum::default(); streams]);
        }
        sums_of(&self.disks).filter(|sums| sums.len() == streams)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror::ledger::Sum;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_come_back_and_another_number_of_streams_does_not(sums in prop::collection::vec(any::<u128>(), 0..9), barrier: u32) {
            let sums: Vec<Sum> = sums.into_iter().map(Sum).collect();
            let wire = Sums::decode(&Sums::decode_wire(&Sums::new(barrier, &sums, 7).encode_to_vec()), sums.len());
            prop_assert_eq!(wire, Some(sums.clone()));
            prop_assert_eq!(Sums::new(barrier, &sums, 7).decode(sums.len() + 1), None);
        }

        #[test]
        fn what_is_missing_comes_back_whole(runs in prop::collection::vec((0u64..1_200_000, 1u64..200), 0..20)) {
            let mut pages = PageSet::new(1_300_000);
            runs.iter().for_each(|&(start, len)| pages.insert(start..start + len));
            let parts = Missing::of(&pages);
            prop_assert!(parts.iter().rev().skip(1).all(|part| part.more) && !parts.last().unwrap().more);
            let mut back = PageSet::new(1_300_000);
            prop_assert!(parts.iter().all(|part| part.add_to(&mut back)));
            prop_assert_eq!(&back, &pages);
            let mut small = PageSet::new(512);
            prop_assert!(!parts.iter().all(|part| part.add_to(&mut small)), "beyond the set");
        }

        #[test]
        fn arbitrary_bytes_are_an_error_or_a_message_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = ToDestination::decode(&bytes[..]);
            let _ = ToSource::decode(&bytes[..]);
        }
    }

    impl Sums {
        fn decode_wire(bytes: &[u8]) -> Sums {
            <Sums as Message>::decode(bytes).unwrap()
        }
    }
}
