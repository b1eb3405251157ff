//! An interface of our own that what is sent to a tap is diverted to.

use crate::diversion::Diversion;
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::link::LinkAttribute;

use super::{Interfaces, TapError, silence};

/// Frames that wait in the kernel to be read by us. Its default is 1,000.
const WAITING: u32 = 8192;

impl Interfaces {
    /// How many frames that were sent to an interface have been dropped for want of room.
    pub async fn dropped(&self, name: &str) -> Result<u64, TapError> {
        let link = self.find(name).await?.ok_or_else(|| TapError::Missing(name.to_owned()))?;
        let dropped = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats.tx_dropped),
            _ => None,
        });
        Ok(dropped.unwrap_or_default())
    }

    /// Prepares to divert what is sent to a tap to another interface, which is brought up for that. Nothing is diverted yet.
    pub async fn prepare_diversion(&self, tap: &str, to: &str) -> Result<Diversion, TapError> {
        let link = self.find(tap).await?.ok_or_else(|| TapError::Missing(tap.to_owned()))?;
        let mtu = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
        silence(to);
        let target = self.index(to).await?;
        let change = LinkUnspec::new_with_index(target)
            .mtu(mtu.unwrap_or(1500))
            .append_extra_attribute(LinkAttribute::TxQueueLen(WAITING))
            .arp(false)
            .up();
        self.change("bring up", to, change.build()).await?;
        let tap_index = link.header.index;
        let prepared = tokio::task::spawn_blocking(move || Diversion::prepare(tap_index, target)).await;
        prepared
            .unwrap_or_else(|e| Err(e.into()))
            .map_err(|source| TapError::Divert { name: tap.to_owned(), source })
    }
}
