//! What a peer says, held against limits where it comes in: nobody behind this place need think of a word that is too long, too many,
//! beyond any number, or made to be shown on a terminal.
//!
//! A message is looked at twice. Before it is decoded, from the outside: a part of two bytes may become one of hundreds in memory, so
//! their number is limited, not only their length ([`Request::fits`], [`Reply::fits`]). Once it is decoded, field by field
//! ([`Request::bounded`], [`Reply::bounded`]). Texts for people are shortened and made fit to be shown; whatever else is beyond its
//! limit ends the session, with what the peer has done.

use link::{ControlReceiver, LinkError};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::{
    BootFile, Commit, Disk, Finding, Findings, HOLDS_HASHES, Health, Known, MISSING_BYTES, Reply, Request,
    Reserve, Reserved, Sums, Supplied, Tap, ToDestination, ToSource,
};
use network::nft::MAX_DOCUMENT;

/// Most parts of a message, and of each of its parts that is looked into.
const MOST_PARTS: usize = 8192;
/// Most reasons that are told at a time, and their longest words.
const MOST_FINDINGS: usize = 256;
const LONGEST_KIND: usize = 64;
const LONGEST_WORDS: usize = 4096;
/// Longest path, and longest name of anything.
const LONGEST_PATH: usize = 4096;
const LONGEST_NAME: usize = 256;
/// Most disks that are named, of which fewer may be mirrored; most interfaces; most addresses of one.
const MOST_DISKS: usize = 256;
const MOST_INTERFACES: usize = 256;
const MOST_ADDRESSES: usize = 64;
/// Longest address in words, and longest MAC address.
const LONGEST_ADDRESS: usize = 45;
const LONGEST_MAC: usize = 17;
const MOST_FILES: usize = 16;
const MOST_CPUID_WORDS: usize = 1024;
/// Most copies that are said to be worthless; more than a source has.
const MOST_ABANDONED: usize = 64;
/// Longest part of QEMU's stream, or of a file.
const LONGEST_PART: usize = 256 << 10;
/// Bytes of an identity; of sums of sixteen streams; of the key of hashes, with room for another.
const IDENTITY: usize = 16;
const LONGEST_SUMS: usize = 16 * 16;
const LONGEST_SECRET: usize = 1024;
/// What is counted is never more: pages and blocks of years.
const MOST_COUNTED: u64 = 1 << 53;
/// Longest time that is told, in milliseconds: no machine is watched for longer than a day.
const LONGEST_MS: f64 = 86_400_000.0;
const MOST_VCPUS: u32 = 65_536;

/// Why nothing more is heard of a peer.
#[derive(Debug)]
pub enum Unheard {
    /// The link is gone.
    Link(LinkError),
    /// It does not keep to the protocol: what it did, to follow on its name.
    Violation(String),
}

impl From<LinkError> for Unheard {
    fn from(error: LinkError) -> Unheard {
        match error {
            LinkError::TooLong { length, .. } => {
                Unheard::Violation(format!("announced a message of {length} bytes"))
            }
            LinkError::Crammed { length } => {
                Unheard::Violation(format!("sent a message of {length} bytes that is made of too many parts"))
            }
            LinkError::UnknownFrame { kind } => {
                Unheard::Violation(format!("sent a frame of the unknown kind {kind}"))
            }
            LinkError::Decode { length, .. } => {
                Unheard::Violation(format!("sent a message of {length} bytes that cannot be decoded"))
            }
            error => Unheard::Link(error),
        }
    }
}

/// What a source says next.
pub async fn request(receiver: &mut ControlReceiver) -> Result<Request, Unheard> {
    let message = receiver.receive_if::<ToDestination>(Request::fits).await?;
    // Of a later version: what it would have said is not understood, so it is not passed over.
    let request = message.request.ok_or_else(unknown)?;
    request.bounded().map_err(Unheard::Violation)
}

/// What a destination says next.
pub async fn reply(receiver: &mut ControlReceiver) -> Result<Reply, Unheard> {
    let message = receiver.receive_if::<ToSource>(Reply::fits).await?;
    message.reply.ok_or_else(unknown)?.bounded().map_err(Unheard::Violation)
}

fn unknown() -> Unheard {
    Unheard::Violation("sent a message of an unknown kind".to_owned())
}

