//! What disks were mirrored to becomes the machine's own.

use crate::host::Host;
use crate::vm::Record;

/// What disks were mirrored to is the machine's from here on: nothing removes it or takes it for what a migration has left.
pub fn own_disks(host: &Host, record: &Record) {
    host.left.no_remnants(record.made.images.iter().map(|image| image.path.as_path()));
}

/// The same on record, with what was shipped to be booted from.
pub fn has_own_disks(record: &mut Record) {
    record.made.images.clear();
    record.made.shipped.clear();
}
