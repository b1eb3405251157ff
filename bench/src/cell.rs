//! What is compared: each cell is one guest, doing one thing, moved over one link by several contenders.
//!
//! The cells are chosen from the product of sizes, contents, dirtying and links so that each of these varies while the
//! others stay, and so that every goal has its cell. All of the product, five times, would take weeks.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use testbed::guest_spec::{Content, Pattern};

/// Bytes of a page, which is what a guest dirties at once.
pub(crate) const PAGE: u64 = 4096;
/// What the guest's own system needs beside what it fills, in MiB.
const SYSTEM_MIB: u64 = 192;
/// How much is filled and checked of a guest that boots a userland, in MiB: enough to notice harm, little beside the rest.
const USERLAND_FILL_MIB: u64 = 32;
/// A disk is as large as that, in MiB; half of it holds something.
const DISK_MIB: u64 = 4096;
const WRITTEN_DISK_MIB: u64 = 2048;
/// How much of a guest is dirtied where it is dirtied at random, in MiB.
const WORKING_SET_MIB: u64 = 256;

/// One cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Its name, to choose it by.
    pub name: &'static str,
    /// Memory of the guest, in MiB.
    pub memory_mib: u64,
    /// What is in it.
    pub content: Filling,
    /// What the guest does meanwhile.
    pub dirtying: Dirtying,
    /// How.
    pub order: Order,
    /// Its disk, which moves with it; none where only memory does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Whether frames that come for the guest while it moves are carried after it, as they are wherever they can be.
    #[serde(skip_serializing_if = "is_true")]
    pub frames: bool,
    /// What lies between the hosts.
    pub link: Link,
    /// `--on-diverge` of vmirror.
    pub on_diverge: &'static str,
    /// `--downtime` and `--max-downtime` of vmirror, in milliseconds: its defaults, unless the cell has a goal that asks for less.
    pub downtime_ms: (u64, u64),
    /// Whether it belongs to the short form.
    #[serde(skip)]
    pub quick: bool,
}

/// A cell that was measured earlier is read back only if there still is the same: figures of what is now another cell, under
/// its name, would be told as this one's.
impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let read = serde_json::Value::deserialize(from)?;
        let same = |cell: &Self| serde_json::to_value(cell).is_ok_and(|value| value == read);
        Self::all().into_iter().find(same).ok_or_else(|| D::Error::custom("there is no such cell any more"))
    }
}

/// What is in a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filling {
    /// Nothing that a compression makes smaller.
    Incompressible,
    /// Runs of words: compressible to about a quarter.
    Text,
    /// An eighth of it text, the rest never touched.
    MostlyZero,
    /// A Debian server that has booted, and its files in the page cache.
    Userland,
}

/// How much a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dirtying {
    /// Next to nothing.
    Idle,
    /// Per cent of what the link carries, in whole pages.
    OfLink(u64),
    /// MiB per second, in whole pages.
    Mib(u64),
}

/// Which pages a guest writes, and what of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Pages at random, all of each.
    Random,
    /// Pages at random, a counter in each.
    Counters,
    /// One after the other, all of each.
    Streaming,
}

/// A guest's disk: a raw image, half of which holds something. The rest is sparse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Its size, in MiB.
    pub mib: u64,
    /// What is in its half.
    pub content: DiskContent,
    /// Whether the guest writes to it, as fast as it can.
    pub written: bool,
}

/// What is in a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskContent {
    /// Half of it incompressible, half of it runs of words, compressible to about a quarter.
    Mix,
    /// The file system of a Debian server, again and again.
    Debian,
}

/// What lies between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// As fast as this machine copies from one network namespace to another.
    Unshaped,
    /// Shaped to that many Mbit/s, in each direction.
    Mbit(u64),
}

impl Cell {
    /// A guest of 1 GiB, full of what cannot be compressed, that does nothing, on an unshaped link.
    const fn idle(name: &'static str) -> Self {
        Self {
            name,
            memory_mib: 1024,
            content: Filling::Incompressible,
            dirtying: Dirtying::Idle,
            order: Order::Random,
            disk: None,
            frames: true,
            link: Link::Unshaped,
            on_diverge: "throttle",
            downtime_ms: (50, 1000),
            quick: false,
        }
    }

    /// The same, on a link of 1 Gbit/s, dirtying that many per cent of it.
    const fn dirtying(name: &'static str, percent: u64, order: Order) -> Self {
        Self { dirtying: Dirtying::OfLink(percent), order, link: Link::Mbit(1000), ..Self::idle(name) }
    }