/// Calls `each` with every part of a message that has a length, by its tag; false if it does once, or there are too many parts. Bytes
/// that are no message are left to be decoded, which says so.
fn every(mut bytes: &[u8], mut each: impl FnMut(u32, &[u8]) -> bool) -> bool {
    let mut parts = 0;
    while !bytes.is_empty() {
        parts += 1;
        if parts > MOST_PARTS {
            return false;
        }
        let Ok((tag, wire_type)) = decode_key(&mut bytes) else { return true };
        if wire_type != WireType::LengthDelimited {
            if skip_field(wire_type, tag, &mut bytes, DecodeContext::default()).is_err() {
                return true;
            }
            continue;
        }
        let length = decode_varint(&mut bytes).ok().and_then(|length| usize::try_from(length).ok());
        let Some((part, rest)) = length.and_then(|length| bytes.split_at_checked(length)) else {
            return true;
        };
        bytes = rest;
        if !each(tag, part) {
            return false;
        }
    }
    true
}

/// Tags of what a source says that is bytes, and of connections, which have parts of their own.
const DEVICE_STATE: u32 = 3;
const FILE_PART: u32 = 11;
const KNOWN: u32 = 12;
const FLOWS: u32 = 2;

impl Request {
    /// Whether a message, not decoded yet, is made of no more parts than one that makes sense.
    pub fn fits(bytes: &[u8]) -> bool {
        every(bytes, |tag, request| match tag {
            DEVICE_STATE | FILE_PART => true,
            KNOWN => every(request, |tag, part| tag != FLOWS || every(part, |_, _| true)),
            _ => every(request, |_, _| true),
        })
    }

    /// The request, if all of it is within its limits; else what is not.
    pub fn bounded(self) -> Result<Request, String> {
        match &self {
            Request::Reserve(reserve) => reserve.bounded()?,
            Request::DeviceState(part) | Request::FilePart(part) => {
                at_most("bytes in a part", part.len(), LONGEST_PART)?;
            }
            Request::Load(sums) => sums.bounded()?,
            Request::Commit(commit)
            | Request::Cancel(commit)
            | Request::EndForwarding(commit)
            | Request::Whose(commit)
            | Request::Released(commit) => commit.bounded()?,
            Request::Resume(resume) => {
                resume.commit.iter().try_for_each(Commit::bounded)?;
                at_most("bytes of a secret", resume.secret.len(), LONGEST_SECRET)?;
            }
            Request::Known(known) => known.bounded()?,
            Request::HoldDevices(_) | Request::Audit(_) | Request::Release(_) | Request::PostCopy(_) => {}
        }
        Ok(self)
    }
}

impl Reply {
    /// Whether a message, not decoded yet, is made of no more parts than one that makes sense.
    pub fn fits(bytes: &[u8]) -> bool {
        every(bytes, |_, reply| every(reply, |_, _| true))
    }

    /// The reply, with words that can be shown, if all else of it is within its limits; else what is not.
    pub fn bounded(self) -> Result<Reply, String> {
        Ok(match self {
            Reply::Refused(findings) => Reply::Refused(findings.bounded()?),
            Reply::Failed(findings) => Reply::Failed(findings.bounded()?),
            Reply::Health(health) => Reply::Health(health.bounded()?),
            Reply::Reserved(reserved) => {
                reserved.bounded()?;
                Reply::Reserved(reserved)
            }
            Reply::Barrier(sums) => {
                sums.bounded()?;
                Reply::Barrier(sums)
            }
            Reply::Audited(audited) => {
                for count in [audited.pages, audited.differing, audited.blocks, audited.differing_blocks] {
                    counted(count)?;
                }
                Reply::Audited(audited)
            }
            Reply::Running(running) => {
                running.supplied.iter().try_for_each(Supplied::bounded)?;
                Reply::Running(running)
            }
            Reply::Supplied(supplied) => {
                supplied.bounded()?;
                Reply::Supplied(supplied)
            }
            Reply::Missing(missing) => {
                at_most("bytes of bits", missing.bits.len(), MISSING_BYTES)?;
                Reply::Missing(missing)
            }
            Reply::Holds(holds) => {
                at_most("bytes of hashes", holds.hashes.len(), HOLDS_HASHES * 16)?;
                Reply::Holds(holds)
            }
            Reply::Lacking(lacking) => {
                at_most("files", lacking.paths.len(), MOST_FILES)?;
                lacking.paths.iter().try_for_each(|path| text("a path", path, LONGEST_PATH))?;
                Reply::Lacking(lacking)
            }
            reply @ (Reply::Mismatch(_)
            | Reply::Wanted(_)
            | Reply::WrongBlocks(_)
            | Reply::Ready(_)
            | Reply::Cancelled(_)
            | Reply::PostCopyReady(_)
            | Reply::ForwardingEnded(_)
            | Reply::Working(_)
            | Reply::Belongs(_)) => reply,
        })
    }

