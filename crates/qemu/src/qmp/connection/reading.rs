//! What QEMU says, line by line: events to whoever listens, answers to who waits for them.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{broadcast, oneshot};

use super::super::expecting::Expecting;
use super::read_half::ReadHalf;
use super::{Answer, ErrorBody, Event, Pending};

/// Longest line that is accepted. The largest answers (schemas, full block graphs) are below 1 MiB.
const LONGEST_LINE: usize = 64 << 20;

pub(super) async fn read_task(
    mut lines: Lines,
    events: broadcast::Sender<Event>,
    pending: Pending,
    expecting: Arc<Expecting>,
    mut closed: oneshot::Receiver<()>,
) {
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            _ = &mut closed => break,
        };
        match line {
            Ok(Some(line)) => dispatch(&line, &lines.read_half, &events, &pending, &expecting),
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "QMP connection broke while reading");
                break;
            }
        }
    }
    lines.read_half.end();
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

fn dispatch(
    line: &[u8],
    read_half: &ReadHalf,
    events: &broadcast::Sender<Event>,
    pending: &Pending,
    expecting: &Expecting,
) {
    let received = Instant::now();
    let line: Line = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => {
            tracing::warn!(%error, line = %String::from_utf8_lossy(line), "a line from QEMU is not understood");
            return;
        }
    };
    if let Some(name) = line.event {
        read_half.count_event();
        let timestamp = line.timestamp.and_then(|stamp| {
            let since = Duration::from_secs(u64::try_from(stamp.seconds).ok()?)
                + Duration::from_micros(u64::try_from(stamp.microseconds).ok()?);
            SystemTime::UNIX_EPOCH.checked_add(since)
        });
        let ours = expecting.is(&name, timestamp);
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
pub(super) struct Lines {
    pub(super) read_half: Arc<ReadHalf>,
    pub(super) buffer: Vec<u8>,
    /// Bytes of the buffer that are known to hold no end of line.
    pub(super) searched: usize,
}

impl Lines {
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
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
            if self.read_half.read(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}
