//! What travels, each piece with its encoding and its limits. All integers are big-endian.

use std::io;

/// What a server says first: "NBDMAGIC".
const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// What follows it in the newstyle handshake, and what every option begins with: "IHAVEOPT".
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Flags of the handshake; those of the client are the same bits.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Options.
pub(super) const OPTION_EXPORT_NAME: u32 = 1;
pub(super) const OPTION_ABORT: u32 = 2;
pub(super) const OPTION_LIST: u32 = 3;
pub(super) const OPTION_INFO: u32 = 6;
pub(super) const OPTION_GO: u32 = 7;

/// Replies to options. Those with the highest bit set are errors.
pub(super) const REPLY_ACKNOWLEDGED: u32 = 1;
pub(super) const REPLY_SERVER: u32 = 2;
pub(super) const REPLY_INFO: u32 = 3;
pub(super) const REPLY_ERROR: u32 = 1 << 31;
pub(super) const REPLY_UNSUPPORTED: u32 = REPLY_ERROR + 1;
pub(super) const REPLY_INVALID: u32 = REPLY_ERROR + 3;
pub(super) const REPLY_UNKNOWN_EXPORT: u32 = REPLY_ERROR + 6;

const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Flags of an export.
pub(super) const HAS_FLAGS: u16 = 1 << 0;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;

/// Flags of a request: to be on stable storage before it is answered; zeros must take up room.
pub(super) const COMMAND_FUA: u16 = 1 << 0;
pub(super) const COMMAND_NO_HOLE: u16 = 1 << 1;

/// Most bytes of a name or a message: the protocol's own limit.
pub(super) const MAX_STRING: usize = 4096;
/// Most bytes of an option's data, and of a reply to one. A name, and room for what later versions add.
pub(super) const MAX_OPTION: usize = 4 * MAX_STRING;
/// Most bytes read or written with one request when nothing else was agreed, in the protocol's own words.
pub(super) const DEFAULT_MAXIMUM: u32 = 32 << 20;

pub(super) const GREETING_LENGTH: usize = 18;
pub(super) const OPTION_LENGTH: usize = 16;
pub(super) const OPTION_REPLY_LENGTH: usize = 20;
pub(super) const REQUEST_LENGTH: usize = 28;
pub(super) const REPLY_LENGTH: usize = 16;

/// Where a peer does not keep to the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Something that does not begin as it must.
    #[error("{what} that begins with {found:#x}")]
    Magic {
        /// What was due.
        what: &'static str,
        /// What it began with.
        found: u64,
    },
    /// More than is taken.
    #[error("{what} of {found} bytes, where {limit} is the most")]
    Length {
        /// What is too long.
        what: &'static str,
        /// As the peer has it.
        found: u64,
        /// What is taken.
        limit: u64,
    },
    /// Fewer or more bytes than the fields have.
    #[error("{0} whose length does not fit its content")]
    Fields(&'static str),
    /// A name or message that is not UTF-8.
    #[error("text that is not UTF-8")]
    Text,
    /// Flags that nobody agreed on.
    #[error("unknown flags {0:#x}")]
    Flags(u32),
    /// A value that is none, or not at this point.
    #[error("{what} {found}, which has no place here")]
    Unexpected {
        /// What it is.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// Block sizes that no request could keep to.
    #[error("block sizes {0:?}")]
    BlockSizes(BlockSizes),
    /// Haggling without end.
    #[error("more than {0} rounds of options")]
    Endless(usize),
}

/// What a server takes in one request, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it; a power of two.
    pub minimum: u32,
    /// Requests of multiples of it are quickest; a power of two.
    pub preferred: u32,
    /// Most that one request reads or writes. It does not limit zeroing and trimming.
    pub maximum: u32,
}

impl Default for BlockSizes {
    fn default() -> BlockSizes {
        BlockSizes { minimum: 1, preferred: 65536, maximum: DEFAULT_MAXIMUM }
    }
}

impl BlockSizes {
    /// Whether they are what the protocol allows.
    pub(super) fn check(self) -> Result<BlockSizes, WireError> {
        let BlockSizes { minimum, preferred, maximum } = self;
        let powers = minimum.is_power_of_two() && preferred.is_power_of_two();
        let ordered = minimum <= preferred && minimum <= maximum;
        if powers && minimum <= 65536 && ordered { Ok(self) } else { Err(WireError::BlockSizes(self)) }
    }

    pub(super) fn aligned(self, offset: u64, length: u64) -> bool {
        let minimum = u64::from(self.minimum.max(1));
        offset.is_multiple_of(minimum) && length.is_multiple_of(minimum)
    }
}

