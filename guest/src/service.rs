//! What the guest answers on the network: heartbeats, echo, questions.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;

/// UDP port where each datagram is sent back as it came.
pub const HEARTBEAT_PORT: u16 = 7000;
/// TCP port where each connection gets back what it sends.
pub const ECHO_PORT: u16 = 7001;
/// UDP port where each datagram is one [command](crate::command), answered by one line of JSON.
pub const CONTROL_PORT: u16 = 7002;

/// The longest datagram taken.
const DATAGRAM: usize = 2048;
/// Stack of a connection's thread: a buffer and little else, so that hundreds of connections fit a small guest.
const STACK: usize = 64 << 10;

/// Binds a UDP port on all addresses.
///
/// # Errors
/// As `bind(2)`.
pub fn bind_udp(port: u16) -> io::Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
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

/// Answers every datagram with what `respond` makes of its text; `sent` runs once the answer is on its way.
///
/// # Errors
/// When receiving fails.
pub fn control<T>(
    socket: &UdpSocket,
    mut respond: impl FnMut(&str) -> (String, T),
    mut sent: impl FnMut(T),
) -> io::Result<()> {
    let mut datagram = [0; DATAGRAM];
    loop {
        let (length, peer) = socket.recv_from(&mut datagram)?;
        let (answer, then) = respond(&String::from_utf8_lossy(&datagram[..length]));
        let _ = socket.send_to(answer.as_bytes(), peer);
        sent(then);
    }
}

/// Serves every connection on a thread of its own.
///
/// # Errors
/// When accepting fails for good.
pub fn echo(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            // The peer gave up while it waited: its own affair.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        // Without room for another thread the connection is closed, which its peer sees.
        let _ = thread::Builder::new().stack_size(STACK).spawn(move || echo_one(stream));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

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
            control(&socket, |text| (text.to_uppercase(), text.len()), |then| sender.send(then).unwrap())
        });
        client.send(b"pause").unwrap();
        let mut answer = [0; 8];
        let length = client.recv(&mut answer).unwrap();
        assert_eq!(&answer[..length], b"PAUSE");
        assert_eq!(receiver.recv().unwrap(), 5);
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
