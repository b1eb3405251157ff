//! A machine's own table in the firewall, which moves with it.

use crate::host::Host;
use finding::{Finding, chain};
use network::nft;
use ownership::VmName;

/// A description that is longer, in bytes, is not carried to another host.
const LONGEST: usize = 512 << 10;
const KIND: &str = "firewall";

/// Describes the table that a machine has here; empty where it has none.
///
/// # Errors
/// What an operator is told where `nft` cannot say, or the table is too large to be carried.
pub async fn describe(host: &Host, name: &VmName) -> Result<String, Finding> {
    let Some(pattern) = &host.firewall.nft_table else { return Ok(String::new()) };
    let table = pattern.table(name.as_ref());
    let told = |e: nft::NftError| {
        Finding::new(KIND, format!("on {}: {}", host.name, chain(&e)), "see `nft list table` there")
    };
    let document = nft::export(&table).await.map_err(told)?.unwrap_or_default();
    if document.len() > LONGEST {
        let message =
            format!("table {table} takes {} bytes to describe, of at most {LONGEST}", document.len());
        return Err(Finding::new(KIND, message, "make it smaller, or take it out of [network] nft_table"));
    }
    Ok(document)
}

/// Why a machine with a table of its own cannot come here, as far as that can be told without making it.
pub fn examine(host: &Host, document: &str) -> Option<Finding> {
    if document.is_empty() || host.firewall.nft_table.is_some() {
        return None;
    }
    let message = format!("the VM has a firewall table of its own, and {} knows no name for such", host.name);
    Some(Finding::new(
        KIND,
        message,
        format!("set [network] nft_table in the configuration of {}", host.name),
    ))
}

/// Makes the table that a machine had at its source.
///
/// # Errors
/// What an operator is told where it cannot be made.
pub async fn make(host: &Host, name: &VmName, document: &str) -> Result<(), Finding> {
    let Some(pattern) = &host.firewall.nft_table else { return Ok(()) };
    let table = pattern.table(name.as_ref());
    let told = |e: nft::NftError| {
        Finding::new(
            KIND,
            format!("on {}: {}", host.name, chain(&e)),
            "see that both hosts have the same nft",
        )
    };
    for object in nft::load(document, &table).await.map_err(told)? {
        tracing::warn!(%table, object, "is not as it was at the source");
    }
    Ok(())
}

/// Removes it with the machine.
pub(crate) async fn remove(host: &Host, name: &VmName) {
    let Some(pattern) = &host.firewall.nft_table else { return };
    if let Err(e) = nft::remove(&pattern.table(name.as_ref())).await {
        tracing::error!(vm = %name, error = chain(&e), "its firewall table is left");
    }
}