/// The fields of a piece, from its beginning on.
struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::Fields(self.what))?;
        self.rest = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn text(&mut self, length: u32) -> Result<&'a str, WireError> {
        let length = bounded(self.what, length, MAX_STRING)?;
        let (text, rest) = self.rest.split_at_checked(length).ok_or(WireError::Fields(self.what))?;
        self.rest = rest;
        std::str::from_utf8(text).map_err(|_| WireError::Text)
    }

    fn magic(&mut self, expected: u64) -> Result<(), WireError> {
        let found = self.u64()?;
        if found == expected { Ok(()) } else { Err(WireError::Magic { what: self.what, found }) }
    }

    fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Fields(self.what)) }
    }
}

/// A length as the peer has it, held against the most that is taken.
pub(super) fn bounded(what: &'static str, length: u32, limit: usize) -> Result<usize, WireError> {
    match usize::try_from(length) {
        Ok(length) if length <= limit => Ok(length),
        _ => Err(WireError::Length { what, found: length.into(), limit: limit as u64 }),
    }
}

/// What a server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) flags: u16,
}

impl Greeting {
    pub(super) fn encode(self) -> [u8; GREETING_LENGTH] {
        let mut bytes = [0; GREETING_LENGTH];
        bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&self.flags.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; GREETING_LENGTH]) -> Result<Greeting, WireError> {
        let mut fields = Fields { what: "a greeting", rest: bytes };
        fields.magic(GREETING_MAGIC)?;
        fields.magic(OPTION_MAGIC)?;
        Ok(Greeting { flags: fields.u16()? })
    }
}

/// What an option begins with; so many bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionHead {
    pub(super) option: u32,
    /// At most [`MAX_OPTION`] once decoded.
    pub(super) length: u32,
}

impl OptionHead {
    pub(super) fn encode(self) -> [u8; OPTION_LENGTH] {
        let mut bytes = [0; OPTION_LENGTH];
        bytes[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; OPTION_LENGTH]) -> Result<OptionHead, WireError> {
        let mut fields = Fields { what: "an option", rest: bytes };
        fields.magic(OPTION_MAGIC)?;
        let head = OptionHead { option: fields.u32()?, length: fields.u32()? };
        bounded("an option", head.length, MAX_OPTION)?;
        Ok(head)
    }
}

/// What a reply to an option begins with; so many bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionReplyHead {
    pub(super) option: u32,
    pub(super) kind: u32,
    /// At most [`MAX_OPTION`] once decoded.
    pub(super) length: u32,
}

impl OptionReplyHead {
    pub(super) fn encode(self) -> [u8; OPTION_REPLY_LENGTH] {
        let mut bytes = [0; OPTION_REPLY_LENGTH];
        bytes[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.kind.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; OPTION_REPLY_LENGTH]) -> Result<OptionReplyHead, WireError> {
        let mut fields = Fields { what: "a reply to an option", rest: bytes };
        fields.magic(OPTION_REPLY_MAGIC)?;
        let head = OptionReplyHead { option: fields.u32()?, kind: fields.u32()?, length: fields.u32()? };
        bounded("a reply to an option", head.length, MAX_OPTION)?;
        Ok(head)
    }
}

/// The data of the options "go" and "info".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Go {
    /// At most [`MAX_STRING`] bytes.
    pub(super) export: String,
    /// What the client wants told of the export.
    pub(super) infos: Vec<u16>,
}

impl Go {
    pub(super) fn encode(&self) -> Result<Vec<u8>, WireError> {
        let too_long = |found: usize| WireError::Length {
            what: "an option",
            found: found as u64,
            limit: MAX_STRING as u64,
        };
        let name = self.export.as_bytes();
        let length = u32::try_from(name.len()).ok().filter(|_| name.len() <= MAX_STRING);
        let length = length.ok_or_else(|| too_long(name.len()))?;
        let infos = u16::try_from(self.infos.len()).map_err(|_| too_long(self.infos.len()))?;
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&infos.to_be_bytes());
        bytes.extend(self.infos.iter().flat_map(|info| info.to_be_bytes()));
        Ok(bytes)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Go, WireError> {
        let mut fields = Fields { what: "an option", rest: bytes };
        let length = fields.u32()?;
        let export = fields.text(length)?.to_owned();
        let count = usize::from(fields.u16()?);
        // The data itself is bounded, and so is what it can hold.
        if fields.rest.len() != count * 2 {
            return Err(WireError::Fields("an option"));
        }
        let infos = fields.rest.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
        Ok(Go { export, infos })
    }
}

/// What a server tells of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Info {
    Export {
        size: u64,
        flags: u16,
    },
    BlockSizes(BlockSizes),
    /// Something that is of no interest here.
    Other(u16),
}

