//! Peers that must not be let in, or that must not do harm, and what either side is told.

mod authority;

use std::sync::Arc;
use std::time::Duration;

use authority::{Authority, listen};
use link::certificates::{self, IssueOptions, Validity};
use link::{
    AcceptError, Bandwidth, ConnectError, Deadlines, Endpoint, Identity, Incoming, Listener, ListenerLimits,
    Peer, Purpose, Step, TlsError, VersionRange,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

/// Tries to connect in both ways, and gives what each side says to the first.
async fn try_both(source: &Endpoint, listener: &Listener) -> Vec<(ConnectError, AcceptError)> {
    let address = listener.local_addr().to_string();
    let (near, far) = tokio::join!(source.connect(&address), listener.accept());
    let control = (near.expect_err("refused"), far.expect_err("refused"));
    let source = source.clone();
    let opening = tokio::task::spawn_blocking(move || {
        source.open_data(&address, Uuid::nil(), 0, Bandwidth::new(None)).map(drop)
    });
    let far = listener.accept().await.expect_err("refused");
    vec![control, (opening.await.expect("no panic").expect_err("refused"), far)]
}

fn near(error: &ConnectError) -> &TlsError {
    match error {
        ConnectError::Tls { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

fn far(error: &AcceptError) -> &TlsError {
    match error {
        AcceptError::Tls { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_destination_of_another_authority_is_not_trusted() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (listener, _) = listen(&theirs.endpoint("host-b")).await;
    for (source, destination) in try_both(&ours.endpoint("host-a"), &listener).await {
        assert!(matches!(near(&source), TlsError::PeerUntrusted), "{source:?}");
        assert!(matches!(far(&destination), TlsError::OwnUntrusted), "{destination:?}");
    }
}

/// An endpoint that trusts both authorities, with a certificate of the second.
fn stranger(trusted: &Authority, own: &Authority, options: &IssueOptions) -> Endpoint {
    let both = own.file("both.pem");
    let read = |authority: &Authority| std::fs::read_to_string(authority.file("ca.pem")).expect("read");
    std::fs::write(&both, read(trusted) + &read(own)).expect("written");
    let files = certificates::issue_with(own.dir(), "host-a", &[], options).expect("issued");
    let identity = Identity::load(&both, &files.certificate, &files.key).expect("an identity");
    Endpoint::new(&identity, Deadlines::default()).expect("an endpoint")
}

#[tokio::test]
async fn a_source_of_another_authority_is_told_so() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (listener, _) = listen(&ours.endpoint("host-b")).await;
    let source = stranger(&ours, &theirs, &IssueOptions::default());
    for (source, destination) in try_both(&source, &listener).await {
        assert!(matches!(near(&source), TlsError::OwnUntrusted), "{source:?}");
        assert!(matches!(far(&destination), TlsError::PeerUntrusted), "{destination:?}");
    }
}

#[tokio::test]
async fn a_certificate_that_expires_while_the_agent_runs_is_named_on_both_sides() {
    let authority = Authority::new();
    let (listener, address) = listen(&authority.endpoint("host-b")).await;
    // Certificates count whole seconds, so this is the shortest life that can be relied upon.
    let now = std::time::SystemTime::now();
    let short =
        Validity { not_before: now - Duration::from_secs(60), not_after: now + Duration::from_secs(2) };
    let source = stranger(&authority, &authority, &IssueOptions::new(short));
    while std::time::SystemTime::now() < now + Duration::from_secs(4) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for (error, destination) in try_both(&source, &listener).await {
        assert!(matches!(near(&error), TlsError::OwnExpired), "{error:?}");
        assert!(matches!(far(&destination), TlsError::PeerExpired { .. }), "{destination:?}");
    }
    // And the other way round: it listens.
    let (expired, _) = listen(&source).await;
    for (error, destination) in try_both(&authority.endpoint("host-c"), &expired).await {
        assert!(matches!(near(&error), TlsError::PeerExpired { .. }), "{error:?}");
        assert!(matches!(far(&destination), TlsError::OwnExpired), "{destination:?}");
    }
    drop((listener, address));
}

#[tokio::test]
async fn a_certificate_for_another_address_is_not_accepted() {
    let authority = Authority::new();
    let files = certificates::issue(authority.dir(), "host-b", &["192.0.2.1".into()]).expect("issued");
    let identity =
        Identity::load(&authority.file("ca.pem"), &files.certificate, &files.key).expect("an identity");
    let endpoint = Endpoint::new(&identity, Deadlines::default()).expect("an endpoint");
    let (listener, _) = listen(&endpoint).await;
    for (source, destination) in try_both(&authority.endpoint("host-a"), &listener).await {
        match near(&source) {
            TlsError::NameMismatch { dialled, presented } => {
                assert_eq!(dialled, "127.0.0.1");
                assert!(presented.iter().any(|name| name.contains("192.0.2.1")), "{presented:?}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(far(&destination), TlsError::OwnRefused { .. }), "{destination:?}");
    }
}

#[tokio::test]
async fn versions_are_negotiated_and_both_ranges_named_where_none_is_shared() {
    let authority = Authority::new();
    let range = |min, max| VersionRange::new(min, max).expect("a range");
    let (listener, address) = listen(&authority.endpoint("host-b").offering(range(2, 4))).await;
    let source = authority.endpoint("host-a");
    let newer = source.clone().offering(range(3, 9));
    let (near, far) = tokio::join!(newer.connect(&address), listener.accept());
    assert_eq!(near.expect("connected").version(), 4);
    assert!(matches!(far.expect("accepted"), Incoming::Control(control, _) if control.version() == 4));

    for (near, far) in try_both(&source.offering(range(5, 6)), &listener).await {
        assert!(
            matches!(near, ConnectError::Version { ours, theirs, .. } if (ours, theirs) == (range(5, 6), range(2, 4))),
            "{near:?}"
        );
        assert!(near.to_string().contains("versions 5 to 6") && near.to_string().contains("versions 2 to 4"));
        assert!(
            matches!(far, AcceptError::Version { ours, theirs, .. } if (ours, theirs) == (range(2, 4), range(5, 6))),
            "{far:?}"
        );
    }
}

#[tokio::test]
async fn a_peer_that_is_not_admitted_is_told_why() {
    let authority = Authority::new();
    let admission = |peer: &Peer, _: &Purpose| match peer.name.as_str() {
        "host-c" => Ok(()),
        other => Err(format!("{other} is not in allow.peers")),
    };
    let destination = authority.endpoint("host-b");
    let listener = Listener::bind_with(&destination, "127.0.0.1:0", ListenerLimits::default(), admission)
        .await
        .expect("a port");
    for (near, far) in try_both(&authority.endpoint("host-a"), &listener).await {
        assert!(
            matches!(&near, ConnectError::RefusedByPeer { reason, .. } if reason == "host-a is not in allow.peers"),
            "{near:?}"
        );
        assert!(matches!(&far, AcceptError::NotAdmitted { name, .. } if name == "host-a"), "{far:?}");
    }
    let welcome = authority.endpoint("host-c");
    let address = listener.local_addr().to_string();
    let (near, far) = tokio::join!(welcome.connect(&address), listener.accept());
    near.expect("connected");
    far.expect("accepted");
}

/// Connects to a server that answers with these bytes.
async fn connect_to(answer: &'static [u8]) -> ConnectError {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    let serving = tokio::spawn(async move {
        let (mut socket, _) = server.accept().await.expect("accepted");
        socket.write_all(answer).await.expect("written");
        let mut sink = [0; 4096];
        while matches!(socket.read(&mut sink).await, Ok(1..)) {}
    });
    let error = Authority::new().endpoint("host-a").connect(&address).await.expect_err("no agent");
    serving.await.expect("no panic");
    error
}

#[tokio::test]
async fn a_server_that_is_no_agent_is_recognised() {
    for answer in ["HTTP/1.1 400 Bad Request\r\n\r\n", "SSH-2.0-OpenSSH_9.2p1\r\n"] {
        let error = connect_to(answer.as_bytes()).await;
        assert!(matches!(near(&error), TlsError::NotTls), "{error:?}");
    }
    // The alert protocol_version, as a server gives it that knows nothing newer than TLS 1.2.
    let error = connect_to(&[21, 3, 3, 0, 2, 2, 70]).await;
    assert!(matches!(near(&error), TlsError::NotTls13), "{error:?}");
}

#[tokio::test]
async fn addresses_that_lead_nowhere_are_told_apart() {
    let source = Authority::new().endpoint("host-a");
    for address in ["", "host", "host:", ":1", "host:0", "host:x", "::1:7600", "[::1:7600", "a b:1"] {
        let error = source.connect(address).await.expect_err("malformed");
        assert!(matches!(error, ConnectError::Address { .. }), "{address:?}: {error:?}");
    }
    // A port that was just free; nobody else is given it in between, as the socket is still bound, but not listening.
    let bound = tokio::net::TcpSocket::new_v4().expect("a socket");
    bound.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let address = bound.local_addr().expect("bound").to_string();
    let error = source.connect(&address).await.expect_err("nobody listens");
    assert!(matches!(error, ConnectError::Refused { .. }), "{error:?}");
    let error = source.connect("host.invalid:7600").await.expect_err("no such host");
    assert!(matches!(error, ConnectError::Resolve { .. }), "{error:?}");
}

fn hasty(authority: &Authority, name: &str) -> Endpoint {
    let deadlines = Deadlines { handshake: Duration::from_millis(300), ..Deadlines::default() };
    Endpoint::new(&authority.identity(name), deadlines).expect("an endpoint")
}

#[tokio::test]
async fn a_server_that_never_answers_ends_at_the_deadline() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    let source = hasty(&Authority::new(), "host-a");
    let error = source.connect(&address).await.expect_err("silent");
    assert!(matches!(error, ConnectError::Timeout { step: Step::Handshake, .. }), "{error:?}");
    let opening = tokio::task::spawn_blocking(move || {
        source.open_data(&address, Uuid::nil(), 0, Bandwidth::new(None)).map(drop)
    });
    let error = opening.await.expect("no panic").expect_err("silent");
    assert!(matches!(error, ConnectError::Timeout { step: Step::Handshake, .. }), "{error:?}");
}

#[tokio::test]
async fn peers_that_stall_or_talk_nonsense_hold_up_nobody() {
    let authority = Authority::new();
    let (listener, address) = listen(&authority.endpoint("host-b")).await;
    let mut hostile = Vec::new();
    for opening in [&b""[..], b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", &[0xff; 300], &[0; 20_000]] {
        let mut socket = TcpStream::connect(&address).await.expect("connected");
        // It may be turned away before all is written.
        let _ = socket.write_all(opening).await;
        hostile.push(socket);
    }
    let source = authority.endpoint("host-a");
    let connecting = source.connect(&address);
    let accepting = async {
        let mut turned_away = 0;
        loop {
            match listener.accept().await {
                Ok(incoming) => break (incoming, turned_away),
                Err(AcceptError::Tls { source: TlsError::NotTls, .. }) => turned_away += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
    };
    let (near, (far, _)) = tokio::join!(connecting, accepting);
    near.expect("connected");
    assert!(matches!(far, Incoming::Control(..)));
    drop(hostile);
}

#[tokio::test]
async fn a_peer_that_stalls_in_the_handshake_is_dropped_at_the_deadline() {
    let authority = Authority::new();
    let (listener, address) = listen(&hasty(&authority, "host-b")).await;
    let mut socket = TcpStream::connect(&address).await.expect("connected");
    let error = listener.accept().await.expect_err("stalled");
    assert!(matches!(error, AcceptError::Timeout { .. }), "{error:?}");
    assert_eq!(socket.read(&mut [0]).await.expect("closed"), 0);
}

/// Connects from that address, and says nothing.
async fn stall(from: &str, to: std::net::SocketAddr) -> tokio::net::TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind(from.parse().expect("an address")).expect("a port");
    socket.connect(to).await.expect("connected")
}

#[tokio::test]
async fn those_who_take_their_time_over_a_handshake_keep_no_agent_out() {
    let authority = Authority::new();
    let limits = ListenerLimits { handshakes: 8, handshakes_per_address: 2 };
    let destination = authority.endpoint("host-b");
    let welcome = |_: &Peer, _: &Purpose| Ok(());
    let listener = Listener::bind_with(&destination, "127.0.0.1:0", limits, welcome).await.expect("a port");
    let address = listener.local_addr();
    let mut stalled = Vec::new();
    // One address beyond its own limit: its own slowest makes room.
    for _ in 0..3 {
        stalled.push(stall("127.0.0.2:0", address).await);
    }
    let error = listener.accept().await.expect_err("one too many");
    assert!(matches!(error, AcceptError::TooManyHandshakes { limit: 2, .. }), "{error:?}");
    assert!(error.to_string().contains("127.0.0.2"), "{error}");
    // Many addresses, together beyond all limits: the slowest of all does, also for one that is not slow.
    for number in 3..20 {
        stalled.push(stall(&format!("127.0.0.{number}:0"), address).await);
    }
    stalled.push(stall("127.0.0.1:0", address).await);
    stalled.push(stall("127.0.0.1:0", address).await);
    let begin = std::time::Instant::now();
    let near = authority.endpoint("host-a");
    let far = address.to_string();
    let accepted = async {
        loop {
            match listener.accept().await {
                Ok(incoming) => return incoming,
                Err(AcceptError::TooManyHandshakes { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    };
    let (near, _far) = tokio::join!(near.connect(&far), accepted);
    near.expect("connected");
    // Not because the others have run into their deadline.
    assert!(begin.elapsed() < Deadlines::default().handshake, "{:?}", begin.elapsed());
    drop(stalled);
}

/// Speaks TLS as an agent does, with a good certificate, but then says something else than hello.
#[tokio::test]
async fn nonsense_inside_tls_is_refused_too() {
    let authority = Authority::new();
    let (listener, _) = listen(&authority.endpoint("host-b")).await;
    authority.identity("host-a");
    let long = [&b"vmirror\x01"[..], &[0, 0, 16, 1]].concat();
    let undecodable = [&b"vmirror\x01"[..], &[0, 0, 0, 2], &[0xff, 0xff]].concat();
    let empty = [&b"vmirror\x01"[..], &[0, 0, 0, 0]].concat();
    for (hello, expected) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "Magic"),
        (long, "TooLong"),
        (undecodable, "Decode"),
        (empty, "Missing"),
        (b"vmir".to_vec(), "Io"),
    ] {
        let speaking = async {
            let mut stream = tls_client(&authority, listener.local_addr()).await;
            stream.write_all(&hello).await.expect("written");
            stream.shutdown().await.expect("ended");
            // No answer, only the end.
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.is_empty(), "{answer:?}");
        };
        let ((), refused) = tokio::join!(speaking, listener.accept());
        match refused.expect_err("nonsense") {
            AcceptError::Hello { source, .. } => {
                assert!(format!("{source:?}").starts_with(expected), "{source:?}, not {expected}");
            }
            other => panic!("{other:?}"),
        }
    }
}

async fn tls_client(
    authority: &Authority,
    address: std::net::SocketAddr,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    use rustls_pki_types::pem::PemObject as _;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};

    let certificate =
        |file: &str| CertificateDer::from_pem_file(authority.file(file)).expect("a certificate");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate("ca.pem")).expect("an authority");
    let key = PrivateKeyDer::from_pem_file(authority.file("host-a-key.pem")).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("host-a.pem")], key)
        .expect("a client");
    config.alpn_protocols = vec![b"vmirror".to_vec()];
    let socket = TcpStream::connect(address).await.expect("connected");
    let name = address.ip().into();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("trusted")
}
