//! The connection: one task reads, one writes, any number of handles send commands at the same time.
//!
//! QEMU answers commands in order but sends events in between; each command carries a number that its answer
//! repeats. A command whose future is dropped is still sent whole, and its answer is thrown away.

mod read_half;
mod reading;

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::error::QmpError;
use super::expecting::Expecting;
use qapi::Command;
use read_half::ReadHalf;
use reading::{Lines, read_task};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::AsyncWriteExt,
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{broadcast, mpsc, oneshot},
    time::timeout,
};

/// How long QEMU may take to greet, and to accept a connection. It greets at once unless another client is connected.
pub const GREETING_DEADLINE: Duration = Duration::from_secs(3);
/// How long to wait before the next attempt while the socket's queue is full.
const QUEUE_FULL: Duration = Duration::from_millis(20);
/// How long QEMU may take to answer. Commands run on its main loop, which can be busy for seconds (loading device
/// state of big machines, draining slow disks), so this is for a QEMU that hangs.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// Events that a slow receiver can be behind before it is told that it missed some.
const EVENTS_KEPT: usize = 4096;

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, ….
    pub name: String,
    /// When QEMU stamped it, on the host's realtime clock; microseconds.
    pub timestamp: SystemTime,
    /// When it was read here.
    pub received: Instant,
    /// Its data; null if it has none.
    pub data: Value,
    /// A STOP or RESUME that [`Qmp::quiesce`] or [`Qmp::unquiesce`] has brought about: the guest's state has not changed for
    /// anybody else.
    pub ours: bool,
}

/// A handle to QEMU's monitor. Clones share the connection; it closes when the last one is dropped, and QEMU then
/// accepts another client on the socket.
#[derive(Debug, Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    greeting: Value,
    requests: mpsc::UnboundedSender<Request>,
    events: broadcast::WeakSender<Event>,
    peer: Option<u32>,
    /// What we are about to bring about for a moment.
    expecting: Arc<Expecting>,
    read_half: Arc<ReadHalf>,
}

struct Request {
    line: Vec<u8>,
    /// Goes with the line.
    descriptor: Option<OwnedFd>,
    id: u64,
    answer: oneshot::Sender<Answer>,
    /// Told right before the line is written.
    expecting: Option<Arc<Expecting>>,
}

/// What goes with a command.
#[derive(Default)]
struct With {
    descriptor: Option<OwnedFd>,
    expecting: Option<Arc<Expecting>>,
}

enum Answer {
    Return(Value),
    Error(ErrorBody),
}

#[derive(Deserialize)]
struct ErrorBody {
    class: String,
    desc: String,
}

/// Commands sent and not answered yet. None once the connection has ended.
type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>>;

impl Qmp {
    /// Connects and leaves QEMU ready for commands.
    ///
    /// # Errors
    /// [`QmpError::Connect`] if there is no socket or nobody listens; [`QmpError::Taken`] if another client has it.
    pub async fn connect(socket: &Path) -> Result<Qmp, QmpError> {
        let failed = |source| QmpError::Connect { socket: socket.to_owned(), source };
        let taken = || QmpError::Taken { socket: socket.to_owned() };
        let stream =
            timeout(GREETING_DEADLINE, connect(socket)).await.map_err(|_| taken())?.map_err(failed)?;
        let peer =
            stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
        let (read, write) = stream.into_split();
        let read_half = Arc::new(ReadHalf::new(read));
        let mut lines = Lines { read_half: Arc::clone(&read_half), buffer: Vec::new(), searched: 0 };
        let line = timeout(GREETING_DEADLINE, lines.next()).await.map_err(|_| taken())?.map_err(failed)?;
        // A socket that closes at once has a QEMU behind it that is just exiting.
        let line = line.ok_or_else(|| failed(io::ErrorKind::ConnectionReset.into()))?;
        let greeting = serde_json::from_slice::<Value>(&line)
            .ok()
            .and_then(|mut line| Some(line.get_mut("QMP")?.take()));
        let Some(greeting) = greeting else {
            let text = String::from_utf8_lossy(&line).chars().take(80).collect();
            return Err(QmpError::NotQmp { socket: socket.to_owned(), text });
        };
        let (requests, queue) = mpsc::unbounded_channel();
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let expecting = Arc::new(Expecting::default());
        let shared = Shared {
            socket: socket.to_owned(),
            greeting,
            requests,
            events: events.downgrade(),
            peer,
            expecting: Arc::clone(&expecting),
            read_half,
        };
        let pending = Pending::new(Mutex::new(Some(HashMap::new())));
        let (closed, until_closed) = oneshot::channel();
        tokio::spawn(read_task(lines, events, Arc::clone(&pending), expecting, until_closed));
        tokio::spawn(write_task(write, queue, pending, closed));
        let qmp = Qmp { shared: Arc::new(shared) };
        qmp.execute(Capabilities {}).await?;
        Ok(qmp)
    }

    /// Runs a command and waits for its answer, at most 30 seconds.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's words, [`QmpError::Gone`], [`QmpError::Deadline`].
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Ok, QmpError> {
        self.execute_within(command, COMMAND_DEADLINE).await
    }

