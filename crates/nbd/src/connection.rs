//! One connection of the server: the handshake, and then one request after the other.

use std::io::{self, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::export::{Export, Request};
use crate::haggling::{self, Agreed, HagglingError, Offer};
use crate::reply::{Outgoing, Reply};
use crate::socket::{self, Incoming};
use crate::wire::{
    self, BlockSizes, COMMAND_FUA, COMMAND_NO_HOLE, Command, HAS_FLAGS, RequestHead, SEND_FLUSH, SEND_FUA,
    SEND_TRIM, SEND_WRITE_ZEROES,
};

/// How long a client may take for the whole handshake: as long as it is at it, nobody else is served.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Small requests are read many at a time.
const READ_AHEAD: usize = 128 << 10;

/// Serves a client until it leaves. `Ok` when it said so.
pub(super) fn serve(
    stream: UnixStream,
    name: &str,
    sizes: BlockSizes,
    export: &impl Export,
) -> Result<(), HagglingError> {
    let outgoing = stream.try_clone()?;
    let incoming = Incoming { stream, until: Some(Instant::now() + HANDSHAKE) };
    let mut incoming = BufReader::with_capacity(READ_AHEAD, incoming);
    let size = export.size();
    let flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;
    let offer = Offer { name: name.to_owned(), size, flags, sizes };
    outgoing.set_write_timeout(Some(HANDSHAKE))?;
    if haggling::offer(&mut incoming, &outgoing, &offer)? == Agreed::Nothing {
        return Ok(());
    }
    outgoing.set_write_timeout(None)?;
    incoming.get_mut().wait_for_ever()?;
    let mut requests = Requests { incoming, outgoing: Arc::new(Outgoing::new(outgoing)), size, sizes };
    let served = requests.pass_on(export);
    export.disconnected();
    served
}

/// The requests of one client.
struct Requests {
    incoming: BufReader<Incoming>,
    outgoing: Arc<Outgoing>,
    size: u64,
    sizes: BlockSizes,
}

impl Requests {
    fn pass_on(&mut self, export: &impl Export) -> Result<(), HagglingError> {
        loop {
            let head = RequestHead::decode(&socket::read_array(&mut self.incoming)?)?;
            let command = match head.command {
                Ok(Command::Disconnect) => return Ok(()),
                Ok(command) => command,
                Err(number) => {
                    // It has no data: the only command known to have any is the write.
                    tracing::debug!(number, "an unknown command");
                    Reply::new(&self.outgoing, Command::Flush, head.cookie, 0).refuse(wire::EINVAL);
                    continue;
                }
            };
            let reply = Reply::new(&self.outgoing, command, head.cookie, head.length);
            // Data follows whatever becomes of the request.
            let data = match command {
                Command::Write => self.data(head.length),
                _ => Ok(Vec::new()),
            };
            let data = match data {
                Ok(data) => data,
                Err(error) => {
                    // Where the next request begins is not known then.
                    reply.refuse(wire::EINVAL);
                    return Err(error);
                }
            };
            match self.judge(command, &head) {
                Ok(()) => export.take(request(command, &head, data), reply),
                Err(error) => {
                    reply.give_back(data);
                    reply.refuse(error);
                }
            }
        }
    }

    fn data(&mut self, length: u32) -> Result<Vec<u8>, HagglingError> {
        let length = wire::bounded("a write", length, self.sizes.maximum as usize)?;
        let mut data = self.outgoing.buffer(length);
        self.incoming.read_exact(&mut data)?;
        Ok(data)
    }

    /// What the export need not know of: `Err` with the error's number.
    fn judge(&self, command: Command, head: &RequestHead) -> Result<(), u32> {
        let RequestHead { flags, offset, length, .. } = *head;
        let allowed = match command {
            Command::Write | Command::Trim | Command::Flush | Command::Read => COMMAND_FUA,
            Command::WriteZeroes => COMMAND_FUA | COMMAND_NO_HOLE,
            Command::Disconnect => 0,
        };
        if flags & !allowed != 0 {
            return Err(wire::EINVAL);
        }
        if command == Command::Flush {
            return Ok(());
        }
        if offset.checked_add(length.into()).is_none_or(|end| end > self.size) {
            let writes = matches!(command, Command::Write | Command::WriteZeroes);
            return Err(if writes { wire::ENOSPC } else { wire::EINVAL });
        }
        let too_long = command == Command::Read && length > self.sizes.maximum;
        if length == 0 || too_long || !self.sizes.aligned(offset, length.into()) {
            return Err(wire::EINVAL);
        }
        Ok(())
    }
}

fn request(command: Command, head: &RequestHead, data: Vec<u8>) -> Request {
    let RequestHead { flags, offset, length, .. } = *head;
    let durable = flags & COMMAND_FUA != 0;
    match command {
        Command::Read => Request::Read { offset, length },
        Command::Write => Request::Write { offset, data, durable },
        Command::Trim => Request::Trim { offset, length, durable },
        Command::WriteZeroes => {
            Request::Zero { offset, length, may_unmap: flags & COMMAND_NO_HOLE == 0, durable }
        }
        // A disconnection has been dealt with by now.
        Command::Flush | Command::Disconnect => Request::Flush,
    }
}

/// Whether the error is just that the client has gone.
pub(super) fn is_gone(error: &HagglingError) -> bool {
    let HagglingError::Io(error) = error else { return false };
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}
