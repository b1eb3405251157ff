//! Diverting what is sent to a tap to another interface: a filter of the kernel's traffic control (tc-u32(8), tc-mirred(8)) at the tap's
//! way out, which takes effect between two frames.

use futures::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Error, LinkUnspec};

use super::{Interfaces, TapError};

/// Before all filters that others have made: theirs might let a frame pass to a guest that is not there.
const PRIORITY: u16 = 1;
/// `ETH_P_ALL`, in network byte order.
const ALL: u16 = 0x0003_u16.to_be();
/// Frames that wait in the kernel to be read by us. Its default is 1,000.
const WAITING: u32 = 8192;

/// What is sent to a tap goes elsewhere, as long as this is on.
#[derive(Debug, Clone)]
pub(crate) struct Diversion {
    name: String,
    tap: u32,
    to: u32,
    /// The place for filters was not there before.
    made: bool,
}

impl Interfaces {
    /// Prepares to divert what is sent to a tap to another interface, which is brought up for that. Nothing is diverted yet.
    pub(crate) async fn prepare_diversion(&self, tap: &str, to: &str) -> Result<Diversion, TapError> {
        let link = self.find(tap).await?.ok_or_else(|| TapError::Missing(tap.to_owned()))?;
        let mtu = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
        // This host must have nothing to say on an interface that the guest hears.
        let silent = std::fs::write(format!("/proc/sys/net/ipv6/conf/{to}/disable_ipv6"), "1");
        if let Err(e) = silent {
            tracing::debug!(interface = to, error = %e, "IPv6 is not there to be turned off");
        }
        let target = self.index(to).await?;
        let change = LinkUnspec::new_with_index(target)
            .mtu(mtu.unwrap_or(1500))
            .append_extra_attribute(LinkAttribute::TxQueueLen(WAITING))
            .arp(false)
            .up();
        self.change("bring up", to, change.build()).await?;
        let tap_index = link.header.index;
        let failed = |source| TapError::Request { action: "prepare to divert", name: tap.to_owned(), source };
        let made = match self.place_for_filters(tap_index, true).await {
            Ok(()) => true,
            Err(Error::NetlinkError(e)) if e.raw_code() == -libc::EEXIST => false,
            Err(e) => return Err(failed(e)),
        };
        Ok(Diversion { name: tap.to_owned(), tap: tap_index, to: target, made })
    }

    /// From the next frame on.
    pub(crate) async fn divert(&self, diversion: &Diversion) -> Result<(), TapError> {
        let failed = |source| TapError::Request { action: "divert", name: diversion.name.clone(), source };
        let index = i32::try_from(diversion.tap).unwrap_or_default();
        let filter = self.handle.traffic_filter(index).add().egress().priority(PRIORITY).protocol(ALL);
        filter.redirect(diversion.to).map_err(failed)?.execute().await.map_err(failed)
    }

    /// Not any more. No error where it was not begun.
    pub(crate) async fn end_diversion(&self, diversion: &Diversion) -> Result<(), TapError> {
        self.end_filter(&diversion.name, diversion.tap, diversion.made).await
    }

    /// Ends what an agent that was killed has begun.
    pub(crate) async fn end_any_diversion(&self, tap: &str) -> Result<(), TapError> {
        let Some(link) = self.find(tap).await? else { return Ok(()) };
        self.end_filter(tap, link.header.index, false).await
    }

    async fn end_filter(&self, name: &str, tap: u32, place_too: bool) -> Result<(), TapError> {
        let failed = |source| TapError::Request { action: "divert no more", name: name.to_owned(), source };
        let mut message = message(tap);
        message.header.parent = TcHandle { major: 0xffff, minor: TcHandle::MIN_EGRESS };
        message.header.info = (u32::from(PRIORITY) << 16) | u32::from(ALL);
        message.attributes.push(TcAttribute::Kind("u32".to_owned()));
        let removed = self.ask(RouteNetlinkMessage::DelTrafficFilter(message), 0).await;
        absent_is_fine(removed).map_err(failed)?;
        if place_too {
            absent_is_fine(self.place_for_filters(tap, false).await).map_err(failed)?;
        }
        Ok(())
    }

    async fn place_for_filters(&self, tap: u32, make: bool) -> Result<(), Error> {
        let mut message = message(tap);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: 0xffff, minor: 0 };
        message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
        match make {
            true => {
                self.ask(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL).await
            }
            false => self.ask(RouteNetlinkMessage::DelQueueDiscipline(message), 0).await,
        }
    }

    async fn ask(&self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(request)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(Error::NetlinkError(error));
            }
        }
        Ok(())
    }
}

fn message(interface: u32) -> TcMessage {
    TcMessage::with_index(i32::try_from(interface).unwrap_or_default())
}

fn absent_is_fine(removed: Result<(), Error>) -> Result<(), Error> {
    let absent = [-libc::ENOENT, -libc::EINVAL, -libc::ENODEV];
    match removed {
        Err(Error::NetlinkError(e)) if absent.contains(&e.raw_code()) => Ok(()),
        other => other,
    }
}