    /// Bytes that it takes as long as nobody listens to it.
    pub fn weight(&self) -> usize {
        const BASE: usize = 256;
        BASE + match self {
            Reply::Mismatch(pages) | Reply::Wanted(pages) => pages.pages.len() * 8,
            Reply::WrongBlocks(wrong) => wrong.blocks.len() * 8,
            Reply::Holds(holds) => holds.hashes.len(),
            Reply::Missing(missing) => missing.bits.len(),
            Reply::Refused(findings) | Reply::Failed(findings) => findings.weight(),
            Reply::Health(health) => health.problems.iter().map(Finding::weight).sum(),
            Reply::Lacking(lacking) => lacking.paths.iter().map(|path| 24 + path.len()).sum(),
            _ => 0,
        }
    }
}

fn at_most(what: &str, found: usize, most: usize) -> Result<(), String> {
    if found <= most { Ok(()) } else { Err(format!("tells {found} {what}, of at most {most}")) }
}

fn text(what: &str, text: &str, longest: usize) -> Result<(), String> {
    let length = text.len();
    if length <= longest { Ok(()) } else { Err(format!("tells {what} of {length} bytes")) }
}

fn counted(count: u64) -> Result<(), String> {
    if count <= MOST_COUNTED { Ok(()) } else { Err(format!("counts up to {count}")) }
}

/// Words of a peer as they may be shown on a terminal and written to a log.
fn shown(words: &str, longest: usize) -> String {
    let reorders =
        |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let fit = |c: char| if c.is_control() || reorders(c) { '\u{fffd}' } else { c };
    let mut words = words.chars();
    let mut shown: String = words.by_ref().take(longest).map(fit).collect();
    if words.next().is_some() {
        shown.push('…');
    }
    shown
}

impl Findings {
    fn bounded(self) -> Result<Findings, String> {
        self.reserved.iter().try_for_each(Reserved::bounded)?;
        at_most("bytes of an identity", self.keeper.len(), IDENTITY)?;
        Ok(Findings {
            findings: bounded_findings(self.findings),
            cpu_features: self.cpu_features.iter().map(|feature| shown(feature, LONGEST_KIND)).collect(),
            ..self
        })
    }

    fn weight(&self) -> usize {
        let findings: usize = self.findings.iter().map(Finding::weight).sum();
        findings + self.cpu_features.iter().map(|feature| 24 + feature.len()).sum::<usize>()
    }
}

fn bounded_findings(findings: Vec<Finding>) -> Vec<Finding> {
    findings.into_iter().take(MOST_FINDINGS).map(Finding::bounded).collect()
}

impl Finding {
    fn bounded(self) -> Finding {
        Finding {
            kind: shown(&self.kind, LONGEST_KIND),
            message: shown(&self.message, LONGEST_WORDS),
            hint: shown(&self.hint, LONGEST_WORDS),
        }
    }

    fn weight(&self) -> usize {
        72 + self.kind.len() + self.message.len() + self.hint.len()
    }
}

impl Health {
    fn bounded(self) -> Result<Health, String> {
        if !(0.0..=LONGEST_MS).contains(&self.watched_ms) {
            return Err(format!("has watched the VM for {} ms", self.watched_ms));
        }
        if self.vcpus > MOST_VCPUS || self.progressing > self.vcpus {
            return Err(format!("has seen {} of {} vCPUs at work", self.progressing, self.vcpus));
        }
        counted(self.frames_dropped)?;
        Ok(Health {
            status: shown(&self.status, LONGEST_KIND),
            problems: bounded_findings(self.problems),
            ..self
        })
    }
}

impl Reserved {
    fn bounded(&self) -> Result<(), String> {
        for (disks, what) in
            [(&self.mirrored, "mirrored"), (&self.known, "known"), (&self.existing, "existing")]
        {
            at_most("disks", disks.len(), MOST_DISKS)?;
            if !disks.is_sorted_by(|one, next| one < next) {
                return Err(format!("tells {what} disks twice, or in no order"));
            }
        }
        // These are among the mirrored, by their place.
        let places = self.known.iter().chain(&self.existing);
        if places.max().is_some_and(|place| *place as usize >= self.mirrored.len()) {
            return Err("knows a disk that it does not mirror".to_owned());
        }
        at_most("bytes of an identity", self.keeper.len(), IDENTITY)
    }
}

