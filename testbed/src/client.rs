//! The client host: measures from the network what a guest's users would notice.

mod echo;
mod heartbeats;
mod journal;
mod postgresql;

use std::ffi::OsStr;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;

use guest::disk::Verdict;
use guest::service::{CONTROL_PORT, ECHO_PORT, HEARTBEAT_PORT, JOURNAL_PORT};
use guest::status::Status;

pub use echo::{Echo, EchoReport};
pub use heartbeats::{HeartbeatReport, Heartbeats};
pub use journal::{Journal, JournalReport};
pub use postgresql::{Log, Pgbench, PgbenchReport, Summary};

use crate::TestbedError;
use crate::namespace::Namespace;

/// How long an answer to a question may take before it is asked again, and how often it is.
const ANSWER: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 10;
/// How long the answer to a command may take that cannot be given again: a guest told twice would reboot twice.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// How often the answer to a question is asked for that takes a guest a while.
const LONG_ATTEMPTS: usize = 120;
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);

/// Frames that wait for a guest in its tap: the kernel's `txqueuelen` of a tap.
const TAP_QUEUE: u64 = 1000;

/// The client host.
#[derive(Debug)]
pub struct Client {
    namespace: Arc<Namespace>,
}

impl Client {
    pub(crate) fn in_namespace(namespace: Arc<Namespace>) -> Self {
        Self { namespace }
    }

    /// A command that will run on this host. The child's pid is the program's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.namespace.command(program);
        command.stdin(Stdio::null());
        command
    }

    /// Sends that many heartbeats per second to a guest (1000 show a pause to the millisecond) and notes what comes back.
    ///
    /// # Errors
    /// Where there is no socket to be had.
    pub fn heartbeats(&self, guest: Ipv4Addr, per_second: u32) -> Result<Heartbeats, TestbedError> {
        self.paced(guest, per_second, u64::MAX)
    }

    /// As [`Client::heartbeats`], but never more at once than a tap has room for: a guest that gets no CPU time for a while, or a client that makes
    /// up for having had none, loses none by that.
    ///
    /// # Errors
    /// Where there is no socket to be had.
    pub fn heartbeats_as_taken(&self, guest: Ipv4Addr, per_second: u32) -> Result<Heartbeats, TestbedError> {
        self.paced(guest, per_second, TAP_QUEUE / 2)
    }

    fn paced(&self, guest: Ipv4Addr, per_second: u32, at_once: u64) -> Result<Heartbeats, TestbedError> {
        let socket = self.socket(guest, HEARTBEAT_PORT)?;
        Heartbeats::start(socket, per_second, at_once).map_err(TestbedError::Network)
    }

    /// Opens that many TCP connections to a guest, each sending a pattern and comparing what comes back.
    ///
    /// # Errors
    /// Where one cannot be opened.
    pub fn echo(&self, guest: Ipv4Addr, connections: usize) -> Result<Echo, TestbedError> {
        let address = SocketAddrV4::new(guest, ECHO_PORT).into();
        self.namespace.enter(|| Echo::start(address, connections))?.map_err(TestbedError::Network)
    }

    /// The guest's status, from itself.
    ///
    /// # Errors
    /// As [`Client::tell`].
    pub fn status(&self, guest: Ipv4Addr) -> Result<Status, TestbedError> {
        self.tell(guest, "status")
    }

    /// Listens for what the journal on the guest's disk with that serial number acknowledges, from now on and whenever the guest
    /// can be reached.
    ///
    /// # Errors
    /// Where there is no thread to be had.
    pub fn journal(&self, guest: Ipv4Addr, serial: &str) -> Result<Journal, TestbedError> {
        let namespace = Arc::clone(&self.namespace);
        let address = SocketAddrV4::new(guest, JOURNAL_PORT).into();
        let connect = move || {
            namespace.enter(|| TcpStream::connect_timeout(&address, CONNECT)).map_err(io::Error::other)?
        };
        Journal::start(serial, connect).map_err(TestbedError::Network)
    }

    /// Has the guest read back everything that its test disks must hold, while it goes on writing.
    ///
    /// # Errors
    /// Where no answer comes.
    pub fn check_disks(&self, guest: Ipv4Addr) -> Result<Verdict, TestbedError> {
        self.ask(guest, "check")
    }

    /// Has the guest end its work on its test disks for good, with everything written and file systems unmounted.
    ///
    /// # Errors
    /// Where no answer comes, or it cannot.
    pub fn quiet_disks(&self, guest: Ipv4Addr) -> Result<Status, TestbedError> {
        self.tell(guest, "quiet")
    }

    /// Gives the guest a command (`pause`, `resume`, `rate N`, `quiet`, `poweroff`, `reboot`, `panic`); gives back the status it
    /// answers with.
    ///
    /// # Errors
    /// Where no answer comes, or one that is no status, as to a command it does not know.
    pub fn tell(&self, guest: Ipv4Addr, command: &str) -> Result<Status, TestbedError> {
        self.ask(guest, command)
    }

    fn ask<T: DeserializeOwned>(&self, guest: Ipv4Addr, command: &str) -> Result<T, TestbedError> {
        let socket = self.socket(guest, CONTROL_PORT)?;
        let answer = ask(&socket, command).map_err(TestbedError::Network)?;
        serde_json::from_str(&answer).map_err(|_| TestbedError::Answer(answer))
    }

    /// A TCP connection to the guest whose bytes it sends back.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn connection(&self, guest: Ipv4Addr) -> Result<TcpStream, TestbedError> {
        let address = SocketAddrV4::new(guest, ECHO_PORT).into();
        self.namespace.enter(|| TcpStream::connect_timeout(&address, CONNECT))?.map_err(TestbedError::Network)
    }

    /// A UDP socket of the client, connected to a port of the guest.
    ///
    /// # Errors
    /// Where there is none to be had.
    pub fn socket(&self, guest: Ipv4Addr, port: u16) -> Result<UdpSocket, TestbedError> {
        let connect = || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect((guest, port))?;
            Ok(socket)
        };
        self.namespace.enter(connect)?.map_err(TestbedError::Network)
    }
}

/// Asks until there is an answer: a datagram may get lost, and every command but those that end the guest can be given twice.
fn ask(socket: &UdpSocket, question: &str) -> io::Result<String> {
    let (attempts, patience) = match question {
        "reboot" | "poweroff" | "panic" => (1, LAST_ANSWER),
        // Asked again, it is the same question: the guest does not begin anew.
        "check" | "quiet" => (LONG_ATTEMPTS, ANSWER),
        _ => (ATTEMPTS, ANSWER),
    };
    socket.set_read_timeout(Some(patience))?;
    let mut answer = [0; 2048];
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for _ in 0..attempts {
        // Refused while nothing listens, as before the guest is ready: worth another attempt, as silence is.
        match socket.send(question.as_bytes()).and_then(|_| socket.recv(&mut answer)) {
            Ok(length) => return Ok(String::from_utf8_lossy(&answer[..length]).into_owned()),
            Err(error) => last = error,
        }
    }
    Err(last)
}
