//! The destination's side of device state: feeds QEMU's stream, but what must wait only when RAM is complete.

use std::io;
use std::path::{Path, PathBuf};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::MAX_HELD;

/// The way to a QEMU that waits for its device state.
#[derive(Debug)]
pub struct DeviceDestination {
    path: PathBuf,
    stream: Option<UnixStream>,
    held: Option<Vec<u8>>,
    bytes: u64,
}

/// Why device state could not be fed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// QEMU does not take it.
    #[error("QEMU does not take its device state")]
    Feed(#[source] io::Error),
    /// Something else than that QEMU listens.
    #[error("another process than QEMU listens for its device state")]
    Other,
    /// More than a destination holds back.
    #[error("the device state is larger than {MAX_HELD} bytes")]
    TooLarge,
}

impl DeviceDestination {
    /// Where QEMU will listen.
    #[must_use]
    pub fn new(path: &Path) -> DeviceDestination {
        DeviceDestination { path: path.to_owned(), stream: None, held: None, bytes: 0 }
    }

    /// What to give QEMU's `migrate-incoming` command as `uri`.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Connects to the QEMU that is process `pid`, which listens by now. Where its directory is another user's, something else may.
    ///
    /// # Errors
    /// [`DeviceError::Feed`], [`DeviceError::Other`].
    pub async fn connect(&mut self, pid: u32) -> Result<(), DeviceError> {
        let stream = UnixStream::connect(&self.path).await.map_err(DeviceError::Feed)?;
        let peer = stream.peer_cred().map_err(DeviceError::Feed)?.pid();
        if peer.and_then(|peer| u32::try_from(peer).ok()) != Some(pid) {
            return Err(DeviceError::Other);
        }
        self.stream = Some(stream);
        Ok(())
    }

    /// The connection itself, for whoever feeds it without this.
    ///
    /// # Errors
    /// [`DeviceError::Feed`] where there is none.
    pub fn take_stream(&mut self) -> Result<std::os::unix::net::UnixStream, DeviceError> {
        let stream = self.stream.take().ok_or(DeviceError::Feed(io::ErrorKind::NotConnected.into()))?;
        let stream = stream.into_std().map_err(DeviceError::Feed)?;
        stream.set_nonblocking(false).map_err(DeviceError::Feed)?;
        Ok(stream)
    }

    /// From here on everything is held.
    pub fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Passes a part of the stream on, or holds it.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn feed(&mut self, part: &[u8]) -> Result<(), DeviceError> {
        self.bytes += part.len() as u64;
        match (&mut self.held, &mut self.stream) {
            (Some(held), _) if held.len() + part.len() > MAX_HELD => Err(DeviceError::TooLarge),
            (Some(held), _) => {
                held.extend_from_slice(part);
                Ok(())
            }
            (None, Some(stream)) => stream.write_all(part).await.map_err(DeviceError::Feed),
            (None, None) => Err(DeviceError::Feed(io::ErrorKind::NotConnected.into())),
        }
    }

    /// Guest RAM is complete: passes on what was held, and ends the stream.
    ///
    /// # Errors
    /// [`DeviceError::Feed`].
    pub async fn release(&mut self) -> Result<(), DeviceError> {
        let held = self.held.take().unwrap_or_default();
        self.feed_directly(&held).await?;
        self.stream = None;
        Ok(())
    }

    async fn feed_directly(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let stream = self.stream.as_mut().ok_or(DeviceError::Feed(io::ErrorKind::NotConnected.into()))?;
        stream.write_all(bytes).await.map_err(DeviceError::Feed)?;
        stream.flush().await.map_err(DeviceError::Feed)
    }

    /// Bytes that came in so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for DeviceDestination {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
