//! Rates at which the guest dirties and checks: pages per second, as parameters and commands give them.

use crate::page;

/// A rate in pages per second: `250` is pages, `4MiB` is 1024.
pub(crate) fn parse(value: &str) -> Result<u64, &'static str> {
    let expected = "pages per second, or MiB per second as in 4MiB";
    match value.strip_suffix("MiB") {
        Some(mib) => mib.parse().ok().filter(|mib| *mib < 1 << 32).map(pages),
        None => value.parse().ok(),
    }
    .ok_or(expected)
}

/// Pages in that many MiB.
pub(crate) const fn pages(mib: u64) -> u64 {
    mib * ((1 << 20) / page::SIZE as u64)
}
