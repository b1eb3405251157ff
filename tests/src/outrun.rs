//! A guest that outruns the link between its hosts.

use testbed::Wire;
use testbed::guest_spec::{GuestSpec, Pattern};

use crate::{PAGE, Pair};

/// What a link carries that a guest outruns, in bits per second: so little that it does although others keep the cores of this
/// machine busy and it gets a part of one.
pub const OUTRUN: u64 = 50_000_000;
/// Of what such a guest writes over and over again, in MiB: seconds of the link, a part of one for the guest.
const WORKING_SET_MIB: u64 = 16;

impl Pair {
    /// Makes the link between the hosts so slow, in bits per second.
    ///
    /// # Panics
    /// If it cannot be done.
    pub fn link_carries(&self, bits_per_second: u64) {
        for host in [self.a(), self.b()] {
            self.testbed().set_rate(host, Wire::Link, bits_per_second).unwrap();
        }
    }

    /// This guest, but it dirties four times what the link carries from now on, in pages that neither deltas nor compression
    /// make smaller.
    ///
    /// # Panics
    /// If the link cannot be made so slow.
    #[must_use]
    pub fn outrun_by(&self, spec: GuestSpec) -> GuestSpec {
        self.link_carries(OUTRUN);
        outrunning(spec)
    }
}

/// This guest, but it dirties four times [`OUTRUN`].
#[must_use]
pub fn outrunning(spec: GuestSpec) -> GuestSpec {
    GuestSpec {
        fill_mib: WORKING_SET_MIB + WORKING_SET_MIB / 2,
        working_set_mib: Some(WORKING_SET_MIB),
        rate: OUTRUN / 8 * 4 / PAGE,
        pattern: Pattern::Incompressible,
        ..spec
    }
}
