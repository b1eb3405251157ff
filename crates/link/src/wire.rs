//! The link's own messages as they travel. Runtime types are elsewhere; [`crate::hello`] translates.
//!
//! Field numbers are never reused. Peers ignore fields they do not know, so a field may be added without a new
//! protocol version as long as its absence means what it meant before.

/// What the side that connects says first.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Hello {
    /// Lowest protocol version spoken; from 1.
    #[prost(uint32, tag = "1")]
    pub(crate) min_version: u32,
    /// Highest protocol version spoken.
    #[prost(uint32, tag = "2")]
    pub(crate) max_version: u32,
    /// The agent's name, for logs. What counts is the name in the certificate.
    #[prost(string, tag = "3")]
    pub(crate) agent: String,
    /// What the connection is for.
    #[prost(oneof = "Purpose", tags = "4, 5")]
    pub(crate) purpose: Option<Purpose>,
}

/// What a connection is for.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Purpose {
    /// Control messages, both ways.
    #[prost(message, tag = "4")]
    Control(Control),
    /// Data, from the side that connects to the side that accepts.
    #[prost(message, tag = "5")]
    Data(Data),
}

/// A control connection has no parameters yet.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Control {}

/// The parameters of a data connection.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Data {
    /// The session that it belongs to: the 16 bytes of a UUID.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) session: Vec<u8>,
    /// Which of the session's streams; at most 65535.
    #[prost(uint32, tag = "2")]
    pub(crate) stream: u32,
}

/// The answer to a hello.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Answer {
    /// Yes or no.
    #[prost(oneof = "Verdict", tags = "1, 2, 3")]
    pub(crate) verdict: Option<Verdict>,
}

/// Yes or no to a hello.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Verdict {
    /// Welcome.
    #[prost(message, tag = "1")]
    Accepted(Accepted),
    /// No version in common.
    #[prost(message, tag = "2")]
    NoSharedVersion(NoSharedVersion),
    /// Not wanted, with the reason in words.
    #[prost(message, tag = "3")]
    Refused(Refused),
}

/// Welcome.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Accepted {
    /// The version both will speak: the highest one in common.
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
}

/// No version in common.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct NoSharedVersion {
    /// Lowest version of the side that accepts.
    #[prost(uint32, tag = "1")]
    pub(crate) min_version: u32,
    /// Its highest.
    #[prost(uint32, tag = "2")]
    pub(crate) max_version: u32,
}

/// Not wanted.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Refused {
    /// Why, for a person.
    #[prost(string, tag = "1")]
    pub(crate) reason: String,
}