    /// A guest of 512 MiB, mostly zero, so that its disk is what moving it takes.
    const fn with_disk(name: &'static str, mib: u64, content: DiskContent) -> Self {
        let disk = Some(Disk { mib, content, written: false });
        Self { memory_mib: 512, content: Filling::MostlyZero, disk, ..Self::idle(name) }
    }

    const fn quick(self) -> Self {
        Self { quick: true, ..self }
    }

    /// All of them.
    #[must_use]
    pub fn all() -> Vec<Self> {
        use DiskContent::{Debian, Mix};
        use Order::{Counters, Random, Streaming};
        vec![
            Self::idle("idle").quick(),
            Self { memory_mib: 512, ..Self::idle("idle-512m") },
            Self { memory_mib: 4096, ..Self::idle("idle-4g") },
            Self { content: Filling::Text, ..Self::idle("idle-text") },
            Self { content: Filling::MostlyZero, ..Self::idle("idle-zero") }.quick(),
            // What carrying frames adds to a guest's downtime is told beside the same guest without.
            Self { content: Filling::MostlyZero, frames: false, ..Self::idle("idle-zero-no-frames") },
            // Bytes count where the link limits: on one that does not, nothing is compressed that would take longer so.
            Self { content: Filling::Userland, link: Link::Mbit(1000), ..Self::idle("idle-debian") }.quick(),
            Self { content: Filling::Userland, ..Self::idle("idle-debian-unshaped") },
            Self { link: Link::Mbit(1000), ..Self::idle("idle-1gbit") },
            Self { link: Link::Mbit(10_000), ..Self::idle("idle-10gbit") },
            Self { content: Filling::Text, ..Self::dirtying("random-25", 25, Random) },
            Self { downtime_ms: (25, 1000), ..Self::dirtying("random-75", 75, Random) }.quick(),
            Self { content: Filling::Text, ..Self::dirtying("streaming-75", 75, Streaming) },
            Self { content: Filling::Text, ..Self::dirtying("counters-75", 75, Counters) },
            Self::dirtying("counters-150", 150, Counters).quick(),
            Self::dirtying("counters-400", 400, Counters),
            Self { downtime_ms: (50, 100), ..Self::dirtying("random-150-throttle", 150, Random) },
            Self { on_diverge: "post-copy", ..Self::dirtying("random-150", 150, Random) }.quick(),
            // Of a slower link: an emulated guest cannot write four times what 1 Gbit/s carries.
            Self {
                on_diverge: "post-copy",
                link: Link::Mbit(200),
                ..Self::dirtying("random-400", 400, Random)
            },
            Self {
                content: Filling::Text,
                dirtying: Dirtying::Mib(100),
                link: Link::Mbit(10_000),
                ..Self::idle("steady-100m")
            }
            .quick(),
            Self { memory_mib: 512, ..Self::dirtying("random-75-512m", 75, Random) },
            // Mostly zero, so that moving so much does not take long.
            Self {
                memory_mib: 4096,
                content: Filling::MostlyZero,
                link: Link::Mbit(10_000),
                ..Self::dirtying("counters-25-4g", 25, Counters)
            },
            Self::with_disk("disk-4g", DISK_MIB, Mix),
            Self { link: Link::Mbit(1000), ..Self::with_disk("disk-4g-1gbit", DISK_MIB, Mix) },
            Self { link: Link::Mbit(1000), ..Self::with_disk("disk-debian", DISK_MIB, Debian) },
            // What its disk adds to a guest's downtime is told beside the same guest without.
            Self { disk: None, ..Self::with_disk("disk-none", DISK_MIB, Mix) },
            Self {
                disk: Some(Disk { mib: WRITTEN_DISK_MIB, content: Mix, written: true }),
                ..Self::with_disk("disk-write", WRITTEN_DISK_MIB, Mix)
            }
            .quick(),
        ]
    }

    /// How much the guest fills, in MiB.
    #[must_use]
    pub fn fill_mib(&self) -> u64 {
        match self.content {
            Filling::MostlyZero => self.memory_mib / 8,
            Filling::Userland => USERLAND_FILL_MIB,
            Filling::Incompressible | Filling::Text => self.memory_mib - SYSTEM_MIB,
        }
    }

    /// How much of that it dirties, in MiB.
    #[must_use]
    pub fn working_set_mib(&self) -> u64 {
        self.fill_mib().min(WORKING_SET_MIB)
    }

