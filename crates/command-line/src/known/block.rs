//! QEMU's block drivers that are known to work, and what each does.

/// What a block driver does, by where it ends up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockDriver {
    /// It opens a file or block device of this host through the kernel.
    Local,
    /// It reaches storage over the network, the same from every host.
    Network,
    /// It holds no data.
    Nothing,
    /// It is an image format, on top of another driver.
    Format,
    /// It passes on what another driver holds.
    Filter,
    /// None that is known to work.
    Unknown,
}

/// How much else than what it is given a driver may read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Nothing.
    Own,
    /// An image of it names other files in itself, or is parsed by code that few use; or it reaches other hosts, directories or devices.
    More,
}
use BlockDriver::{Filter, Format, Local, Network, Nothing};
use Reach::{More, Own};

/// What is not here is refused.
const DRIVERS: &[(&str, BlockDriver, Reach)] = &[
    ("file", Local, Own),
    ("host_device", Local, Own),
    ("host_cdrom", Local, Own),
    ("nbd", Network, More),
    ("rbd", Network, More),
    ("iscsi", Network, More),
    ("nfs", Network, More),
    ("http", Network, More),
    ("https", Network, More),
    ("ftp", Network, More),
    ("ftps", Network, More),
    ("gluster", Network, More),
    ("ssh", Network, More),
    ("null-co", Nothing, Own),
    ("null-aio", Nothing, Own),
    ("raw", Format, Own),
    ("qcow2", Format, Own),
    ("qcow", Format, More),
    ("qed", Format, More),
    ("vmdk", Format, More),
    ("vdi", Format, More),
    ("vpc", Format, More),
    ("vhdx", Format, More),
    ("parallels", Format, More),
    ("luks", Format, Own),
    ("bochs", Format, More),
    ("cloop", Format, More),
    ("dmg", Format, More),
    ("throttle", Filter, Own),
    ("copy-on-read", Filter, Own),
    ("blkdebug", Filter, More),
    ("preallocate", Filter, More),
    ("compress", Filter, More),
];

impl BlockDriver {
    /// What a driver of this name does.
    #[must_use]
    pub fn of(name: &str) -> BlockDriver {
        row(name).map_or(BlockDriver::Unknown, |(_, driver, _)| *driver)
    }

    /// Whether a driver of this name reads and writes what it is given, and nothing else: what a peer may name without more.
    #[must_use]
    pub fn is_confined(name: &str) -> bool {
        row(name).is_some_and(|(_, _, reach)| *reach == Own)
    }

    /// The names of those that do this.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        DRIVERS.iter().filter(move |(_, driver, _)| *driver == self).map(|(name, ..)| *name)
    }
}

fn row(name: &str) -> Option<&'static (&'static str, BlockDriver, Reach)> {
    DRIVERS.iter().find(|(known, ..)| *known == name)
}
