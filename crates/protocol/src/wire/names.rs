//! What messages are called, for whoever is told that one is out of place: its content is the peer's, and may be long.

use std::fmt;

use super::{Reply, Request};

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Request::Reserve(_) => "Reserve",
            Request::HoldDevices(_) => "HoldDevices",
            Request::DeviceState(_) => "DeviceState",
            Request::Audit(_) => "Audit",
            Request::Load(_) => "Load",
            Request::Commit(_) => "Commit",
            Request::Release(_) => "Release",
            Request::Cancel(_) => "Cancel",
            Request::PostCopy(_) => "PostCopy",
            Request::Resume(_) => "Resume",
            Request::FilePart(_) => "FilePart",
            Request::Known(_) => "Known",
            Request::EndForwarding(_) => "EndForwarding",
            Request::Whose(_) => "Whose",
            Request::Released(_) => "Released",
        })
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reply::Reserved(_) => "Reserved",
            Reply::Refused(_) => "Refused",
            Reply::Barrier(_) => "Barrier",
            Reply::Mismatch(_) => "Mismatch",
            Reply::Audited(_) => "Audited",
            Reply::Ready(_) => "Ready",
            Reply::Failed(_) => "Failed",
            Reply::Running(_) => "Running",
            Reply::Health(_) => "Health",
            Reply::Cancelled(_) => "Cancelled",
            Reply::PostCopyReady(_) => "PostCopyReady",
            Reply::Wanted(_) => "Wanted",
            Reply::Supplied(_) => "Supplied",
            Reply::Missing(_) => "Missing",
            Reply::Holds(_) => "Holds",
            Reply::WrongBlocks(_) => "WrongBlocks",
            Reply::Lacking(_) => "Lacking",
            Reply::ForwardingEnded(_) => "ForwardingEnded",
            Reply::Working(_) => "Working",
            Reply::Belongs(_) => "Belongs",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::{Debug, Display};

    use prost::Message;

    use super::super::{ToDestination, ToSource};

    /// More than there are.
    const TAGS: u32 = 1000;

    /// Every kind of message in one direction, by its tag: an empty one of each is decoded.
    fn kinds<M: Message + Default, K: Debug + Display>(
        kind: impl Fn(M) -> Option<K>,
    ) -> BTreeMap<u32, String> {
        let of_tag = |tag| {
            let mut empty = Vec::new();
            prost::encoding::encode_key(tag, prost::encoding::WireType::LengthDelimited, &mut empty);
            prost::encoding::encode_varint(0, &mut empty);
            let kind = kind(M::decode(&empty[..]).unwrap())?;
            let name = kind.to_string();
            assert!(format!("{kind:?}").starts_with(&format!("{name}(")), "{name}: {kind:?}");
            Some((tag, name))
        };
        (1..TAGS).filter_map(of_tag).collect()
    }

    #[test]
    fn the_protocol_has_every_message_with_its_tag_and_name() {
        let text = include_str!("../../../../docs/protocol.md");
        let table = text.split("\n## Control messages\n").nth(1).expect("a chapter of messages");
        let table = table.split("```").next().unwrap();
        let mut told = [BTreeMap::new(), BTreeMap::new()];
        for row in table.lines().filter(|line| line.starts_with("| ")).skip(2) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            for (told, message) in told.iter_mut().zip([&cells[1..3], &cells[3..5]]) {
                let Some((tag, name)) = message[0].split_once(' ') else {
                    assert_eq!(message, ["", ""], "no tag and name: {row}");
                    continue;
                };
                assert!(!message[1].is_empty(), "nothing is said of {name}");
                assert_eq!(told.insert(tag.parse().unwrap(), name.to_owned()), None, "twice: {row}");
            }
        }
        let there = kinds(|to: ToDestination| to.request);
        let back = kinds(|to: ToSource| to.reply);
        assert!(there.len() >= 15 && back.len() >= 20, "{there:?}, {back:?}");
        assert_eq!(told, [there, back]);
    }
}
