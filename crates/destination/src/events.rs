//! What a copy's workers have to say, on its way to the session. They never wait, and what waits is bounded: by what there is to be said
//! of every page and every block. A source that makes more of it has its session ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mirror::layout::Layout;
use mirror::memory::destination::Event;
use tokio::sync::mpsc;

use crate::end::{End, violation};

/// What may wait beside a word on each page and block: barriers, and the ends of streams.
const ROOM: u64 = 4096;

/// The session's end.
pub(super) struct Events {
    queue: mpsc::Receiver<Event>,
    flooded: Arc<AtomicBool>,
}

/// The workers' end.
#[derive(Clone)]
pub(super) struct Teller {
    queue: mpsc::Sender<Event>,
    flooded: Arc<AtomicBool>,
}

impl Events {
    /// Of a copy of so much RAM, and so many blocks of disks.
    pub(super) fn of(layout: &Layout, blocks: u64) -> (Teller, Events) {
        let most = layout.page_count().saturating_add(blocks).saturating_add(ROOM);
        let (tell, queue) = mpsc::channel(usize::try_from(most).unwrap_or(usize::MAX >> 4));
        let flooded = Arc::<AtomicBool>::default();
        (Teller { queue: tell, flooded: Arc::clone(&flooded) }, Events { queue, flooded })
    }

    /// The next; never where nobody is left to say anything. Nothing is lost when this is cancelled.
    pub(super) async fn next(&mut self) -> Option<Result<Event, End>> {
        let event = self.queue.recv().await?;
        Some(self.unless_flooded(event))
    }

    /// One that is there already.
    pub(super) fn waiting(&mut self) -> Option<Result<Event, End>> {
        let event = self.queue.try_recv().ok()?;
        Some(self.unless_flooded(event))
    }

    fn unless_flooded(&self, event: Event) -> Result<Event, End> {
        if self.flooded.load(Ordering::Relaxed) {
            return Err(violation("sends more that is wrong, or more barriers, than it hears of"));
        }
        Ok(event)
    }
}

impl Teller {
    /// Does not block.
    pub(super) fn tell(&self, event: Event) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(event) {
            self.flooded.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_cannot_fill_the_memory_of_this_host_with_barriers_that_nobody_hears_of() {
        let (tell, mut events) = Events::of(&Layout::new([("ram", 4096)], 1).unwrap(), 2);
        let barrier = || Event::Ended { stream: 0 };
        for _ in 0..ROOM + 3 {
            tell.tell(barrier());
        }
        assert!(matches!(events.waiting(), Some(Ok(_))));
        tell.tell(barrier());
        tell.tell(barrier());
        assert!(matches!(events.waiting(), Some(Err(End::Failed(_)))));
    }
}
