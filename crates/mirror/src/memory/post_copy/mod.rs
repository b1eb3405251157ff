//! Post-copy: the machine runs at the destination before all of its memory is there.
//!
//! What the guest has dirtied last is *withheld*: the destination is told to be without it
//! ([`MemorySource::withhold`](super::source::MemorySource::withhold)), and the machine is handed over. From then on the
//! [source](PostCopySource) supplies the pages that the guest asks for at once, with their neighbours, on a stream of
//! their own, and pushes the rest on others, the hottest chunks first. The [destination](PostCopyDestination) puts each
//! page only where there is none: what the guest has written there is never overwritten, so no order between the
//! streams matters, and a page may come any number of times.
//!
//! When the link is lost, the guest waits at the next page that it lacks, and goes on when another source, told what is
//! still missing, has taken over. See [`dirty_tracker::MissingPages`] on why the end of the agent does it no harm.

mod destination;
mod source;

pub use destination::{Event, Faults, Places, PostCopyDestination, PostCopyError, still_missing};
pub use source::PostCopySource;
