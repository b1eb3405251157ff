//! The mirror of disks, beside that of memory: begun, and what its images hold already told to the source.

use mirror::memory::destination::Event;
use mirror::storage::destination::{StorageDestination, StorageError};
use mirror::storage::layout::DiskLayout;
use tokio::sync::mpsc;

use crate::copy::Copy;
use crate::end::{End, failed};
use crate::events::Teller;
use crate::images::Images;
use crate::reservation::{Request, Reservation};
use crate::source::Source;
use finding::{Finding, chain};
use host::Host;
use protocol::wire::{self, HOLDS_HASHES, Reply};

/// What is told of a disk may be ahead of the link by so many messages.
const AHEAD: usize = 4;

/// Blocks of the disks that are to be mirrored.
pub(super) fn blocks(request: &Request, images: &Images) -> u64 {
    let sizes = images.planned.iter().map(|plan| plan.size);
    DiskLayout::new(sizes, request.layout.streams()).map_or(0, |layout| layout.block_count())
}

/// Begins to keep copies of the disks that are to be mirrored; None where there are none.
pub(super) async fn begin(
    host: &Host,
    request: &Request,
    reservation: &mut Reservation,
    tell: Teller,
) -> Result<Option<StorageDestination>, End> {
    let Reservation { images, record, .. } = reservation;
    if images.planned.is_empty() {
        return Ok(None);
    }
    let sizes = images.planned.iter().map(|plan| plan.size);
    let layout = DiskLayout::new(sizes, request.layout.streams()).map_err(|e| failed("disk", &e))?;
    let opened = images.open(host, record).await.map_err(|finding| End::Failed(vec![finding]))?;
    let wrong = move |wrong| tell.tell(Event::WrongBlock(wrong));
    StorageDestination::start(layout, request.secret.clone(), opened, &images.are_zero(), wrong)
        .map(Some)
        .map_err(|e| failed("disk", &e))
}

/// The copy of a disk cannot be kept up: which, why, and what to do.
pub(super) fn broke(images: &Images, error: &StorageError) -> End {
    let StorageError::Image { disk, action, source } = error else { return failed("data-stream", error) };
    let path = images.planned.get(*disk).map(|plan| plan.path.display().to_string()).unwrap_or_default();
    let message = format!("{path} cannot be {action} at the destination: {}", chain(source));
    let hint = match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "make room there, then migrate again"
        }
        _ => "see to the file system there, then migrate again",
    };
    End::Failed(vec![Finding::new("disk", message, hint)])
}

/// What is set aside, for the wire.
pub(super) fn reserved(images: &Images) -> wire::Reserved {
    let known = (0..).zip(images.are_zero()).filter(|(_, zero)| !zero).map(|(disk, _)| disk);
    wire::Reserved {
        mirrored: images.planned.iter().map(|plan| plan.number).collect(),
        known: known.collect(),
        existing: (0..).zip(&images.planned).filter(|(_, plan)| plan.exists).map(|(disk, _)| disk).collect(),
        keeper: Vec::new(),
    }
}

/// Reads images that were there before, and tells the source what they hold.
pub(super) async fn tell_contents(copy: &Copy, source: &Source) -> Result<(), End> {
    let Some(storage) = &copy.memory.storage else { return Ok(()) };
    let known: Vec<u32> = reserved(&copy.reservation.images).known;
    if known.is_empty() {
        return Ok(());
    }
    let (tell, mut told) = mpsc::channel(AHEAD);
    let contents = storage.contents();
    let reading = tokio::task::spawn_blocking(move || {
        for disk in known {
            let (mut first, mut hashes) = (0, Vec::new());
            let mut send = |hashes: &mut Vec<_>| {
                let part = wire::Holds::of(disk, first, hashes);
                first += hashes.len() as u64;
                hashes.clear();
                // Nobody listens any more where the link is gone, which the sender tells.
                let _ = tell.blocking_send(part);
            };
            contents.read_back(disk as usize, |_, part| {
                hashes.extend_from_slice(part);
                if hashes.len() >= HOLDS_HASHES {
                    send(&mut hashes);
                }
            })?;
            if !hashes.is_empty() {
                send(&mut hashes);
            }
        }
        Ok::<_, StorageError>(())
    });
    while let Some(part) = told.recv().await {
        source.sender.send(Reply::Holds(part)).await?;
    }
    let read = reading.await.map_err(|e| failed("disk", &e))?;
    read.map_err(|e| broke(&copy.reservation.images, &e))?;
    Ok(source.sender.send(Reply::Holds(wire::Holds { last: true, ..wire::Holds::default() })).await?)
}
