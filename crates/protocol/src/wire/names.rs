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