impl Info {
    pub(super) fn encode(self) -> Vec<u8> {
        match self {
            Info::Export { size, flags } => {
                [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
            }
            Info::BlockSizes(BlockSizes { minimum, preferred, maximum }) => {
                let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
                [&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat()
            }
            Info::Other(kind) => kind.to_be_bytes().to_vec(),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Info, WireError> {
        let mut fields = Fields { what: "what is told of an export", rest: bytes };
        let info = match fields.u16()? {
            INFO_EXPORT => Info::Export { size: fields.u64()?, flags: fields.u16()? },
            INFO_BLOCK_SIZE => {
                let (minimum, preferred, maximum) = (fields.u32()?, fields.u32()?, fields.u32()?);
                Info::BlockSizes(BlockSizes { minimum, preferred, maximum }.check()?)
            }
            other => return Ok(Info::Other(other)),
        };
        fields.end()?;
        Ok(info)
    }
}

/// The name of an export in a list of them: a reply to the option "list".
pub(super) fn encode_listed(export: &str) -> Vec<u8> {
    let name = export.as_bytes();
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], name].concat()
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
}

impl Command {
    const ALL: [(u16, Command); 6] = [
        (0, Command::Read),
        (1, Command::Write),
        (2, Command::Disconnect),
        (3, Command::Flush),
        (4, Command::Trim),
        (6, Command::WriteZeroes),
    ];

    fn number(self) -> u16 {
        Self::ALL.iter().find(|(_, command)| *command == self).map_or(u16::MAX, |(number, _)| *number)
    }
}

/// What a request begins with; its data follows if it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestHead {
    pub(super) flags: u16,
    /// The number of a command that is not known here.
    pub(super) command: Result<Command, u16>,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// As the peer has it: what is taken of it depends on the command.
    pub(super) length: u32,
}

impl RequestHead {
    pub(super) fn encode(self) -> [u8; REQUEST_LENGTH] {
        let mut bytes = [0; REQUEST_LENGTH];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        let command = self.command.map_or_else(|unknown| unknown, Command::number);
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REQUEST_LENGTH]) -> Result<RequestHead, WireError> {
        let mut fields = Fields { what: "a request", rest: bytes };
        let found = fields.u32()?;
        if found != REQUEST_MAGIC {
            return Err(WireError::Magic { what: "a request", found: found.into() });
        }
        let (flags, number) = (fields.u16()?, fields.u16()?);
        let command = Command::ALL.iter().find(|(of, _)| *of == number).map(|(_, command)| *command);
        Ok(RequestHead {
            flags,
            command: command.ok_or(number),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }
}

/// What a simple reply begins with; data follows if it answers a read, and there is no error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReplyHead {
    /// 0, or an error's number.
    pub(super) error: u32,
    pub(super) cookie: u64,
}

impl ReplyHead {
    pub(super) fn encode(self) -> [u8; REPLY_LENGTH] {
        let mut bytes = [0; REPLY_LENGTH];
        bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_be_bytes());
        bytes[8..].copy_from_slice(&self.cookie.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REPLY_LENGTH]) -> Result<ReplyHead, WireError> {
        let mut fields = Fields { what: "a reply", rest: bytes };
        let found = fields.u32()?;
        if found != SIMPLE_REPLY_MAGIC {
            return Err(WireError::Magic { what: "a reply", found: found.into() });
        }
        Ok(ReplyHead { error: fields.u32()?, cookie: fields.u64()? })
    }
}

/// The errors that the protocol knows have the numbers that Linux gives them.
const ERRORS: [i32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];
pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const ENOMEM: u32 = 12;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const ENOTSUP: u32 = 95;

/// The number that tells a peer of an error.
pub(super) fn error_number(error: &io::Error) -> u32 {
    if let Some(number) = error.raw_os_error().filter(|number| ERRORS.contains(number)) {
        return number.unsigned_abs();
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => EPERM,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => ENOSPC,
        io::ErrorKind::OutOfMemory => ENOMEM,
        io::ErrorKind::InvalidInput => EINVAL,
        io::ErrorKind::Unsupported => ENOTSUP,
        _ => EIO,
    }
}

