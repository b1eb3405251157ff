//! Macvtaps: interfaces with a MAC address of their own on another interface, the lower one, whose queues a process opens as character
//! devices.
//!
//! One that is made here has its address only from when it is brought up: in mode passthru it is the lower interface's as well.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::mac::Mac;
use futures::TryStreamExt;
use rtnetlink::packet_route::link::{
    InfoData, InfoMacVtap, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, MacVlanMode,
};
use rtnetlink::{LinkMacVtap, LinkUnspec};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use super::{Interfaces, TapError, ioctl};

/// A macvtap as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Macvtap {
    /// The interface that it is on; None where that is in another network namespace.
    pub lower: Option<String>,
    /// Which frames pass between it, its neighbours on the same interface and the network.
    pub mode: MacVlanMode,
    /// What the lower interface takes for it.
    pub mac: Mac,
}

impl Macvtap {
    /// One on that interface, by the kernel's number of its mode. None where it makes no sense.
    pub fn of(lower: &str, mode: u32, mac: &str) -> Option<Macvtap> {
        let (mode, mac) = (MacVlanMode::from(mode), mac.parse::<Mac>().ok()?);
        let makes_sense = is_plain(mode) && !mac.is_group() && !lower.is_empty();
        makes_sense.then(|| Macvtap { lower: Some(lower.to_owned()), mode, mac })
    }

    /// The kernel's number of its mode; none where that is not all there is to say of it.
    pub fn number(&self) -> Option<u32> {
        is_plain(self.mode).then(|| self.mode.into())
    }
}

/// A mode that needs nothing but its number.
fn is_plain(mode: MacVlanMode) -> bool {
    use MacVlanMode::{Bridge, Passthrough, Private, Vepa};
    matches!(mode, Private | Vepa | Bridge | Passthrough)
}

impl Interfaces {
    /// What is special about a link, if it is a macvtap.
    pub(super) async fn macvtap(&self, link: &LinkMessage) -> Result<Option<Macvtap>, TapError> {
        let Some(mode) = link.attributes.iter().find_map(mode) else { return Ok(None) };
        let (mut mac, mut index, mut elsewhere) = (None, None, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(address) => {
                    mac = <[u8; 6]>::try_from(&address[..]).ok().map(Mac::from_bytes);
                }
                LinkAttribute::Link(lower) => index = Some(*lower),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                _ => {}
            }
        }
        let lower = match index.filter(|_| !elsewhere) {
            Some(index) => self.name(index).await?,
            None => None,
        };
        Ok(mac.map(|mac| Macvtap { lower, mode, mac }))
    }

    /// Makes one, and leaves it down.
    pub async fn make_macvtap(
        &self,
        name: &str,
        macvtap: &Macvtap,
        mtu: u32,
        queue_length: Option<u32>,
    ) -> Result<(), TapError> {
        let lower = self.index(macvtap.lower.as_deref().unwrap_or_default()).await?;
        let mut link = LinkMacVtap::new(name, lower, macvtap.mode).mtu(mtu);
        if let Some(length) = queue_length {
            link = link.txqueuelen(length);
        }
        let made = self.handle.link().add(link.build()).execute().await;
        made.map_err(|source| TapError::Request { action: "make", name: name.to_owned(), source })?;
        super::silence(name);
        Ok(())
    }

    /// Gives it its address and lets frames through.
    pub async fn raise_macvtap(&self, name: &str, mac: Mac) -> Result<(), TapError> {
        let change = LinkUnspec::new_with_index(self.index(name).await?);
        self.change("raise", name, change.address(mac.bytes().to_vec()).up().build()).await
    }

    /// Lets no frames through any more.
    pub async fn bring_down(&self, name: &str) -> Result<(), TapError> {
        let change = LinkUnspec::new_with_index(self.index(name).await?).down().build();
        self.change("bring down", name, change).await
    }

    /// Another interface that is up and takes what is for this address from the same lower one, which gives it to one only.
    pub async fn takes_the_same(&self, macvtap: &Macvtap, name: &str) -> Result<Option<String>, TapError> {
        let lower = self.index(macvtap.lower.as_deref().unwrap_or_default()).await?;
        let mut all = self.handle.link().get().execute();
        let failed = |source| TapError::Request { action: "list", name: "of any kind".to_owned(), source };
        while let Some(link) = all.try_next().await.map_err(failed)? {
            let has = |wanted: &LinkAttribute| link.attributes.contains(wanted);
            let is_on_it = has(&LinkAttribute::Link(lower)) && link.header.flags.contains(LinkFlags::Up);
            if is_on_it && has(&LinkAttribute::Address(macvtap.mac.bytes().to_vec())) {
                let other = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(other) if other != name => Some(other.clone()),
                    _ => None,
                });
                if other.is_some() {
                    return Ok(other);
                }
            }
        }
        Ok(None)
    }

    /// Opens queues of one. `directory` is for a device file that is there for a moment only.
    pub async fn open_macvtap(
        &self,
        name: &str,
        queues: usize,
        directory: &Path,
    ) -> Result<Vec<File>, TapError> {
        let index = self.index(name).await?;
        let opened = device(name, index).and_then(|number| {
            (0..queues).map(|_| open(number, name, index, queues > 1, directory)).collect()
        });
        opened.map_err(|source| TapError::Open { name: name.to_owned(), source })
    }
}

