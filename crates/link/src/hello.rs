//! The first words on every connection: who speaks, which versions, and what the connection is for.
//!
//! ```text
//!  connector                                   acceptor
//!     │  "vmirror\x01"  length  Hello             │
//!     │ ─────────────────────────────────────────►│  version shared? admitted?
//!     │  "vmirror\x01"  length  Answer            │
//!     │ ◄─────────────────────────────────────────│
//! ```
//! The envelope (8 bytes of magic, length as 4 bytes big-endian, at most [`MAX_HELLO`]) is the same in every
//! protocol version to come, so that two agents of any age can at least tell each other that they do not match.

use prost::Message;
use uuid::Uuid;

use crate::error::HelloError;
use crate::versions::VersionRange;
use crate::wire;

/// The first bytes of every hello and answer.
pub(crate) const MAGIC: [u8; 8] = *b"vmirror\x01";
/// The longest hello or answer, in bytes without the envelope.
pub(crate) const MAX_HELLO: usize = 4096;
/// The envelope's size: magic and length.
pub(crate) const ENVELOPE: usize = MAGIC.len() + 4;
/// The longest text taken over from a peer, in characters.
const MAX_TEXT: usize = 512;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Control messages, both ways.
    Control,
    /// One data stream, from the side that connects to the side that accepts.
    Data(DataHello),
}

/// Which stream a data connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DataHello {
    /// The session that the two agents agreed on over their control connection. Whether it belongs to this
    /// very peer is for the caller to check.
    pub session: Uuid,
    /// The stream's number within the session.
    pub stream: u16,
}

/// What the connecting side says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) versions: VersionRange,
    pub(crate) agent: String,
    pub(crate) purpose: Purpose,
}

/// What the accepting side answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Accepted { version: u32 },
    NoSharedVersion { theirs: VersionRange },
    Refused { reason: String },
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        envelope(&wire::Hello {
            min_version: self.versions.min(),
            max_version: self.versions.max(),
            agent: printable(&self.agent),
            purpose: Some(match self.purpose {
                Purpose::Control => wire::Purpose::Control(wire::Control {}),
                Purpose::Data(DataHello { session, stream }) => wire::Purpose::Data(wire::Data {
                    session: session.as_bytes().to_vec(),
                    stream: u32::from(stream),
                }),
            }),
        })
    }

    /// Decodes what is inside the envelope.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, HelloError> {
        let hello = wire::Hello::decode(body).map_err(HelloError::Decode)?;
        let purpose = match hello.purpose.ok_or(HelloError::Missing("purpose"))? {
            wire::Purpose::Control(wire::Control {}) => Purpose::Control,
            wire::Purpose::Data(data) => Purpose::Data(DataHello {
                session: Uuid::from_slice(&data.session).map_err(|_| HelloError::Invalid {
                    field: "session",
                    value: format!("{} bytes", data.session.len()),
                })?,
                stream: u16::try_from(data.stream)
                    .map_err(|_| HelloError::Invalid { field: "stream", value: data.stream.to_string() })?,
            }),
        };
        let versions = versions(hello.min_version, hello.max_version)?;
        Ok(Self { versions, agent: printable(&hello.agent), purpose })
    }
}

impl Answer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        envelope(&wire::Answer {
            verdict: Some(match self {
                Self::Accepted { version } => wire::Verdict::Accepted(wire::Accepted { version: *version }),
                Self::NoSharedVersion { theirs } => wire::Verdict::NoSharedVersion(wire::NoSharedVersion {
                    min_version: theirs.min(),
                    max_version: theirs.max(),
                }),
                Self::Refused { reason } => {
                    wire::Verdict::Refused(wire::Refused { reason: printable(reason) })
                }
            }),
        })
    }

    /// Decodes what is inside the envelope; `offered` is what our hello said.
    pub(crate) fn decode(body: &[u8], offered: VersionRange) -> Result<Self, HelloError> {
        let answer = wire::Answer::decode(body).map_err(HelloError::Decode)?;
        match answer.verdict.ok_or(HelloError::Missing("verdict"))? {
            wire::Verdict::Accepted(wire::Accepted { version }) => {
                if !offered.contains(version) {
                    return Err(HelloError::Invalid { field: "version", value: version.to_string() });
                }
                Ok(Self::Accepted { version })
            }
            wire::Verdict::NoSharedVersion(wire::NoSharedVersion { min_version, max_version }) => {
                Ok(Self::NoSharedVersion { theirs: versions(min_version, max_version)? })
            }
            wire::Verdict::Refused(wire::Refused { reason }) => {
                Ok(Self::Refused { reason: printable(&reason) })
            }
        }
    }
}

