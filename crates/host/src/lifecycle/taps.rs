//! A machine's interfaces on one host: brought up when it runs, removed when it has gone.

use network::mac::Mac;

use crate::handed_in::HandedIn;
use crate::vm::Record;
use finding::chain;
use network::interfaces::{self, Interfaces, Kind, Tap, TapError};

/// Lets frames through the taps made for a machine, and through its macvtaps, whoever made them.
pub async fn raise_taps(record: &Record) {
    let macvtaps = || macvtaps(record);
    if record.made.taps.is_empty() && macvtaps().next().is_none() {
        return;
    }
    // The machine must run all the same: without network it can be mended, without running it cannot. One that fails keeps no other
    // down.
    let told = |raised: Result<(), TapError>| {
        if let Err(e) = raised {
            tracing::error!(vm = %record.name, error = chain(&e), "a tap could not be raised");
        }
    };
    let interfaces = match Interfaces::open() {
        Ok(interfaces) => interfaces,
        Err(e) => return told(Err(e)),
    };
    for (macvtap, mac) in macvtaps() {
        told(interfaces.raise_macvtap(macvtap, mac).await);
    }
    for tap in record.made.taps.iter().filter(|tap| macvtaps().all(|(macvtap, _)| macvtap != *tap)) {
        told(interfaces.raise(tap).await);
    }
}

/// The macvtaps of a machine, with their addresses.
fn macvtaps(record: &Record) -> impl Iterator<Item = (&str, Mac)> {
    let address = |handed_in: &HandedIn| handed_in.macvtap.as_deref()?.parse::<Mac>().ok();
    record.handed_in.iter().filter_map(move |macvtap| Some((macvtap.ifname.as_str(), address(macvtap)?)))
}

/// Removes the taps made for a machine. A macvtap that somebody else has made is brought down if the machine has gone: unlike a tap it
/// would go on taking what is for the machine's address, and keep everything on this host from it.
pub(super) async fn remove_taps(record: &Record, goes: bool) {
    let is_made = |name: &str| record.made.taps.iter().any(|tap| tap == name);
    let left: Vec<&str> =
        macvtaps(record).map(|(name, _)| name).filter(|name| goes && !is_made(name)).collect();
    interfaces::remove_all(&record.made.taps).await;
    if left.is_empty() {
        return;
    }
    let interfaces = match Interfaces::open() {
        Ok(interfaces) => interfaces,
        Err(e) => return tracing::error!(error = chain(&e), "macvtaps cannot be brought down"),
    };
    for macvtap in left {
        // Another interface may have the name by now.
        if !matches!(interfaces.describe(macvtap).await, Ok(Some(Tap { kind: Kind::Macvtap(_), .. }))) {
            continue;
        }
        match interfaces.bring_down(macvtap).await {
            // Its maker has removed it.
            Ok(()) | Err(TapError::Missing(_)) => {}
            Err(e) => tracing::error!(error = chain(&e), "a macvtap cannot be brought down"),
        }
    }
}
