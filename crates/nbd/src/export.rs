//! What is served, and what is asked of it.

use crate::reply::Reply;

/// One disk to be served.
pub trait Export: Send + Sync + 'static {
    /// Its bytes. Asked once per client; it is not to change while one is served.
    fn size(&self) -> u64;

    /// Takes one request, which is within the size and the limits. Requests come one after the other from the
    /// connection's thread, in the client's order, and the next one is read when this returns: to block slows the
    /// client down, and is what bounds how many requests are unanswered. Whoever has `reply` answers it, now or
    /// later, from any thread.
    fn take(&self, request: Request, reply: Reply);

    /// The client that was served has gone, whether it said so or not; nothing more is taken from it. Requests may
    /// still be unanswered: their replies go nowhere.
    fn disconnected(&self) {}
}

/// What a client asks for. Offsets and lengths are bytes; no length is 0. `durable`: on stable storage before the
/// reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Wants the content.
    Read {
        /// Where it begins.
        offset: u64,
        /// Of the data to be answered with; at most the maximum block size.
        length: u32,
    },
    /// Writes.
    Write {
        /// Where it begins.
        offset: u64,
        /// What; at most the maximum block size.
        data: Vec<u8>,
        /// See above.
        durable: bool,
    },
    /// Writes zeros.
    Zero {
        /// Where they begin.
        offset: u64,
        /// How many.
        length: u32,
        /// They need not take up room.
        may_unmap: bool,
        /// See above.
        durable: bool,
    },
    /// Does not need the content any more; what is read there afterwards is anything.
    Trim {
        /// Where it begins.
        offset: u64,
        /// Of what is not needed.
        length: u32,
        /// See above.
        durable: bool,
    },
    /// Every write that has been answered is to be on stable storage before the reply.
    Flush,
}
