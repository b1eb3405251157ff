//! What the guest answers on the network: heartbeats, echo, questions, and what its journals have acknowledged.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::disk::Disks;

/// UDP port where each datagram is sent back as it came.
pub const HEARTBEAT_PORT: u16 = 7000;
/// TCP port where each connection gets back what it sends.
pub const ECHO_PORT: u16 = 7001;
/// UDP port where each datagram is one [command](crate::command), answered by one line of JSON.
pub const CONTROL_PORT: u16 = 7002;
/// TCP port where each connection gets, as lines of `SERIAL NUMBER`, the sequence number that each journal has acknowledged: at
/// once, whenever it grows, and every [`REPEAT`] while it does not.
pub const JOURNAL_PORT: u16 = 7003;
/// See [`JOURNAL_PORT`]: whoever hears nothing for much longer has lost the connection.
pub const REPEAT: Duration = Duration::from_secs(1);

/// Room for datagrams that wait, in bytes: some thousands.
const BACKLOG: usize = 4 << 20;
/// The longest datagram taken.
const DATAGRAM: usize = 2048;
/// Stack of a connection's thread: a buffer and little else, so that hundreds of connections fit a small guest.
const STACK: usize = 64 << 10;
/// How long an answer that took a while is kept, for one who asks again because it got lost.
const KEPT: Duration = Duration::from_secs(10);

/// Binds a UDP port on all addresses.
///
/// # Errors
/// As `bind(2)`.
pub fn bind_udp(port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    // A guest that has moved gets at once what came meanwhile, and has other things to do first. Only its kernel may say that there is
    // no room.
    if let Err(e) = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BACKLOG) {
        eprintln!("port {port}: the usual room for datagrams: {e}");
    }
    Ok(socket)
}

/// Binds a TCP port on all addresses.
///
/// # Errors
/// As `bind(2)`.
pub fn bind_tcp(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
}

/// Sends every datagram back.
///
/// # Errors
/// When receiving fails. An answer that cannot be sent is lost, as datagrams may be.
pub fn heartbeat(socket: &UdpSocket) -> io::Result<()> {
    let mut datagram = [0; DATAGRAM];
    loop {
        let (length, peer) = socket.recv_from(&mut datagram)?;
        let _ = socket.send_to(&datagram[..length], peer);
    }
}

/// What becomes of a question.
pub enum Answer<T> {
    /// It is answered at once; then something follows from it.
    Now(String, T),
    /// The answer takes a while to find, and others are not to wait for it.
    Later(Box<dyn FnOnce() -> String + Send>),
}

/// Questions whose answer takes a while, by who asked what; with the answer, once there is one.
type Questions = Mutex<HashMap<(SocketAddr, String), Option<(String, Instant)>>>;

/// Answers every datagram with what `respond` makes of its text; `sent` runs once the answer is on its way.
///
/// A question whose answer takes a while is the same one when it comes again from the same port.
///
/// # Errors
/// When receiving fails.
pub fn control<T>(
    socket: &UdpSocket,
    mut respond: impl FnMut(&str) -> Answer<T>,
    mut sent: impl FnMut(T),
) -> io::Result<()> {
    let mut datagram = [0; DATAGRAM];
    let questions: Arc<Questions> = Arc::default();
    loop {
        let (length, peer) = socket.recv_from(&mut datagram)?;
        let question = (peer, String::from_utf8_lossy(&datagram[..length]).into_owned());
        if is_known(&questions, socket, &question) {
            continue;
        }
        match respond(&question.1) {
            Answer::Now(answer, then) => {
                let _ = socket.send_to(answer.as_bytes(), peer);
                sent(then);
            }
            Answer::Later(find) => {
                lock(&questions).insert(question.clone(), None);
                let (questions, socket) = (Arc::clone(&questions), socket.try_clone()?);
                thread::Builder::new().name("answer".into()).spawn(move || {
                    let answer = find();
                    lock(&questions).insert(question, Some((answer.clone(), Instant::now())));
                    let _ = socket.send_to(answer.as_bytes(), peer);
                })?;
            }
        }
    }
}