    /// Runs a command and waits for its answer for as long as is said.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_within<C: Command>(
        &self,
        command: C,
        deadline: Duration,
    ) -> Result<C::Ok, QmpError> {
        let arguments =
            serde_json::to_value(&command).map_err(|source| QmpError::Encode { command: C::NAME, source })?;
        let value = self.run(C::NAME, arguments, With::default(), deadline).await?;
        C::Ok::deserialize(&value).map_err(|source| {
            let answer = value.to_string().chars().take(200).collect();
            QmpError::Answer { command: C::NAME, answer, source }
        })
    }

    /// Runs a command by name, untyped.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_raw(&self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.run(command, arguments, With::default(), COMMAND_DEADLINE).await
    }

    /// Runs a command that brings about an event, and nothing else, untyped. Returns whether it did.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub(super) async fn bring_about(
        &self,
        command: &'static str,
        event: &'static str,
    ) -> Result<bool, QmpError> {
        let expecting = &self.shared.expecting;
        expecting.begin(event);
        let with = With { expecting: Some(Arc::clone(expecting)), ..With::default() };
        let result = self.run(command, Value::Null, with, COMMAND_DEADLINE).await;
        // QEMU tells what a command does before it answers it.
        let brought_about = expecting.end();
        result.map(|_| brought_about)
    }

    /// Runs a command that takes a descriptor (SCM_RIGHTS), untyped.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub(super) async fn execute_with(
        &self,
        command: &'static str,
        arguments: Value,
        descriptor: OwnedFd,
    ) -> Result<Value, QmpError> {
        let with = With { descriptor: Some(descriptor), ..With::default() };
        self.run(command, arguments, with, COMMAND_DEADLINE).await
    }

    async fn run(
        &self,
        command: &'static str,
        arguments: Value,
        with: With,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let gone = || QmpError::Gone { socket: self.shared.socket.clone(), command };
        let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut request = serde_json::json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        let (answer, answered) = oneshot::channel();
        let With { descriptor, expecting } = with;
        let request = Request { line, descriptor, id, answer, expecting };
        self.shared.requests.send(request).map_err(|_| gone())?;
        match timeout(deadline, answered).await {
            Ok(Ok(Answer::Return(value))) => Ok(value),
            Ok(Ok(Answer::Error(ErrorBody { class, desc }))) => {
                Err(QmpError::Refused { command, class, desc })
            }
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(QmpError::Deadline { command, after: deadline }),
        }
    }

    /// What happens from now on. The receiver ends when the connection does.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match self.shared.events.upgrade() {
            Some(events) => events.subscribe(),
            // The connection has ended; so has this receiver.
            None => broadcast::channel(1).1,
        }
    }

    /// How many events have come, however many of them were looked at.
    pub(super) fn event_count(&self) -> u64 {
        self.shared.read_half.event_count()
    }

    /// QEMU has answered, to a question of this moment, that its guest runs; so many events had come when it was asked.
    pub(super) fn note_running(&self, asked: Instant, events: u64) {
        self.shared.read_half.note_running(asked, events);
    }

    /// Whether the guest runs, as QEMU has said within that time, and has told nothing of any kind since. No question is asked: a guest
    /// that stops running is told of, to everybody and before whoever stops it has an answer. That QEMU hangs since is not noticed.
    #[must_use]
    pub fn is_known_to_run(&self, within: Duration) -> bool {
        self.shared.read_half.is_known_to_run(within)
    }

    /// The socket of the connection.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// The process that listens at the other end, as the kernel says (SO_PEERCRED). None where it is not visible here.
    #[must_use]
    pub fn peer(&self) -> Option<u32> {
        self.shared.peer
    }

    /// QEMU's greeting: version and capabilities.
    #[must_use]
    pub fn greeting(&self) -> &Value {
        &self.shared.greeting
    }
}

/// Connects, and waits while the socket's queue is full: QEMU's holds one client besides the one that it talks to, and
/// a unix socket says so with EAGAIN instead of letting the caller wait.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(QUEUE_FULL).await,
            result => return result,
        }
    }
}

/// `qmp_capabilities` with none asked for: ends the negotiation.
#[derive(serde::Serialize)]
struct Capabilities {}

impl Command for Capabilities {
    type Ok = Value;
    const NAME: &'static str = "qmp_capabilities";
    const ALLOW_OOB: bool = false;
}

async fn write_task(
    mut write: OwnedWriteHalf,
    mut requests: mpsc::UnboundedReceiver<Request>,
    pending: Pending,
    closed: oneshot::Sender<()>,
) {
    while let Some(Request { line, descriptor, id, answer, expecting }) = requests.recv().await {
        // Entered before it is sent, so that the answer cannot come first.
        match pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(waiting) => waiting.insert(id, answer),
            None => break,
        };
        if let Some(expecting) = expecting {
            expecting.written();
        }
        let sent = match descriptor {
            Some(descriptor) => write_with(&write, &line, &descriptor).await,
            None => Ok(0),
        };
        let written = match sent {
            Ok(sent) => write.write_all(line.get(sent..).unwrap_or_default()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::debug!(%error, "QMP connection broke while writing");
            break;
        }
    }
    // The last handle is gone, or the connection is: the reader shall end too, which closes the socket.
    drop(closed);
}

/// Writes the beginning of a line, and a descriptor with it. Returns how much of the line has gone.
async fn write_with(write: &OwnedWriteHalf, line: &[u8], descriptor: &OwnedFd) -> io::Result<usize> {
    let stream: &UnixStream = write.as_ref();
    loop {
        stream.writable().await?;
        let sent = stream.try_io(tokio::io::Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let descriptors = [descriptor.as_fd()];
            // There is room for one.
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            let sent = sendmsg(stream, &[io::IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL);
            sent.map_err(io::Error::from)
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return sent,
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