impl Sums {
    fn bounded(&self) -> Result<(), String> {
        at_most("bytes of sums", self.sums.len().max(self.disks.len()), LONGEST_SUMS)?;
        counted(self.audited)?;
        counted(self.audited_blocks)
    }
}

impl Supplied {
    fn bounded(&self) -> Result<(), String> {
        at_most("bytes of sums", self.sums.len(), LONGEST_SUMS)?;
        [self.faults, self.longest_us, self.total_us].into_iter().try_for_each(counted)
    }
}

impl Commit {
    fn bounded(&self) -> Result<(), String> {
        at_most("bytes of an identity", self.session.len(), IDENTITY)?;
        text("a name", &self.name, LONGEST_NAME)
    }
}

impl Known {
    fn bounded(&self) -> Result<(), String> {
        at_most("interfaces", self.neighbours.len(), MOST_INTERFACES)?;
        for neighbour in &self.neighbours {
            text("an interface", &neighbour.netdev, LONGEST_NAME)?;
            text("a MAC address", &neighbour.mac, LONGEST_MAC)?;
            at_most("addresses", neighbour.addresses.len(), MOST_ADDRESSES)?;
            neighbour
                .addresses
                .iter()
                .try_for_each(|address| text("an address", address, LONGEST_ADDRESS))?;
        }
        Ok(())
    }
}

impl Reserve {
    fn bounded(&self) -> Result<(), String> {
        at_most("bytes of an identity", self.session.len(), IDENTITY)?;
        at_most("bytes of a secret", self.secret.len(), LONGEST_SECRET)?;
        let abandoned = self.abandoned.as_ref().map_or(0, Vec::len);
        at_most("bytes of identities", abandoned, MOST_ABANDONED * IDENTITY)?;
        for (what, name) in
            [("a name", &self.name), ("a machine", &self.machine), ("a version", &self.qemu_version)]
        {
            text(what, name, LONGEST_NAME)?;
        }
        at_most("RAM blocks", self.ram.len(), MOST_DISKS)?;
        self.ram.iter().try_for_each(|block| text("a RAM block", &block.id, LONGEST_NAME))?;
        at_most("disks", self.disks.len(), MOST_DISKS)?;
        self.disks.iter().try_for_each(Disk::bounded)?;
        at_most("interfaces", self.taps.len().max(self.macvtaps.len()), MOST_INTERFACES)?;
        self.taps.iter().chain(&self.macvtaps).try_for_each(Tap::bounded)?;
        at_most("files", self.boot_files.len(), MOST_FILES)?;
        self.boot_files.iter().try_for_each(BootFile::bounded)?;
        at_most("words of CPUID", self.cpuid.len(), MOST_CPUID_WORDS)?;
        self.cpuid.iter().try_for_each(|word| text("a register", &word.register, LONGEST_KIND))?;
        self.cpu_features.iter().try_for_each(|feature| text("a CPU feature", feature, LONGEST_NAME))?;
        text("a firewall's table", &self.nft, MAX_DOCUMENT)
    }
}

impl Disk {
    fn bounded(&self) -> Result<(), String> {
        let Disk { path, probe, backing, backing_probe, real, .. } = self;
        for path in [path, probe, backing, backing_probe, real] {
            text("a path", path, LONGEST_PATH)?;
        }
        let Disk { format, backing_format, device, not_mirrorable, .. } = self;
        for word in [format, backing_format, device] {
            text("what a disk is", word, LONGEST_NAME)?;
        }
        text("why a disk cannot be mirrored", not_mirrorable, LONGEST_WORDS)?;
        at_most("bytes of a probe", self.nonce.len(), IDENTITY)
    }
}

impl Tap {
    fn bounded(&self) -> Result<(), String> {
        let lower = self.macvtap.as_ref().map(|macvtap| &macvtap.lower);
        let macs = self.macvtap.as_ref().map(|macvtap| &macvtap.mac);
        let names = [&self.netdev, &self.ifname, &self.bridge].into_iter().chain(lower);
        names.into_iter().try_for_each(|name| text("an interface", name, LONGEST_NAME))?;
        [&self.mac].into_iter().chain(macs).try_for_each(|mac| text("a MAC address", mac, LONGEST_NAME))?;
        at_most("VLANs", self.port.as_ref().map_or(0, |port| port.vlans.len()), MOST_PARTS)
    }
}

impl BootFile {
    fn bounded(&self) -> Result<(), String> {
        text("a path", &self.path, LONGEST_PATH)?;
        at_most("bytes of a hash", self.hash.len(), IDENTITY)
    }
}

#[cfg(test)]
mod tests;