/// Whether the answer to this question is being found, or was just given: then it is given again.
fn is_known(questions: &Questions, socket: &UdpSocket, question: &(SocketAddr, String)) -> bool {
    let mut questions = lock(questions);
    questions.retain(|_, answer| answer.as_ref().is_none_or(|(_, at)| at.elapsed() < KEPT));
    let known = questions.get(question);
    if let Some(Some((answer, _))) = known {
        let _ = socket.send_to(answer.as_bytes(), question.0);
    }
    known.is_some()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A poisoned lock means that a thread panicked, and a panic ends the guest.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends back what comes, on every connection.
///
/// # Errors
/// When accepting fails for good.
pub fn echo(listener: &TcpListener) -> io::Result<()> {
    serve(listener, echo_one)
}

/// Tells on every connection what the journals have acknowledged.
///
/// # Errors
/// When accepting fails for good.
pub fn acknowledged(listener: &TcpListener, disks: &Arc<Disks>) -> io::Result<()> {
    let disks = Arc::clone(disks);
    serve(listener, move |stream| tell_acknowledged(stream, &disks))
}

/// Serves every connection on a thread of its own.
fn serve(
    listener: &TcpListener,
    serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) -> io::Result<()> {
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            // The peer gave up while it waited: its own affair.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        // Without room for another thread the connection is closed, which its peer sees.
        let serve = serve.clone();
        let _ = thread::Builder::new().stack_size(STACK).spawn(move || serve(stream));
    }
}

fn echo_one(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 16 << 10];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}

fn tell_acknowledged(mut stream: TcpStream, disks: &Disks) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut known = BTreeMap::new();
    loop {
        let numbers = disks.acknowledged().after(&known, REPEAT);
        let repeat = numbers == known;
        let mut lines = String::new();
        for (serial, number) in &numbers {
            if repeat || known.get(serial) != Some(number) {
                let _ = writeln!(lines, "{serial} {number}");
            }
        }
        stream.write_all(lines.as_bytes())?;
        known = numbers;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(port: u16) -> UdpSocket {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        client.connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    #[test]
    fn heartbeats_come_back() {
        let socket = bind_udp(0).unwrap();
        let client = client(socket.local_addr().unwrap().port());
        thread::spawn(move || heartbeat(&socket));
        client.send(b"42").unwrap();
        let mut answer = [0; 8];
        assert_eq!(client.recv(&mut answer).unwrap(), 2);
        assert_eq!(&answer[..2], b"42");
    }

    #[test]
    fn questions_are_answered_before_their_consequence() {
        let socket = bind_udp(0).unwrap();
        let client = client(socket.local_addr().unwrap().port());
        let (sender, receiver) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let respond = |text: &str| Answer::Now(text.to_uppercase(), text.len());
            control(&socket, respond, |then| sender.send(then).unwrap())
        });
        client.send(b"pause").unwrap();
        let mut answer = [0; 8];
        let length = client.recv(&mut answer).unwrap();
        assert_eq!(&answer[..length], b"PAUSE");
        assert_eq!(receiver.recv().unwrap(), 5);
    }

    #[test]
    fn a_question_that_takes_a_while_is_asked_once_and_keeps_nobody_waiting() {
        let socket = bind_udp(0).unwrap();
        let port = socket.local_addr().unwrap().port();
        let (slow, quick) = (client(port), client(port));
        let (finish, finished) = std::sync::mpsc::channel::<&str>();
        let finished = Arc::new(Mutex::new(finished));
        let asked = Arc::new(Mutex::new(0));
        let count = Arc::clone(&asked);
        thread::spawn(move || {
            let respond = move |text: &str| {
                if text != "slow" {
                    return Answer::Now("quick".into(), ());
                }
                *count.lock().unwrap() += 1;
                let finished = Arc::clone(&finished);
                Answer::Later(Box::new(move || finished.lock().unwrap().recv().unwrap().to_owned()))
            };
            control(&socket, respond, |()| {})
        });
        let mut answer = [0; 8];
        let mut hear = |client: &UdpSocket| {
            let length = client.recv(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[..length]).into_owned()
        };
        slow.send(b"slow").unwrap();
        slow.send(b"slow").unwrap();
        quick.send(b"").unwrap();
        assert_eq!(hear(&quick), "quick");
        finish.send("found").unwrap();
        assert_eq!(hear(&slow), "found");
        // As if the answer had been lost on its way.
        slow.send(b"slow").unwrap();
        assert_eq!(hear(&slow), "found");
        assert_eq!(*asked.lock().unwrap(), 1);
    }

    #[test]
    fn connections_are_echoed_side_by_side() {
        let listener = bind_tcp(0).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || echo(&listener));
        let mut streams: Vec<_> =
            (0..20).map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap()).collect();
        for (n, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&[n as u8; 100]).unwrap();
        }
        for (n, stream) in streams.iter_mut().enumerate() {
            let mut answer = [0; 100];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [n as u8; 100]);
        }
    }
}
