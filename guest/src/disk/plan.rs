//! What is to be done with a test disk: `vmirror.disk=SERIAL:ROLE[,OPTION=VALUE…][:ROLE…]` on the kernel command line.
//!
//! | role | options, and what they are where not given |
//! | --- | --- |
//! | `blocks` | `pattern=random\|sequential\|counter\|incompressible` (random), `io=direct\|buffered` (direct), `rate` in blocks per second or as `4MiB` (0: as fast as it goes), `depth` of writes under way at once (1), `check` in blocks read back per second (100), `region` in MiB |
//! | `journal` | `rate` in records per second (0), `region` in MiB |
//! | `ext4` | `rate` in operations per second (0); it has the disk to itself |
//!
//! Regions follow each other from the beginning of the disk; that of the last role is the rest where not given.

use std::fmt;

use crate::rate;
use crate::workload::Pattern;

/// The longest serial number of a virtio disk.
const SERIAL: usize = 20;
/// Threads cost memory, and no disk takes more at once from a guest that small.
const DEPTH: u32 = 64;
/// Blocks read back per second where nothing else is said: leaves an emulated CPU to the writers.
const CHECK_RATE: u64 = 100;

/// What is to be done with one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its serial number.
    pub serial: String,
    /// At least one; an ext4 is alone.
    pub roles: Vec<Role>,
}

/// A region of a disk, and what is done there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// What is done.
    pub work: Work,
    /// The region's size in MiB; the rest of the disk where not given.
    pub region_mib: Option<u64>,
}

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Blocks that say what they are are written, and read back: see [`blocks`](super::blocks).
    Blocks {
        /// Which of them, and with what.
        pattern: Pattern,
        /// How.
        io: Io,
        /// How many per second; 0 is as fast as it goes.
        rate: u64,
        /// How many at once.
        depth: u32,
        /// How many are read back per second; 0 is as fast as it goes.
        check_rate: u64,
    },
    /// Records are appended and synced one by one: see [`journal`](super::journal).
    Journal {
        /// How many per second; 0 is as fast as it goes.
        rate: u64,
    },
    /// Files come, move and go: see [`files`](super::files).
    Ext4 {
        /// How many operations per second; 0 is as fast as it goes.
        rate: u64,
    },
}

/// How blocks are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Around the page cache. A block is acknowledged when the write returns.
    Direct,
    /// Through the page cache. A block is acknowledged when it was synced.
    Buffered,
}

impl Work {
    /// Random direct writes, as fast as they go.
    pub const BLOCKS: Self =
        Self::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 0, depth: 1, check_rate: CHECK_RATE };

    /// This work, in that many MiB.
    #[must_use]
    pub fn within(self, mib: u64) -> Role {
        Role { work: self, region_mib: Some(mib) }
    }

    /// This work, in all that is left of the disk.
    #[must_use]
    pub fn in_the_rest(self) -> Role {
        Role { work: self, region_mib: None }
    }
}

impl Plan {
    /// Reads the value of `vmirror.disk`.
    ///
    /// # Errors
    /// What was expected instead.
    pub fn parse(value: &str) -> Result<Self, &'static str> {
        let mut parts = value.split(':');
        let serial = parts.next().unwrap_or_default().to_owned();
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if serial.is_empty() || serial.len() > SERIAL || !serial.chars().all(fits) {
            return Err("SERIAL:ROLE, the serial number being 1 to 20 letters, digits, - or _");
        }
        let roles: Vec<Role> = parts.map(Role::parse).collect::<Result<_, _>>()?;
        let Some((_, but_last)) = roles.split_last() else {
            return Err("SERIAL:ROLE[,OPTION=VALUE…][:ROLE…]");
        };
        if roles.len() > 1 && roles.iter().any(|role| matches!(role.work, Work::Ext4 { .. })) {
            return Err("an ext4 that has the disk to itself");
        }
        if but_last.iter().any(|role| role.region_mib.is_none()) {
            return Err("a region for every role but the last");
        }
        Ok(Self { serial, roles })
    }
}

