//! The connection: one task reads, one writes, any number of handles send commands at the same time.
//!
//! QEMU answers commands in order but sends events in between; each command carries a number that its answer
//! repeats. A command whose future is dropped is still sent whole, and its answer is thrown away.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use qapi::Command;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, mpsc, oneshot},
    time::timeout,
};

/// How long QEMU may take to greet, and to accept a connection. It greets at once unless another client is connected.
const GREETING_DEADLINE: Duration = Duration::from_secs(3);
/// How long to wait before the next attempt while the socket's queue is full.
const QUEUE_FULL: Duration = Duration::from_millis(20);
/// How long QEMU may take to answer. Commands run on its main loop, which can be busy for seconds (loading device
/// state of big machines, draining slow disks), so this is for a QEMU that hangs.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// Longest line that is accepted. The largest answers (schemas, full block graphs) are below 1 MiB.
const LONGEST_LINE: usize = 64 << 20;
/// Events that a slow receiver can be behind before it is told that it missed some.
const EVENTS_KEPT: usize = 4096;

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
    /// The guest is being stopped, or let go on, by us and for a moment.
    quiescing: Arc<AtomicBool>,
}

struct Request {
    line: Vec<u8>,
    /// Goes with the line.
    descriptor: Option<OwnedFd>,
    id: u64,
    answer: oneshot::Sender<Answer>,
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
        let mut lines = Lines { read, buffer: Vec::new(), searched: 0 };
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
        let quiescing = Arc::new(AtomicBool::new(false));
        let shared = Shared {
            socket: socket.to_owned(),
            greeting,
            requests,
            events: events.downgrade(),
            peer,
            quiescing: Arc::clone(&quiescing),
        };
        let pending = Pending::new(Mutex::new(Some(HashMap::new())));
        let (closed, until_closed) = oneshot::channel();
        tokio::spawn(read_task(lines, events, Arc::clone(&pending), quiescing, until_closed));
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
        let value = self.run(C::NAME, arguments, None, deadline).await?;
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
        self.run(command, arguments, None, COMMAND_DEADLINE).await
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
        self.run(command, arguments, Some(descriptor), COMMAND_DEADLINE).await
    }

    async fn run(
        &self,
        command: &'static str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
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
        self.shared.requests.send(Request { line, descriptor, id, answer }).map_err(|_| gone())?;
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

    /// Stops the guest's CPUs for a moment, with all I/O drained: no device writes its memory from when this returns until
    /// [`Qmp::unquiesce`]. Returns false, and has done nothing, where it does not run.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; the guest may be stopped or not.
    pub async fn quiesce(&self) -> Result<bool, QmpError> {
        if !self.status().await?.running {
            return Ok(false);
        }
        self.expecting(self.stop()).await.map(|()| true)
    }

    /// Lets a guest go on that [`Qmp::quiesce`] has stopped.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn unquiesce(&self) -> Result<(), QmpError> {
        self.expecting(self.cont()).await
    }

    /// QEMU tells what a command does before it answers it: events that come in between are its own.
    async fn expecting<T>(&self, command: impl Future<Output = T>) -> T {
        self.shared.quiescing.store(true, Ordering::Release);
        let result = command.await;
        self.shared.quiescing.store(false, Ordering::Release);
        result
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
    while let Some(Request { line, descriptor, id, answer }) = requests.recv().await {
        // Entered before it is sent, so that the answer cannot come first.
        match pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(waiting) => waiting.insert(id, answer),
            None => break,
        };
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

async fn read_task(
    mut lines: Lines,
    events: broadcast::Sender<Event>,
    pending: Pending,
    quiescing: Arc<AtomicBool>,
    mut closed: oneshot::Receiver<()>,
) {
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            _ = &mut closed => break,
        };
        match line {
            Ok(Some(line)) => dispatch(&line, &events, &pending, quiescing.load(Ordering::Acquire)),
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "QMP connection broke while reading");
                break;
            }
        }
    }
    // Everyone still waiting learns that there will be no answer.
    *pending.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// One line from QEMU. Each member is optional, so that nothing in it can break the stream.