fn mode(attribute: &LinkAttribute) -> Option<MacVlanMode> {
    let LinkAttribute::LinkInfo(info) = attribute else { return None };
    info.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::MacVtap(data)) => data.iter().find_map(|data| match data {
            InfoMacVtap::Mode(mode) => Some(*mode),
            _ => None,
        }),
        _ => None,
    })
}

/// The number of its character device, which is a part of it in sysfs. A sysfs that shows another network namespace still lists the
/// numbers of all.
fn device(name: &str, index: u32) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/tap{index}/dev"));
    if let Ok(number) = text {
        return parse(number.trim()).ok_or_else(|| io::ErrorKind::InvalidData.into());
    }
    let place = PathBuf::from(format!("net/{name}/macvtap/tap{index}"));
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/dev/char")?.flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|link| link.ends_with(&place)) {
            found.extend(entry.file_name().to_str().and_then(parse));
        }
    }
    match found[..] {
        [number] => Ok(number),
        [] => Err(io::Error::other("sysfs does not tell the number of its device")),
        _ => Err(io::Error::other("there are several of its name, and the sysfs here is not its network's")),
    }
}

/// `MAJOR:MINOR`.
fn parse(number: &str) -> Option<u64> {
    let (major, minor) = number.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Opens a queue. The file in /dev of that number may be another network namespace's; then one is made for the moment.
fn open(number: u64, name: &str, index: u32, multi_queue: bool, directory: &Path) -> io::Result<File> {
    let path = PathBuf::from(format!("/dev/tap{index}"));
    let file = match std::fs::metadata(&path) {
        Ok(found) if found.rdev() == number => ioctl::open(&path)?,
        _ => {
            let path = directory.join(format!("{name}.macvtap"));
            mknodat(CWD, &path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number)?;
            let opened = ioctl::open(&path);
            std::fs::remove_file(&path)?;
            opened?
        }
    };
    ioctl::set_up(&file, name, multi_queue, false)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_none() {
        for mode in [1, 2, 4, 8] {
            let one = Macvtap::of("eth0", mode, "52:54:00:00:00:01").unwrap();
            assert_eq!(one.number(), Some(mode));
        }
        for (lower, mode, mac) in [
            ("eth0", 16, "52:54:00:00:00:01"),
            ("eth0", 0, "52:54:00:00:00:01"),
            ("", 4, "52:54:00:00:00:01"),
            ("eth0", 4, "53:54:00:00:00:01"),
            ("eth0", 4, ""),
        ] {
            assert_eq!(Macvtap::of(lower, mode, mac), None, "{lower} {mode} {mac}");
        }
    }

    #[test]
    fn device_numbers_are_read() {
        assert_eq!(parse("246:1"), Some(makedev(246, 1)));
        assert_eq!([parse(""), parse("246"), parse("a:1")], [None, None, None]);
    }
}
