//! An agent in the middle: it stands before a real one, with that one's certificate, passes on what both say, and lies when it comes to
//! what it is to lie about. So a lie can follow on everything that is true, with a real QEMU at either end.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use end_to_end::Pair;
use link::{
    Bandwidth, Control, ControlReceiver, ControlSender, DataHello, DataReceiver, Deadlines, Endpoint,
    Identity, Incoming, LinkError, Listener,
};
use prost::bytes::{Buf, BufMut};
use prost::encoding::{DecodeContext, WireType};
use protocol::wire::{Reply, Request, ToDestination, ToSource};
use testbed::Host;
use tokio::sync::oneshot;

/// What is said in the place of a message.
#[expect(clippy::large_enum_variant, reason = "there are few of them")]
#[derive(Debug, Clone)]
pub(crate) enum Say {
    /// That message.
    Reply(Reply),
    /// That one.
    Request(Request),
    /// A message of these bytes, whatever they are.
    Bytes(Vec<u8>),
}

/// What is heard in the place of what was said.
type Answers<M> = Box<dyn FnMut(M) -> Vec<Say> + Send>;
/// What arrives of a piece of a stream.
type Alters = Box<dyn FnMut(u16, &[u8]) -> Vec<u8> + Send>;

/// What a liar does about a message that it should pass on, and about a piece of a data stream.
pub(crate) struct Lies {
    /// Of what the destination says: what the source hears.
    pub(crate) replies: Answers<Reply>,
    /// Of what the source says: what the destination hears.
    pub(crate) requests: Answers<Request>,
    /// Of what a stream carries: what arrives.
    pub(crate) data: Alters,
    /// How often each data connection is opened.
    pub(crate) connections: usize,
}

impl Default for Lies {
    fn default() -> Lies {
        Lies {
            replies: Box::new(|reply| vec![Say::Reply(reply)]),
            requests: Box::new(|request| vec![Say::Request(request)]),
            data: Box::new(|_, bytes| bytes.to_vec()),
            connections: 1,
        }
    }
}

impl Lies {
    /// Says this to the source in the place of the first reply that `at` is true of, and passes on everything else.
    pub(crate) fn once_for_reply(
        at: impl Fn(&Reply) -> bool + Send + 'static,
        says: impl Fn(Reply) -> Vec<Say> + Send + 'static,
    ) -> Lies {
        let mut lied = false;
        let replies = Box::new(move |reply: Reply| {
            if lied || !at(&reply) {
                return vec![Say::Reply(reply)];
            }
            lied = true;
            says(reply)
        });
        Lies { replies, ..Lies::default() }
    }

    /// The same, of the first such reply after a request that `after` is true of has been passed on.
    pub(crate) fn once_for_reply_after(
        after: impl Fn(&Request) -> bool + Send + 'static,
        at: impl Fn(&Reply) -> bool + Send + 'static,
        says: impl Fn(Reply) -> Vec<Say> + Send + 'static,
    ) -> Lies {
        let passed = Arc::<AtomicBool>::default();
        let has_passed = Arc::clone(&passed);
        let requests = Box::new(move |request: Request| {
            if after(&request) {
                passed.store(true, Ordering::Relaxed);
            }
            vec![Say::Request(request)]
        });
        let at = move |reply: &Reply| has_passed.load(Ordering::Relaxed) && at(reply);
        Lies { requests, ..Lies::once_for_reply(at, says) }
    }

    /// The same of what the source says.
    pub(crate) fn once_for_request(
        at: impl Fn(&Request) -> bool + Send + 'static,
        says: impl Fn(Request) -> Vec<Say> + Send + 'static,
    ) -> Lies {
        let mut lied = false;
        let requests = Box::new(move |request: Request| {
            if lied || !at(&request) {
                return vec![Say::Request(request)];
            }
            lied = true;
            says(request)
        });
        Lies { requests, ..Lies::default() }
    }
}

/// Has a liar stand before host B while `story` goes on, which is told its address.
pub(crate) fn before<T: Send>(pair: &Pair, lies: Lies, story: impl FnOnce(&str) -> T) -> T {
    let (tell, told) = mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let (as_a, as_b) = (endpoint(pair, pair.a()), endpoint(pair, pair.b()));
    let (to, lies) = (pair.b().listen(), Arc::new(Mutex::new(lies)));
    thread::scope(|scope| {
        scope.spawn(move || {
            let run = || {
                // On threads of this network.
                let runtime =
                    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
                runtime.unwrap().block_on(async {
                    let listener =
                        Listener::bind(&as_b, &SocketAddr::new(to.ip(), 0).to_string()).await.unwrap();
                    tell.send(listener.local_addr().to_string()).unwrap();
                    tokio::select! {
                        () = serve(&listener, as_a, to, lies) => {}
                        _ = stopped => {}
                    }
                });
            };
            pair.b().on_network(run).unwrap();
        });
        let outcome = story(&told.recv().unwrap());
        drop(stop);
        outcome
    })
}