    /// How much it is to dirty per second, in pages.
    #[must_use]
    pub fn rate(&self) -> u64 {
        match (self.dirtying, self.link) {
            (Dirtying::Idle, _) | (Dirtying::OfLink(_), Link::Unshaped) => 0,
            (Dirtying::OfLink(percent), Link::Mbit(mbit)) => mbit * 1_000_000 / 8 * percent / 100 / PAGE,
            (Dirtying::Mib(mib), _) => (mib << 20) / PAGE,
        }
    }

    /// Whether its guest does something whose speed is measured.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.dirtying != Dirtying::Idle || self.disk.is_some_and(|disk| disk.written)
    }

    /// The pattern of its writes.
    #[must_use]
    pub fn pattern(&self) -> Pattern {
        match self.order {
            Order::Random => Pattern::Random,
            Order::Counters => Pattern::Counter,
            Order::Streaming => Pattern::Sequential,
        }
    }

    /// What its pages hold.
    #[must_use]
    pub fn page_content(&self) -> Content {
        match (self.order, self.content) {
            // The body of a page is drawn once, and stays.
            (Order::Counters, _) => Content::Still,
            (_, Filling::Incompressible) => Content::Noise,
            (_, Filling::Text | Filling::MostlyZero | Filling::Userland) => Content::Text,
        }
    }

    /// In words.
    #[must_use]
    pub fn describe(&self) -> String {
        let memory = if self.memory_mib < 1024 {
            format!("{} MiB", self.memory_mib)
        } else {
            format!("{} GiB", self.memory_mib / 1024)
        };
        let content = match self.content {
            Filling::Incompressible => "incompressible",
            Filling::Text => "compressible to a quarter",
            Filling::MostlyZero => "mostly zero",
            Filling::Userland => "a booted Debian userland with page cache",
        };
        let order = match self.order {
            Order::Random => "random pages",
            Order::Counters => "small counters",
            Order::Streaming => "streaming",
        };
        let dirtying = match self.dirtying {
            Dirtying::Idle => "idle".to_owned(),
            Dirtying::OfLink(percent) => format!("dirtying {percent} % of the link, {order}"),
            Dirtying::Mib(mib) => format!("dirtying {mib} MiB/s, {order}"),
        };
        let link = match self.link {
            Link::Unshaped => "unshaped link".to_owned(),
            Link::Mbit(mbit) if mbit >= 1000 => format!("{} Gbit/s", mbit / 1000),
            Link::Mbit(mbit) => format!("{mbit} Mbit/s"),
        };
        let disk = self.disk.map_or_else(String::new, |disk| format!("{}, ", disk.describe()));
        let frames = if self.frames { "" } else { ", frames that come meanwhile are lost" };
        format!("{memory}, {content}, {disk}{dirtying}, {link}{frames}")
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_true(value: &bool) -> bool {
    *value
}

impl Disk {
    fn describe(self) -> String {
        let content = match self.content {
            DiskContent::Mix => "half of it incompressible, half compressible to a quarter",
            DiskContent::Debian => "of a Debian file system",
        };
        let work = if self.written { ", written as fast as it goes" } else { "" };
        let (size, held) = (self.mib / 1024, self.mib / 2048);
        format!("a disk of {size} GiB with {held} GiB {content}{work}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn cells_differ_and_the_short_form_has_some_of_them() {
        let cells = Cell::all();
        let names: HashSet<&str> = cells.iter().map(|cell| cell.name).collect();
        assert_eq!(names.len(), cells.len());
        let words: HashSet<String> =
            cells.iter().map(|cell| format!("{} {}", cell.describe(), cell.on_diverge)).collect();
        assert_eq!(words.len(), cells.len());
        assert!(cells.iter().filter(|cell| cell.quick).count() >= 5);
    }

    #[test]
    fn a_cell_is_read_back_only_as_it_is_now() {
        for cell in Cell::all() {
            let mut value = serde_json::to_value(&cell).unwrap();
            assert_eq!(serde_json::from_value::<Cell>(value.clone()).unwrap(), cell);
            value["memory_mib"] = 768.into();
            assert!(serde_json::from_value::<Cell>(value).is_err());
        }
    }

    #[test]
    fn what_a_guest_dirties_is_a_part_of_its_link() {
        let cells = Cell::all();
        let rate = |name: &str| cells.iter().find(|cell| cell.name == name).unwrap().rate();
        // 125 MB/s of 4096 bytes are 30,518 pages.
        assert_eq!((rate("idle"), rate("random-75"), rate("counters-400")), (0, 22_888, 122_070));
        assert_eq!((rate("random-400"), rate("steady-100m")), (24_414, 25_600));
    }
}
