//! A QEMU that is made to wait for pages that are missing.

use std::ops::Range;

use dirty_tracker::{AttachError, DescriptorSource, InjectError, Injection, KnownFilters, MissingPages};
use mirror::layout::PAGE_SIZE;
use mirror::memory::post_copy::Places;
use mirror::memory::source::TrackedRange;
use qemu::{Qmp, RamBlock};

use finding::{Finding, chain, kind};
use host::Host;
use host::vm::GivenDescriptor;
use movable::confinement;

/// Where full userfaultfds come from.
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// Whether processes without privileges may have them.
const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// QEMU, attached so that it waits for what is missing.
pub(crate) struct Waiting {
    pub(crate) supplier: MissingPages,
    pub(crate) places: Places,
    pub(crate) given: Option<GivenDescriptor>,
}

/// Where QEMU has mapped guest RAM: the addresses, and which part of RAM each is.
pub(crate) fn places(ram: &[RamBlock]) -> (Vec<Range<u64>>, Places) {
    let (mut addresses, mut ranges) = (Vec::new(), Vec::new());
    for (block, ram) in ram.iter().enumerate() {
        let base = ram.mappings.first().map_or(0, |mapping| mapping.file_offset);
        for mapping in &ram.mappings {
            addresses.push(mapping.address..mapping.address + mapping.len);
            ranges.push((TrackedRange { block, offset: mapping.file_offset - base }, mapping.len));
        }
    }
    (addresses, Places { ranges })
}

/// Has QEMU wait, from now on, for pages of its RAM that are not there.
pub(crate) async fn attach(
    qmp: &Qmp,
    pid: u32,
    known: KnownFilters,
    addresses: &[Range<u64>],
    places: Places,
) -> Result<Waiting, Finding> {
    let refused = |why: String| {
        Finding::new(
            kind::POST_COPY,
            why,
            format!("let the destination's agent open {DEVICE}, or run as root"),
        )
    };
    // A descriptor of the device makes it independent of QEMU's own privileges.
    let given = match std::fs::File::open(DEVICE) {
        Ok(device) => Some(qmp.give_descriptor(device.into()).await.map_err(|e| refused(chain(&e)))?),
        Err(_) => None,
    };
    let source = given
        .as_ref()
        .map_or(DescriptorSource::Injected, |given| DescriptorSource::Device { fd_in_process: given.number });
    let injection = Injection { source, known };
    let supplier = tokio::task::block_in_place(|| MissingPages::attach(pid, addresses, injection)).map_err(
        |e| match &e {
            AttachError::Inject {
                source: InjectError::Confined { .. } | InjectError::DidNotStop { .. },
                ..
            } => Finding { kind: kind::POST_COPY.to_owned(), ..confinement::untracked(&e) },
            _ => refused(chain(&e)),
        },
    )?;
    let given = given.map(|given| GivenDescriptor { set: given.set, number: given.number });
    Ok(Waiting { supplier, places, given })
}

/// Why QEMU here could not be made to wait for missing pages.
pub(crate) fn impossible(host: &Host, ram: &[RamBlock]) -> Option<Finding> {
    if let Some(huge) = ram.iter().find(|block| block.page_size != PAGE_SIZE as u64) {
        return Some(Finding::new(
            kind::POST_COPY,
            format!("RAM block {} on {} has huge pages, which cannot come one by one", huge.id, host.name),
            "use --on-diverge throttle, or put the VM's RAM on a tmpfs",
        ));
    }
    let allowed = std::fs::File::open(DEVICE).is_ok()
        || std::fs::read_to_string(UNPRIVILEGED).is_ok_and(|allowed| allowed.trim() == "1");
    (!allowed).then(|| {
        Finding::new(
            kind::POST_COPY,
            format!("the agent on {} may not open {DEVICE}", host.name),
            format!("let it (root, or a udev rule), or set {UNPRIVILEGED} to 1"),
        )
    })
}