impl Role {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let mut words = text.split(',');
        let mut role = match words.next() {
            Some("blocks") => Work::BLOCKS.in_the_rest(),
            Some("journal") => Work::Journal { rate: 0 }.in_the_rest(),
            Some("ext4") => Work::Ext4 { rate: 0 }.in_the_rest(),
            _ => return Err("the role blocks, journal or ext4"),
        };
        for word in words {
            let (name, value) = word.split_once('=').ok_or("OPTION=VALUE")?;
            role.set(name, value)?;
        }
        Ok(role)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        match (name, &mut self.work) {
            ("region", Work::Blocks { .. } | Work::Journal { .. }) => {
                let mib = value.parse().ok().filter(|mib| (1..1 << 32).contains(mib));
                self.region_mib = Some(mib.ok_or("a region of at least 1 MiB")?);
            }
            ("rate", Work::Blocks { rate, .. } | Work::Journal { rate } | Work::Ext4 { rate }) => {
                *rate = rate::parse(value)?;
            }
            ("pattern", Work::Blocks { pattern, .. }) => {
                *pattern = Pattern::named(value).ok_or("random, sequential, counter or incompressible")?;
            }
            ("io", Work::Blocks { io, .. }) => *io = Io::named(value).ok_or("direct or buffered")?,
            ("depth", Work::Blocks { depth, .. }) => {
                let given = value.parse().ok().filter(|depth| (1..=DEPTH).contains(depth));
                *depth = given.ok_or("a depth of 1 to 64")?;
            }
            ("check", Work::Blocks { check_rate, .. }) => *check_rate = rate::parse(value)?,
            (_, Work::Blocks { .. }) => return Err("pattern, io, rate, depth, check or region"),
            (_, Work::Journal { .. }) => return Err("rate or region"),
            (_, Work::Ext4 { .. }) => return Err("rate"),
        }
        Ok(())
    }
}

impl Io {
    fn named(name: &str) -> Option<Self> {
        [Self::Direct, Self::Buffered].into_iter().find(|io| io.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.serial)?;
        self.roles.iter().try_for_each(|role| write!(f, ":{role}"))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.work {
            Work::Blocks { pattern, io, rate, depth, check_rate } => write!(
                f,
                "blocks,pattern={},io={},rate={rate},depth={depth},check={check_rate}",
                pattern.name(),
                io.name()
            )?,
            Work::Journal { rate } => write!(f, "journal,rate={rate}")?,
            Work::Ext4 { rate } => write!(f, "ext4,rate={rate}")?,
        }
        self.region_mib.map_or(Ok(()), |mib| write!(f, ",region={mib}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn roles_and_their_options_are_read() {
        let plan = Plan::parse(
            "d_1:blocks,pattern=sequential,io=buffered,rate=1MiB,depth=4,check=0,region=32:journal",
        );
        let work = Work::Blocks {
            pattern: Pattern::Sequential,
            io: Io::Buffered,
            rate: 256,
            depth: 4,
            check_rate: 0,
        };
        let roles = vec![work.within(32), Work::Journal { rate: 0 }.in_the_rest()];
        assert_eq!(plan, Ok(Plan { serial: "d_1".into(), roles }));
        let plain = Plan::parse("a:blocks").unwrap();
        assert_eq!(plain.roles, [Work::BLOCKS.in_the_rest()]);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for (value, expected) in [
            ("", "SERIAL"),
            ("a", "SERIAL:ROLE"),
            ("a/b:blocks", "letters"),
            ("a23456789012345678901:blocks", "1 to 20"),
            ("a:block", "the role"),
            ("a:blocks,region", "OPTION=VALUE"),
            ("a:blocks,region=0", "1 MiB"),
            ("a:blocks,region=99999999999", "1 MiB"),
            ("a:blocks,io=mapped", "direct or buffered"),
            ("a:blocks,depth=0", "depth"),
            ("a:blocks,rate=-1", "per second"),
            ("a:journal,io=direct", "rate or region"),
            ("a:ext4,region=3", "rate"),
            ("a:ext4:journal", "to itself"),
            ("a:blocks:journal", "every role but the last"),
        ] {
            let found = Plan::parse(value).unwrap_err();
            assert!(found.contains(expected), "{value}: {found}");
        }
    }

    fn work() -> impl Strategy<Value = Work> {
        let blocks = (0..4usize, any::<bool>(), any::<u64>(), 1..=DEPTH, any::<u64>());
        prop_oneof![
            any::<u64>().prop_map(|rate| Work::Journal { rate }),
            blocks.prop_map(|(pattern, direct, rate, depth, check_rate)| Work::Blocks {
                pattern: Pattern::ALL[pattern],
                io: if direct { Io::Direct } else { Io::Buffered },
                rate,
                depth,
                check_rate,
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_plan_is_read_as_it_is_written(
            serial in "[a-zA-Z0-9_-]{1,20}",
            works in prop::collection::vec((work(), 1..1u64 << 32), 1..4),
        ) {
            let roles = works.into_iter().map(|(work, mib)| work.within(mib)).collect();
            let plan = Plan { serial, roles };
            prop_assert_eq!(Plan::parse(&plan.to_string()), Ok(plan));
        }

        #[test]
        fn no_plan_makes_it_panic(text in "[a-z]{0,3}(:(blocks|journal|ext4)(,[a-z]{2,7}=[0-9a-zA-Z]{0,12}){0,3}){0,3}") {
            let _ = Plan::parse(&text);
        }
    }
}