/// An agent's own, to speak in its name.
pub(crate) fn endpoint(pair: &Pair, host: &Host) -> Endpoint {
    let directory = pair.testbed().certificates();
    let of = |part: &str| directory.join(format!("{}{part}.pem", host.name()));
    let identity = Identity::load(&directory.join("ca.pem"), &of(""), &of("-key")).unwrap();
    Endpoint::new(&identity, Deadlines::default()).unwrap()
}

async fn serve(listener: &Listener, as_a: Endpoint, to: SocketAddr, lies: Arc<Mutex<Lies>>) {
    loop {
        match listener.accept().await {
            Ok(Incoming::Control(control, _)) => {
                drop(tokio::spawn(control_connection(control, as_a.clone(), to, Arc::clone(&lies))));
            }
            Ok(Incoming::Data(receiver, _, hello)) => {
                let (as_a, lies) = (as_a.clone(), Arc::clone(&lies));
                drop(thread::spawn(move || drop(data_connection(receiver, &hello, &as_a, to, &lies))));
            }
            Err(_) => {}
        }
    }
}

async fn control_connection(source: Control, as_a: Endpoint, to: SocketAddr, lies: Arc<Mutex<Lies>>) {
    let Ok(destination) = as_a.connect(&to.to_string()).await else { return };
    let ((to_source, from_source), (to_destination, from_destination)) =
        (source.split(), destination.split());
    let requests = pass_on(from_source, to_destination, |message: ToDestination| match message.request {
        Some(request) => (lock(&lies).requests)(request),
        None => Vec::new(),
    });
    let replies = pass_on(from_destination, to_source, |message: ToSource| match message.reply {
        Some(reply) => (lock(&lies).replies)(reply),
        None => Vec::new(),
    });
    // The end of one is the end of both.
    tokio::select! {
        _ = requests => {}
        _ = replies => {}
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn pass_on<M: prost::Message + Default>(
    mut from: ControlReceiver,
    mut to: ControlSender,
    mut lie: impl FnMut(M) -> Vec<Say>,
) -> Result<(), LinkError> {
    loop {
        for say in lie(from.receive::<M>().await?) {
            match say {
                Say::Reply(reply) => to.send(&ToSource { reply: Some(reply) }).await?,
                Say::Request(request) => to.send(&ToDestination { request: Some(request) }).await?,
                Say::Bytes(bytes) => to.send(&Raw(bytes)).await?,
            }
        }
    }
}

fn data_connection(
    mut from: DataReceiver,
    hello: &DataHello,
    as_a: &Endpoint,
    to: SocketAddr,
    lies: &Mutex<Lies>,
) -> std::io::Result<()> {
    let count = lock(lies).connections;
    let open = |_| as_a.open_data(&to.to_string(), hello.session, hello.stream, Bandwidth::new(None));
    let mut senders: Vec<_> = (0..count).map_while(|number| open(number).ok()).collect();
    let mut piece = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut piece)?;
        if read == 0 {
            return senders.drain(..).try_for_each(|sender| sender.shutdown());
        }
        let arrives = (lock(lies).data)(hello.stream, &piece[..read]);
        let Some(first) = senders.first_mut() else { return Ok(()) };
        first.write_all(&arrives)?;
        first.flush()?;
    }
}

/// A message that is just these bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Raw(pub(crate) Vec<u8>);

impl prost::Message for Raw {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        buffer.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        _: u32,
        _: WireType,
        _: &mut impl Buf,
        _: DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// A field of a message that has a length.
pub(crate) fn field(tag: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_key(tag, WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

/// A process's most resident memory so far, and what it has now, in MiB.
pub(crate) fn resident(pid: i32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (kib("VmHWM:") >> 10, kib("VmRSS:") >> 10)
}

/// Whether a lie of this name is to be told: all are, or those that `LIE` has in its value.
pub(crate) fn is_asked_for(name: &str) -> bool {
    std::env::var("LIE").map_or(true, |asked| name.contains(&asked))
}
