//! The source's side of device state: takes QEMU's stream.

use std::io;
use std::path::{Path, PathBuf};

use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};

use super::MAX_PART;
use crate::meeting;

/// The place where QEMU is to send its stream.
#[derive(Debug)]
pub struct DeviceSource {
    path: PathBuf,
    listener: UnixListener,
    stream: Option<UnixStream>,
    bytes: u64,
}

impl DeviceSource {
    /// Makes the socket, for the user alone whose directory it is in (mode 0600). It is removed when this is dropped.
    ///
    /// # Errors
    /// Those of `bind(2)`.
    pub fn listen(path: &Path) -> io::Result<DeviceSource> {
        let listener = std::os::unix::net::UnixListener::from(meeting::listen(path, 1)?);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(DeviceSource { path: path.to_owned(), listener, stream: None, bytes: 0 })
    }

    /// What to give QEMU's `migrate` command as `uri`.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Waits for QEMU and gives back the connection itself, to be read by whoever carries it. Nothing is lost when this is
    /// cancelled.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn accept(&mut self) -> io::Result<std::os::unix::net::UnixStream> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.listener.accept().await?.0,
        };
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    /// The next part of the stream; `None` at its end, which is when QEMU has saved everything. Nothing is lost when
    /// this is cancelled.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.stream.is_none() {
            self.stream = Some(self.listener.accept().await?.0);
        }
        let Some(stream) = &mut self.stream else { return Ok(None) };
        let mut part = Vec::with_capacity(MAX_PART);
        let read = stream.read_buf(&mut part).await?;
        self.bytes += read as u64;
        Ok((read > 0).then_some(part))
    }

    /// Bytes taken so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for DeviceSource {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