#[derive(Deserialize)]
struct Line {
    event: Option<String>,
    timestamp: Option<Timestamp>,
    data: Option<Value>,
    id: Option<Value>,
    error: Option<ErrorBody>,
    #[serde(rename = "return")]
    result: Option<Value>,
}

/// QEMU writes -1 in both where the host's clock could not be read.
#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

fn dispatch(line: &[u8], events: &broadcast::Sender<Event>, pending: &Pending, quiescing: bool) {
    let received = Instant::now();
    let line: Line = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => {
            tracing::warn!(%error, line = %String::from_utf8_lossy(line), "a line from QEMU is not understood");
            return;
        }
    };
    if let Some(name) = line.event {
        let timestamp = line.timestamp.and_then(|stamp| {
            let since = Duration::from_secs(u64::try_from(stamp.seconds).ok()?)
                + Duration::from_micros(u64::try_from(stamp.microseconds).ok()?);
            SystemTime::UNIX_EPOCH.checked_add(since)
        });
        let ours = quiescing && matches!(name.as_str(), "STOP" | "RESUME");
        let event = Event {
            ours,
            name,
            timestamp: timestamp.unwrap_or_else(SystemTime::now),
            received,
            data: line.data.unwrap_or(Value::Null),
        };
        // An error only says that nobody listens.
        drop(events.send(event));
        return;
    }
    let id = line.id.as_ref().and_then(Value::as_u64);
    let waiting =
        id.and_then(|id| pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.remove(&id));
    let Some(waiting) = waiting else {
        tracing::debug!(?id, "an answer from QEMU that nobody waits for");
        return;
    };
    let answer = match line.error {
        Some(error) => Answer::Error(error),
        None => Answer::Return(line.result.unwrap_or(Value::Null)),
    };
    drop(waiting.send(answer));
}

/// Lines of a socket, of bounded length. `next` loses nothing when its future is dropped.
struct Lines {
    read: OwnedReadHalf,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are known to hold no end of line.
    searched: usize,
}

