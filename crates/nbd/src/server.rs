//! The serving end.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::BlockSizes;
use crate::connection;
pub use crate::export::{Export, Request};
pub use crate::reply::Reply;
use crate::wire::MAX_STRING;

/// How long after a client that could not be accepted the next one is tried.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves one export on a unix socket, to one client at a time: another one is turned away by a connection that
/// ends at once. A client may leave and another one, or the same, come after it.
///
/// When it ends, or is dropped, the connection is closed, the socket's file removed, and the threads waited for. A
/// thread that is in [`Export::take`] or [`Export::disconnected`] at that moment ends when that returns; so neither
/// must wait for the server's end, nor hold the last of it.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    listener: Arc<UnixListener>,
    current: Arc<Mutex<Current>>,
    accepting: Option<JoinHandle<()>>,
}

/// The connection under way.
#[derive(Debug, Default)]
struct Current {
    ending: bool,
    /// A second handle of its socket, to close it by.
    stream: Option<UnixStream>,
}

impl Server {
    /// Serves the export under this name to whoever connects to the listener, which is the socket of that path, with the block
    /// sizes 1, 64 KiB and 32 MiB.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn listen(
        listener: UnixListener,
        socket: &Path,
        export_name: &str,
        export: Arc<impl Export>,
    ) -> io::Result<Server> {
        Server::listen_with(listener, socket, export_name, BlockSizes::default(), export)
    }

    /// The same with other block sizes.
    ///
    /// # Errors
    /// As [`listen`](Server::listen); `InvalidInput` for block sizes or a name that the protocol does not allow.
    pub fn listen_with(
        listener: UnixListener,
        socket: &Path,
        export_name: &str,
        sizes: BlockSizes,
        export: Arc<impl Export>,
    ) -> io::Result<Server> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let sizes = sizes.check().map_err(|error| invalid(error.to_string()))?;
        if export_name.len() > MAX_STRING {
            return Err(invalid(format!("a name of {} bytes", export_name.len())));
        }
        let listener = Arc::new(listener);
        let current = Arc::new(Mutex::new(Current::default()));
        let acceptor = Acceptor {
            listener: Arc::clone(&listener),
            current: Arc::clone(&current),
            name: export_name.into(),
            sizes,
            export,
        };
        let mut server = Server { socket: socket.to_owned(), listener, current, accepting: None };
        let accepting = std::thread::Builder::new().name("nbd-accept".into());
        server.accepting = Some(accepting.spawn(move || acceptor.accept())?);
        Ok(server)
    }

    /// Where clients find it.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends it. What is unanswered by now is lost to the client.
    pub fn end(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        {
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.ending = true;
            if let Some(stream) = &current.stream {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        // Wakes the thread that accepts.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
    }
}

/// Closes the connection when its thread ends, even by a panic. Replies may outlive it and hold the socket: the
/// client is to see its end all the same.
struct Leaving(Arc<Mutex<Current>>);

impl Drop for Leaving {
    fn drop(&mut self) {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner).stream.take();
        if let Some(stream) = stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The thread that takes clients in.
struct Acceptor<E> {
    listener: Arc<UnixListener>,
    current: Arc<Mutex<Current>>,
    name: Arc<str>,
    sizes: BlockSizes,
    export: Arc<E>,
}

impl<E: Export> Acceptor<E> {
    fn accept(&self) {
        let mut serving: Option<JoinHandle<()>> = None;
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(_) if self.lock().ending => break,
                Err(error) => {
                    // Too many open files, say. That may pass.
                    tracing::warn!(%error, "a client could not be taken in");
                    std::thread::sleep(ACCEPT_AGAIN);
                    continue;
                }
            };
            if serving.as_ref().is_some_and(|thread| !thread.is_finished()) && !self.has_hung_up() {
                tracing::warn!(export = &*self.name, "a second client is turned away");
                continue;
            }
            // One that has just left may not be done with yet: its last request may be in the export's hands.
            if let Some(thread) = serving.take() {
                let _ = thread.join();
            }
            match self.start(stream) {
                Ok(thread) => serving = thread,
                Err(error) => tracing::error!(%error, "a client cannot be served"),
            }
        }
        if let Some(thread) = serving {
            let _ = thread.join();
        }
    }

    fn start(&self, stream: UnixStream) -> io::Result<Option<JoinHandle<()>>> {
        {
            let mut current = self.lock();
            if current.ending {
                return Ok(None);
            }
            current.stream = Some(stream.try_clone()?);
        }
        let (name, sizes, export) = (Arc::clone(&self.name), self.sizes, Arc::clone(&self.export));
        let leaving = Leaving(Arc::clone(&self.current));
        let serve = move || {
            let _leaving = leaving;
            match connection::serve(stream, &name, sizes, &*export) {
                Ok(()) => tracing::debug!(export = &*name, "the client left"),
                Err(error) if connection::is_gone(&error) => {
                    tracing::debug!(export = &*name, "the client left without a word");
                }
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(export = &*name, error, "the client is not served any more");
                }
            }
        };
        Ok(Some(std::thread::Builder::new().name("nbd-serve".into()).spawn(serve)?))
    }

    /// Whether the client being served has closed its end.
    fn has_hung_up(&self) -> bool {
        let current = self.lock();
        let Some(stream) = &current.stream else { return true };
        let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
        let polled = poll(&mut fds, Some(&Timespec::default()));
        polled.is_ok() && !fds[0].revents().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