/// The error that a peer's number tells of; one that the protocol does not know is taken for EINVAL, as it wants.
pub(super) fn error_of(number: u32) -> io::Error {
    let known = i32::try_from(number).ok().filter(|number| ERRORS.contains(number));
    io::Error::from_raw_os_error(known.unwrap_or(22))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn command() -> impl Strategy<Value = Result<Command, u16>> {
        let known = Command::ALL.map(|(_, command)| Ok(command)).to_vec();
        prop_oneof![prop::sample::select(known), (7u16..).prop_map(Err)]
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(
            flags: u16, command in command(), cookie: u64, offset: u64, length: u32, error: u32,
            option: u32, short in 0..=MAX_OPTION as u32, name in "[a-zé]{0,200}", infos: Vec<u16>,
            minimum in 0u32..=16, preferred in 16u32..=20, maximum in 1u32 << 20..,
        ) {
            let greeting = Greeting { flags };
            prop_assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
            let head = OptionHead { option, length: short };
            prop_assert_eq!(OptionHead::decode(&head.encode()), Ok(head));
            let head = OptionReplyHead { option, kind: error, length: short };
            prop_assert_eq!(OptionReplyHead::decode(&head.encode()), Ok(head));
            let go = Go { export: name, infos };
            prop_assert_eq!(Go::decode(&go.encode().unwrap()), Ok(go));
            let info = Info::Export { size: offset, flags };
            prop_assert_eq!(Info::decode(&info.encode()), Ok(info));
            let info = Info::BlockSizes(BlockSizes { minimum: 1 << minimum, preferred: 1 << preferred, maximum });
            prop_assert_eq!(Info::decode(&info.encode()), Ok(info));
            let head = RequestHead { flags, command, cookie, offset, length };
            prop_assert_eq!(RequestHead::decode(&head.encode()), Ok(head));
            let head = ReplyHead { error, cookie };
            prop_assert_eq!(ReplyHead::decode(&head.encode()), Ok(head));
        }

        #[test]
        fn no_bytes_of_a_peer_ask_for_more_than_the_limits(
            bytes: [u8; REQUEST_LENGTH], data in prop::collection::vec(any::<u8>(), 0..300), right_magic: bool,
        ) {
            let with = |magic: &[u8]| {
                let mut bytes = bytes;
                if right_magic {
                    bytes[..magic.len()].copy_from_slice(magic);
                }
                bytes
            };
            let _ = Greeting::decode(with(b"NBDMAGICIHAVEOPT").first_chunk().unwrap());
            if let Ok(head) = OptionHead::decode(with(b"IHAVEOPT").first_chunk().unwrap()) {
                prop_assert!(head.length as usize <= MAX_OPTION);
            }
            let magic = OPTION_REPLY_MAGIC.to_be_bytes();
            if let Ok(head) = OptionReplyHead::decode(with(&magic).first_chunk().unwrap()) {
                prop_assert!(head.length as usize <= MAX_OPTION);
            }
            let _ = RequestHead::decode(&with(&REQUEST_MAGIC.to_be_bytes()));
            let _ = ReplyHead::decode(with(&SIMPLE_REPLY_MAGIC.to_be_bytes()).first_chunk().unwrap());
            if let Ok(go) = Go::decode(&data) {
                prop_assert!(4 + go.export.len() + 2 + 2 * go.infos.len() == data.len());
            }
            if let Ok(Info::BlockSizes(sizes)) = Info::decode(&data) {
                prop_assert_eq!(sizes.check(), Ok(sizes));
            }
        }

        #[test]
        fn block_sizes_that_are_told_leave_room_for_requests(minimum: u32, preferred: u32, maximum: u32) {
            let told = Info::BlockSizes(BlockSizes { minimum, preferred, maximum }).encode();
            if let Ok(Info::BlockSizes(sizes)) = Info::decode(&told) {
                prop_assert!((1..=65536).contains(&sizes.minimum) && sizes.maximum >= sizes.minimum);
            }
        }
    }

    #[test]
    fn pieces_have_the_bytes_that_the_protocol_document_gives_them() {
        assert_eq!(&Greeting { flags: 3 }.encode(), b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(&OptionHead { option: OPTION_GO, length: 5 }.encode(), b"IHAVEOPT\0\0\0\x07\0\0\0\x05");
        let head = RequestHead { flags: 1, command: Ok(Command::Write), cookie: 2, offset: 3, length: 4 };
        let bytes =
            [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4];
        assert_eq!(head.encode(), bytes);
        let head = ReplyHead { error: 28, cookie: 2 };
        assert_eq!(head.encode(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn errors_keep_their_number_where_the_protocol_has_it() {
        for number in ERRORS {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(error_number(&error), number.unsigned_abs());
            assert_eq!(error_of(number.unsigned_abs()).raw_os_error(), Some(number));
        }
        assert_eq!(error_number(&io::Error::from_raw_os_error(13)), EPERM);
        assert_eq!(error_number(&io::Error::from_raw_os_error(122)), ENOSPC, "a quota");
        assert_eq!(error_number(&io::Error::other("anything")), EIO);
        for unknown in [0xffff_ffff, 77] {
            assert_eq!(error_of(unknown).raw_os_error(), Some(22));
        }
    }
}