impl Lines {
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                self.searched = 0;
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LONGEST_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line of more than 64 MiB"));
            }
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncBufReadExt, BufReader},
        net::UnixListener,
    };

    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {\"qemu\": {}}, \"capabilities\": [\"oob\"]}}\r\n";

    /// A QEMU that greets and then answers each command with the lines that `script` makes of it.
    fn serve(script: impl Fn(&str, u64) -> String + Send + 'static) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (read, mut write) = stream.into_split();
                write.write_all(GREETING).await.unwrap();
                let mut lines = BufReader::new(read).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    let request: Value = serde_json::from_str(&line).unwrap();
                    let (name, id) = (request["execute"].as_str().unwrap(), request["id"].as_u64().unwrap());
                    let reply = if name == "qmp_capabilities" {
                        format!("{{\"return\":{{}},\"id\":{id}}}\r\n")
                    } else {
                        script(name, id)
                    };
                    if reply.is_empty() {
                        break;
                    }
                    write.write_all(reply.as_bytes()).await.unwrap();
                }
            }
        });
        (directory, socket)
    }

    #[tokio::test]
    async fn unknown_events_and_fields_and_garbage_do_not_break_the_stream() {
        let (_directory, socket) = serve(|_, id| {
            format!(
                "{{\"event\":\"FROM_THE_FUTURE\",\"timestamp\":{{\"seconds\":1700000000,\"microseconds\":250000,\"x\":1}},\"new\":[]}}\n\
                 not json\n{{\"neither\":1}}\n{{\"return\":1,\"id\":999999999}}\n\
                 {{\"event\":\"CLOCKLESS\",\"timestamp\":{{\"seconds\":-1,\"microseconds\":-1}},\"data\":{{\"a\":1}}}}\n\
                 {{\"id\":{id},\"return\":{{\"status\":\"brand-new\"}},\"later\":true}}\n"
            )
        });
        let qmp = Qmp::connect(&socket).await.unwrap();
        let mut events = qmp.events();
        let answer = qmp.execute_raw("query-status", Value::Null).await.unwrap();
        assert_eq!(answer["status"], "brand-new");
        let event = events.recv().await.unwrap();
        assert_eq!(event.name, "FROM_THE_FUTURE");
        assert_eq!(event.timestamp, SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_250_000));
        assert_eq!(events.recv().await.unwrap().data["a"], 1);
    }

    #[tokio::test]
    async fn refusals_carry_qemus_words() {
        let (_directory, socket) = serve(|_, id| {
            format!("{{\"id\":{id},\"error\":{{\"class\":\"NewClass\",\"desc\":\"no way\"}}}}\n")
        });
        let qmp = Qmp::connect(&socket).await.unwrap();
        let error = qmp.execute_raw("stop", Value::Null).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused stop: no way");
        assert!(matches!(error, QmpError::Refused { command: "stop", class, .. } if class == "NewClass"));
    }

    #[tokio::test]
    async fn waiting_commands_and_receivers_learn_that_qemu_is_gone() {
        let (_directory, socket) = serve(|_, _| String::new());
        let qmp = Qmp::connect(&socket).await.unwrap();
        let mut events = qmp.events();
        for _ in 0..2 {
            assert!(matches!(
                qmp.execute_raw("quit", Value::Null).await,
                Err(QmpError::Gone { command: "quit", .. })
            ));
        }
        assert_eq!(events.recv().await, Err(broadcast::error::RecvError::Closed));
        assert_eq!(qmp.events().recv().await, Err(broadcast::error::RecvError::Closed));
    }

    #[tokio::test]
    async fn commands_at_the_same_time_get_their_own_answers() {
        let (_directory, socket) = serve(|_, id| format!("{{\"return\":{id},\"id\":{id}}}\n"));
        let qmp = Qmp::connect(&socket).await.unwrap();
        let tasks: Vec<_> = (0..100)
            .map(|_| {
                let qmp = qmp.clone();
                tokio::spawn(async move { qmp.execute_raw("x", Value::Null).await.unwrap() })
            })
            .collect();
        let mut answers = Vec::new();
        for task in tasks {
            answers.push(task.await.unwrap().as_u64().unwrap());
        }
        answers.sort_unstable();
        answers.dedup();
        assert_eq!(answers.len(), 100);
    }

    #[tokio::test]
    async fn dropping_the_last_handle_frees_the_socket_for_the_next_client() {
        let (_directory, socket) = serve(|_, id| format!("{{\"return\":{{}},\"id\":{id}}}\n"));
        for _ in 0..3 {
            // The server takes one client at a time, as QEMU does; this hangs unless the one before is really closed.
            drop(Qmp::connect(&socket).await.unwrap());
        }
    }

    #[tokio::test]
    async fn a_deadline_names_the_command() {
        let (_directory, socket) = serve(|_, _| "{\"event\":\"NOTHING\"}\n".to_owned());
        let qmp = Qmp::connect(&socket).await.unwrap();
        let error = qmp.run("query-x", Value::Null, None, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, QmpError::Deadline { command: "query-x", .. }));
    }

    #[tokio::test]
    async fn what_is_not_qmp_is_said_to_be_so() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"220 mail server\r\n").await.unwrap();
        });
        assert!(
            matches!(Qmp::connect(&socket).await, Err(QmpError::NotQmp { text, .. }) if text.starts_with("220"))
        );
        let missing = directory.path().join("none");
        assert!(matches!(Qmp::connect(&missing).await, Err(QmpError::Connect { .. })));
    }
}
