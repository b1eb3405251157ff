//! Why a command or a connection failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a command or a connection failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the QMP socket {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Connected, but no greeting: QEMU talks to one client per socket, and another one is connected.
    #[error(
        "QEMU does not answer on {}: another program is connected to this QMP socket, or QEMU hangs. Give QEMU a second \
         one (-qmp unix:/another/path,server=on,wait=off) or end the other connection", socket.display()
    )]
    Taken {
        /// The socket.
        socket: PathBuf,
    },
    /// What came first is not a QMP greeting.
    #[error("{} is not a QMP socket: it began with {text:?}", socket.display())]
    NotQmp {
        /// The socket.
        socket: PathBuf,
        /// The beginning of what came.
        text: String,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command's name.
        command: &'static str,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// The connection ended: QEMU has exited or closed it.
    #[error("QEMU has closed the connection {} (during {command})", socket.display())]
    Gone {
        /// The socket.
        socket: PathBuf,
        /// The command's name.
        command: &'static str,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {after:?}")]
    Deadline {
        /// The command's name.
        command: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// An argument that cannot be written as JSON.
    #[error("the arguments of {command} cannot be encoded")]
    Encode {
        /// The command's name.
        command: &'static str,
        /// What serde says.
        #[source]
        source: serde_json::Error,
    },
    /// An answer of another form than expected.
    #[error("QEMU's answer to {command} is not of the expected form: {answer}")]
    Answer {
        /// The command's name.
        command: &'static str,
        /// The answer, cut short.
        answer: String,
        /// What serde says.
        #[source]
        source: serde_json::Error,
    },
}
