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
/// How much of a guest is dirtied where it is dirtied at random, in MiB.
const WORKING_SET_MIB: u64 = 256;

/// One cell, as `cells.toml` has it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Its name, to choose it by.
    pub name: String,
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
    /// Whether vmirror's guest has memory that is QEMU's own, as its user has started it. One that has moved has not any more, so each time
    /// another one is moved.
    #[serde(skip_serializing_if = "is_false")]
    pub private_ram: bool,
    /// What lies between the hosts.
    pub link: Link,
    /// `--on-diverge` of vmirror.
    pub on_diverge: String,
    /// `--downtime` and `--max-downtime` of vmirror, in milliseconds.
    pub downtime_ms: (u64, u64),
    /// Whether it belongs to the short form.
    #[serde(default, skip_serializing)]
    pub quick: bool,
}

/// Reads a cell that was measured earlier, only if there still is the same: figures of what is now another cell, under its
/// name, would be told as this one's.
pub fn as_it_is<'de, D: Deserializer<'de>>(from: D) -> Result<Cell, D::Error> {
    let read = serde_json::Value::deserialize(from)?;
    let same = |cell: &Cell| serde_json::to_value(cell).is_ok_and(|value| value == read);
    Cell::all().into_iter().find(same).ok_or_else(|| D::Error::custom("there is no such cell any more"))
}

/// What is in a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Disk {
    /// Its size, in MiB.
    pub mib: u64,
    /// What is in its half.
    pub content: DiskContent,
    /// Whether the guest writes to it, as fast as it can.
    #[serde(default)]
    pub written: bool,
}

/// What is in a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskContent {
    /// Half of it incompressible, half of it runs of words, compressible to about a quarter.
    Mix,
    /// The file system of a Debian server, again and again.
    Debian,
}

/// What lies between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// As fast as this machine copies from one network namespace to another.
    Unshaped,
    /// Shaped to that many Mbit/s, in each direction.
    Mbit(u64),
}

impl Cell {
    /// All of them.
    pub fn all() -> Vec<Self> {
        #[derive(Deserialize)]
        struct Cells {
            usual: toml::Table,
            cells: Vec<toml::Table>,
        }
        let read = || -> Result<Vec<Self>, toml::de::Error> {
            let Cells { usual, cells } = toml::from_str(include_str!("cells.toml"))?;
            let whole = |own| usual.clone().into_iter().chain(own).collect::<toml::Table>().try_into();
            cells.into_iter().map(whole).collect()
        };
        read().expect("the file is a part of this program, and read by its tests")
    }

    /// The one of that name.
    #[cfg(test)]
    pub fn named(name: &str) -> Self {
        Self::all().into_iter().find(|cell| cell.name == name).unwrap()
    }

    /// Memory of the guest, in GiB.
    pub fn gib(&self) -> f64 {
        self.memory_mib as f64 / 1024.0
    }

    /// How much the guest fills, in MiB.
    pub fn fill_mib(&self) -> u64 {
        match self.content {
            Filling::MostlyZero => self.memory_mib / 8,
            Filling::Userland => USERLAND_FILL_MIB,
            Filling::Incompressible | Filling::Text => self.memory_mib - SYSTEM_MIB,
        }
    }

    /// How much of that it dirties, in MiB.
    pub fn working_set_mib(&self) -> u64 {
        self.fill_mib().min(WORKING_SET_MIB)
    }

    /// How much it is to dirty per second, in pages.
    pub fn rate(&self) -> u64 {
        match (self.dirtying, self.link) {
            (Dirtying::Idle, _) | (Dirtying::OfLink(_), Link::Unshaped) => 0,
            (Dirtying::OfLink(percent), Link::Mbit(mbit)) => mbit * 1_000_000 / 8 * percent / 100 / PAGE,
            (Dirtying::Mib(mib), _) => (mib << 20) / PAGE,
        }
    }

    /// Whether its guest does something whose speed is measured.
    pub fn is_busy(&self) -> bool {
        self.dirtying != Dirtying::Idle || self.disk.is_some_and(|disk| disk.written)
    }

    /// The pattern of its writes.
    pub fn pattern(&self) -> Pattern {
        match self.order {
            Order::Random => Pattern::Random,
            Order::Counters => Pattern::Counter,
            Order::Streaming => Pattern::Sequential,
        }
    }

    /// What its pages hold.
    pub fn page_content(&self) -> Content {
        match (self.order, self.content) {
            // The body of a page is drawn once, and stays.
            (Order::Counters, _) => Content::Still,
            (_, Filling::Incompressible) => Content::Noise,
            (_, Filling::Text | Filling::MostlyZero | Filling::Userland) => Content::Text,
        }
    }

    /// In words.
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
        let private = if self.private_ram { ", private memory" } else { "" };
        format!("{memory}{private}, {content}, {disk}{dirtying}, {link}{frames}")
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_true(value: &bool) -> bool {
    *value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !*value
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
        let names: HashSet<&String> = cells.iter().map(|cell| &cell.name).collect();
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
            assert_eq!(as_it_is(value.clone()).unwrap(), cell);
            value["memory_mib"] = 768.into();
            assert!(as_it_is(value).is_err());
        }
    }

    #[test]
    fn what_a_guest_dirties_is_a_part_of_its_link() {
        let rate = |name| Cell::named(name).rate();
        // 125 MB/s of 4096 bytes are 30,518 pages.
        assert_eq!((rate("idle"), rate("random-75"), rate("counters-400")), (0, 22_888, 122_070));
        assert_eq!((rate("random-400"), rate("steady-100m")), (24_414, 25_600));
    }
}
