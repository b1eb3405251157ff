//! The handshake, of either end: greeting, flags, and options until both are agreed on an export.

use std::io::{self, IoSlice, Read};
use std::os::unix::net::UnixStream;

use crate::socket;
use crate::wire::{
    self, BlockSizes, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Go, Greeting, INFO_BLOCK_SIZE, Info, OPTION_ABORT,
    OPTION_EXPORT_NAME, OPTION_GO, OPTION_INFO, OPTION_LIST, OptionHead, OptionReplyHead, REPLY_ACKNOWLEDGED,
    REPLY_ERROR, REPLY_INFO, REPLY_INVALID, REPLY_SERVER, REPLY_UNKNOWN_EXPORT, REPLY_UNSUPPORTED, WireError,
};

/// Most options of a client, and most replies to an option. Real ones need a handful.
const MAX_ROUNDS: usize = 64;

/// What a server offers.
#[derive(Debug, Clone)]
pub(super) struct Offer {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) sizes: BlockSizes,
}

/// Why no agreement was reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum HagglingError {
    #[error("the connection broke")]
    Io(#[from] io::Error),
    #[error("the peer sent what it must not")]
    Wire(#[from] WireError),
    #[error("refused with {code:#x}: {message}")]
    Refused { code: u32, message: String },
}

/// What the client has come for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Agreed {
    /// To use the export: requests follow.
    Export,
    /// Nothing more; it only asked.
    Nothing,
}

/// The server's part.
pub(super) fn offer(
    incoming: &mut impl Read,
    stream: &UnixStream,
    offer: &Offer,
) -> Result<Agreed, HagglingError> {
    let ours = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES;
    send(stream, &Greeting { flags: ours }.encode(), &[])?;
    let theirs = u32::from_be_bytes(socket::read_array(incoming)?);
    if theirs & !u32::from(ours) != 0 {
        return Err(WireError::Flags(theirs).into());
    }
    for _ in 0..MAX_ROUNDS {
        let head = OptionHead::decode(&socket::read_array(incoming)?)?;
        let option = head.option;
        let mut data = vec![0; wire::bounded("an option", head.length, wire::MAX_OPTION)?];
        incoming.read_exact(&mut data)?;
        match option {
            OPTION_EXPORT_NAME if data == offer.name.as_bytes() => {
                // The old way has a shape of its own, and none for a refusal.
                let zeroes = if theirs & u32::from(FLAG_NO_ZEROES) == 0 { 124 } else { 0 };
                let answer = [&offer.size.to_be_bytes()[..], &offer.flags.to_be_bytes()].concat();
                send(stream, &answer, &[0; 124][..zeroes])?;
                return Ok(Agreed::Export);
            }
            OPTION_EXPORT_NAME => {
                let message = "no such export".to_owned();
                return Err(HagglingError::Refused { code: REPLY_UNKNOWN_EXPORT, message });
            }
            OPTION_ABORT => {
                // The client may be gone already, and need not wait for this.
                let _ = reply(stream, option, REPLY_ACKNOWLEDGED, &[]);
                return Ok(Agreed::Nothing);
            }
            OPTION_LIST if data.is_empty() => {
                reply(stream, option, REPLY_SERVER, &wire::encode_listed(&offer.name))?;
                reply(stream, option, REPLY_ACKNOWLEDGED, &[])?;
            }
            OPTION_LIST => reply(stream, option, REPLY_INVALID, b"a list has no parameters")?,
            OPTION_INFO | OPTION_GO => match Go::decode(&data) {
                Err(error) => reply(stream, option, REPLY_INVALID, error.to_string().as_bytes())?,
                Ok(go) if go.export != offer.name => {
                    reply(stream, option, REPLY_UNKNOWN_EXPORT, b"no such export")?;
                }
                Ok(_) => {
                    let export = Info::Export { size: offer.size, flags: offer.flags };
                    reply(stream, option, REPLY_INFO, &export.encode())?;
                    reply(stream, option, REPLY_INFO, &Info::BlockSizes(offer.sizes).encode())?;
                    reply(stream, option, REPLY_ACKNOWLEDGED, &[])?;
                    if option == OPTION_GO {
                        return Ok(Agreed::Export);
                    }
                }
            },
            _ => reply(stream, option, REPLY_UNSUPPORTED, b"not supported")?,
        }
    }
    Err(WireError::Endless(MAX_ROUNDS).into())
}

/// The client's part: what the server tells of the export, which is then in use.
pub(super) fn ask(
    incoming: &mut impl Read,
    stream: &UnixStream,
    export: &str,
) -> Result<Offer, HagglingError> {
    let greeting = Greeting::decode(&socket::read_array(incoming)?)?;
    if greeting.flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(WireError::Flags(greeting.flags.into()).into());
    }
    let ours = u32::from(greeting.flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    let data = Go { export: export.to_owned(), infos: vec![INFO_BLOCK_SIZE] }.encode()?;
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let head = OptionHead { option: OPTION_GO, length }.encode();
    send(stream, &[&ours.to_be_bytes()[..], &head].concat(), &data)?;

    let (mut told, mut sizes) = (None, BlockSizes::default());
    for _ in 0..MAX_ROUNDS {
        let head = OptionReplyHead::decode(&socket::read_array(incoming)?)?;
        let mut data = vec![0; wire::bounded("a reply to an option", head.length, wire::MAX_OPTION)?];
        incoming.read_exact(&mut data)?;
        if head.option != OPTION_GO {
            return Err(WireError::Unexpected { what: "a reply to option", found: head.option.into() }.into());
        }
        match (head.kind, told) {
            (REPLY_INFO, _) => match Info::decode(&data)? {
                Info::Export { size, flags } => told = Some((size, flags)),
                Info::BlockSizes(told) => sizes = told,
                Info::Other(_) => {}
            },
            (REPLY_ACKNOWLEDGED, Some((size, flags))) => {
                return Ok(Offer { name: export.to_owned(), size, flags, sizes });
            }
            (code, _) if code >= REPLY_ERROR => {
                let message = String::from_utf8_lossy(&data[..data.len().min(wire::MAX_STRING)]).into_owned();
                // The way to leave. Nobody waits for the answer.
                let _ = send(stream, &OptionHead { option: OPTION_ABORT, length: 0 }.encode(), &[]);
                return Err(HagglingError::Refused { code, message });
            }
            (kind, _) => {
                return Err(WireError::Unexpected { what: "a reply of kind", found: kind.into() }.into());
            }
        }
    }
    Err(WireError::Endless(MAX_ROUNDS).into())
}

fn reply(stream: &UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    send(stream, &OptionReplyHead { option, kind, length }.encode(), data)
}

fn send(stream: &UnixStream, head: &[u8], data: &[u8]) -> io::Result<()> {
    socket::write_parts(stream, &mut [IoSlice::new(head), IoSlice::new(data)])
}
