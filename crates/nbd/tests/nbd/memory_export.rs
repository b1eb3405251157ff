//! An export that keeps its content in memory.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd::server::{Export, Reply, Request};

type Answer = io::Result<Option<Vec<u8>>>;

/// Serves its content, and remembers what was asked for.
pub(crate) struct MemoryExport {
    content: Mutex<Vec<u8>>,
    seen: Mutex<Vec<Request>>,
    disconnected: AtomicUsize,
    /// Where replies go to be answered late; they are answered at once without.
    late: Option<Mutex<Sender<(Reply, Answer)>>>,
}

impl MemoryExport {
    pub(crate) fn new(size: usize) -> Arc<MemoryExport> {
        Arc::new(MemoryExport {
            content: Mutex::new(vec![0; size]),
            seen: Mutex::default(),
            disconnected: AtomicUsize::new(0),
            late: None,
        })
    }

    /// One whose answers come late, several at a time, the last one first.
    pub(crate) fn out_of_order(size: usize) -> Arc<MemoryExport> {
        let (sender, receiver) = channel();
        std::thread::spawn(move || answer_backwards(&receiver));
        Arc::new(MemoryExport {
            content: Mutex::new(vec![0; size]),
            seen: Mutex::default(),
            disconnected: AtomicUsize::new(0),
            late: Some(Mutex::new(sender)),
        })
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    /// What was asked for since this was last called.
    pub(crate) fn seen(&self) -> Vec<Request> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    pub(crate) fn disconnected(&self) -> usize {
        self.disconnected.load(Ordering::SeqCst)
    }

    fn apply(&self, request: &Request, reply: &Reply) -> Answer {
        let mut content = self.content.lock().unwrap();
        let range = |offset: u64, length: usize| offset as usize..offset as usize + length;
        match request {
            Request::Read { offset, length } => {
                let mut data = reply.buffer(*length as usize);
                data.copy_from_slice(&content[range(*offset, *length as usize)]);
                return Ok(Some(data));
            }
            Request::Write { offset, data, .. } => content[range(*offset, data.len())].copy_from_slice(data),
            Request::Zero { offset, length, .. } | Request::Trim { offset, length, .. } => {
                content[range(*offset, *length as usize)].fill(0);
            }
            Request::Flush => {}
        }
        Ok(None)
    }
}

impl Export for MemoryExport {
    fn size(&self) -> u64 {
        self.content.lock().unwrap().len() as u64
    }

    fn take(&self, request: Request, reply: Reply) {
        let result = self.apply(&request, &reply);
        self.seen.lock().unwrap().push(request);
        match &self.late {
            Some(late) => late.lock().unwrap().send((reply, result)).unwrap(),
            None => answer(reply, result),
        }
    }

    fn disconnected(&self) {
        self.disconnected.fetch_add(1, Ordering::SeqCst);
    }
}

fn answer(reply: Reply, result: Answer) {
    match result {
        Ok(Some(data)) => reply.data(Ok(data)),
        other => reply.done(other.map(|_| ())),
    }
}

fn answer_backwards(replies: &Receiver<(Reply, Answer)>) {
    while let Ok(first) = replies.recv() {
        let mut held = vec![first];
        while held.len() < 16
            && let Ok(next) = replies.recv_timeout(Duration::from_micros(200))
        {
            held.push(next);
        }
        for (reply, result) in held.into_iter().rev() {
            answer(reply, result);
        }
    }
}