/// Checks the envelope and gives the body's length.
pub(crate) fn body_length(envelope: &[u8; ENVELOPE]) -> Result<usize, HelloError> {
    let [magic @ .., a, b, c, d] = *envelope;
    if magic != MAGIC {
        return Err(HelloError::Magic(magic));
    }
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length > MAX_HELLO {
        return Err(HelloError::TooLong { length, limit: MAX_HELLO });
    }
    Ok(length)
}

fn versions(min: u32, max: u32) -> Result<VersionRange, HelloError> {
    VersionRange::new(min, max)
        .ok_or_else(|| HelloError::Invalid { field: "versions", value: format!("{min} to {max}") })
}

fn envelope(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut bytes = Vec::with_capacity(ENVELOPE + body.len());
    bytes.extend_from_slice(&MAGIC);
    // Every text in it is cut by `printable`, so a body always fits.
    bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// Text of a peer as it may be shown on a terminal and written to a log: short, and without control characters.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(MAX_TEXT).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn purposes() -> impl Strategy<Value = Purpose> {
        prop_oneof![
            Just(Purpose::Control),
            (any::<[u8; 16]>(), any::<u16>()).prop_map(|(session, stream)| Purpose::Data(DataHello {
                session: Uuid::from_bytes(session),
                stream
            })),
        ]
    }

    fn ranges() -> impl Strategy<Value = VersionRange> {
        (1..=u32::MAX, 1..=u32::MAX)
            .prop_map(|(a, b)| VersionRange::new(a.min(b), a.max(b)).expect("ordered and from 1"))
    }

    fn open(bytes: &[u8]) -> &[u8] {
        let (head, body) = bytes.split_first_chunk::<ENVELOPE>().expect("an envelope");
        assert_eq!(body_length(head).expect("own envelope"), body.len());
        body
    }

    proptest! {
        #[test]
        fn a_hello_survives_the_wire(versions in ranges(), agent in "[a-zäö.-]{0,64}", purpose in purposes()) {
            let hello = Hello { versions, agent, purpose };
            prop_assert_eq!(Hello::decode(open(&hello.encode())).expect("own hello"), hello);
        }

        #[test]
        fn an_answer_survives_the_wire(offered in ranges(), theirs in ranges(), reason in "\\PC{0,200}") {
            for answer in [
                Answer::Accepted { version: offered.max() },
                Answer::NoSharedVersion { theirs },
                Answer::Refused { reason: printable(&reason) },
            ] {
                prop_assert_eq!(Answer::decode(open(&answer.encode()), offered).expect("own answer"), answer);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), offered in ranges()) {
            let _ = Hello::decode(&bytes);
            let _ = Answer::decode(&bytes, offered);
            if let Some(Ok(length)) = bytes.first_chunk().map(body_length) { prop_assert!(length <= MAX_HELLO) }
        }

        #[test]
        fn a_text_of_any_length_fits_the_limit(text in "\\PC{0,3000}") {
            let hello = Hello { versions: VersionRange::SPOKEN, agent: text.clone(), purpose: Purpose::Control };
            prop_assert!(hello.encode().len() <= ENVELOPE + MAX_HELLO);
            let answer = Answer::Refused { reason: text };
            prop_assert!(answer.encode().len() <= ENVELOPE + MAX_HELLO);
        }
    }

    #[test]
    fn an_impossible_length_is_refused_before_it_is_allocated() {
        let mut head = [0xff; ENVELOPE];
        head[..8].copy_from_slice(&MAGIC);
        assert!(matches!(
            body_length(&head),
            Err(HelloError::TooLong { length: 0xffff_ffff, limit: MAX_HELLO })
        ));
    }

    #[test]
    fn a_version_that_was_not_offered_is_refused() {
        let answer = Answer::Accepted { version: 9 }.encode();
        assert!(matches!(
            Answer::decode(open(&answer), VersionRange::new(1, 3).expect("valid")),
            Err(HelloError::Invalid { field: "version", .. })
        ));
    }

    #[test]
    fn control_characters_of_a_peer_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
