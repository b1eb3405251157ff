//! The guest's parameters on the kernel command line: every word that begins with `vmirror.`.

use std::net::Ipv4Addr;

use crate::disk::Plan;
use crate::page::Content;
use crate::rate::{self, pages};
use crate::userland::Changes;
use crate::workload::Pattern;

/// What the guest was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// `vmirror.ip=ADDRESS/PREFIX`: the address of the first network interface, and the bits of its network.
    pub address: Option<(Ipv4Addr, u8)>,
    /// `vmirror.gw=ADDRESS`: the default route.
    pub gateway: Option<Ipv4Addr>,
    /// `vmirror.fill=MIB`: memory to fill and check, in MiB.
    pub fill_mib: u64,
    /// `vmirror.workset=MIB`: how much of it, from its beginning, is dirtied. All of it where not given.
    pub working_set_mib: Option<u64>,
    /// `vmirror.rate=PAGES` or `vmirror.rate=MIBMiB`: how much is dirtied per second, in pages.
    pub rate: u64,
    /// `vmirror.pattern=random|sequential|counter|incompressible`: how.
    pub pattern: Pattern,
    /// `vmirror.content=still|text|noise|zero`: with what; by default what goes with the pattern.
    pub content: Option<Content>,
    /// `vmirror.read=on|off`: whether the first disk is read all the time ([`reader`](crate::reader)).
    pub read: bool,
    /// `vmirror.userland=off|on|writable`: whether the first disk is a userland to boot ([`userland`](crate::userland)), and where
    /// what it writes then goes: with `on` nowhere but into memory.
    pub userland: Option<Changes>,
    /// `vmirror.disk=SERIAL:ROLE…`, once for each disk: what is done with it, as told at [`plan`](crate::disk::plan).
    pub disks: Vec<Plan>,
    /// `vmirror.check=on|off`: whether everything is checked all the time.
    pub check: bool,
    /// `vmirror.check_rate=PAGES` or `…MiB`: how much is checked per second at most, in pages; 0 is as fast as it goes.
    pub check_rate: u64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            address: None,
            gateway: None,
            fill_mib: 64,
            working_set_mib: None,
            rate: 0,
            pattern: Pattern::Random,
            content: None,
            read: false,
            userland: None,
            disks: Vec::new(),
            check: true,
            // All of 256 MiB in two seconds, and still most of an emulated CPU left for everything else.
            check_rate: pages(128),
        }
    }
}

/// A parameter that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel parameter {word:?}: expected {expected}")]
pub struct ParameterError {
    /// The parameter as given.
    pub word: String,
    /// What it should have been.
    pub expected: &'static str,
}

impl Parameters {
    /// Reads the kernel's command line. Words of others are passed over.
    ///
    /// # Errors
    /// For the first `vmirror.` word that is unknown, has a bad value or contradicts another: a guest that tests something other than what was
    /// asked for would be worse than none.
    pub fn parse(command_line: &str) -> Result<Self, ParameterError> {
        let mut parameters = Self::default();
        for word in command_line.split_ascii_whitespace() {
            if let Some(parameter) = word.strip_prefix("vmirror.") {
                parameters
                    .set(parameter)
                    .map_err(|expected| ParameterError { word: word.to_owned(), expected })?;
            }
            if parameters.read && parameters.userland.is_some() {
                let expected = "not both a userland and numbered blocks on the first disk";
                return Err(ParameterError { word: word.to_owned(), expected });
            }
        }
        Ok(parameters)
    }

    fn set(&mut self, parameter: &str) -> Result<(), &'static str> {
        let (name, value) = parameter.split_once('=').ok_or("NAME=VALUE")?;
        match name {
            "ip" => self.address = Some(address(value).ok_or("ADDRESS/PREFIX")?),
            // Empty stands for none, so that a script can always pass it.
            "gw" if value.is_empty() => self.gateway = None,
            "gw" => self.gateway = Some(value.parse().map_err(|_| "an IPv4 address")?),
            "fill" => self.fill_mib = value.parse().map_err(|_| "a number of MiB")?,
            "workset" => self.working_set_mib = Some(value.parse().map_err(|_| "a number of MiB")?),
            "rate" => self.rate = rate::parse(value)?,
            "pattern" => {
                self.pattern =
                    Pattern::named(value).ok_or("random, sequential, counter or incompressible")?;
            }
            "content" => self.content = Some(Content::named(value).ok_or("still, text, noise or zero")?),
            "read" => self.read = switch(value)?,
            "userland" => {
                self.userland = match value {
                    "off" => None,
                    _ => Some(Changes::named(value).ok_or("off, on or writable")?),
                }
            }
            "disk" => {
                let plan = Plan::parse(value)?;
                if self.disks.iter().any(|other| other.serial == plan.serial) {
                    return Err("one word for each disk");
                }
                self.disks.push(plan);
            }
            "check" => self.check = switch(value)?,
            "check_rate" => self.check_rate = rate::parse(value)?,
            _ => {
                return Err(
                    "ip, gw, fill, workset, rate, pattern, content, read, userland, disk, check or check_rate",
                );
            }
        }
        Ok(())
    }

    /// The content of the pages: as chosen, or what goes with the pattern.
    pub fn page_content(&self) -> Content {
        self.content.unwrap_or_else(|| self.pattern.content())
    }

    /// Bytes to fill.
    pub fn fill_bytes(&self) -> usize {
        usize::try_from(self.fill_mib.saturating_mul(1 << 20)).unwrap_or(usize::MAX)
    }

    /// Pages of the working set: no more than are filled.
    pub fn working_set_pages(&self) -> u64 {
        pages(self.working_set_mib.unwrap_or(self.fill_mib).min(self.fill_mib))
    }
}

fn switch(value: &str) -> Result<bool, &'static str> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off"),
    }
}

fn address(value: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = value.split_once('/')?;
    Some((address.parse().ok()?, prefix.parse().ok().filter(|prefix| *prefix <= 32)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_parameter_is_read_and_those_of_others_are_not() {
        let line = "console=ttyS0 quiet vmirror.ip=10.88.0.10/24 vmirror.gw=10.88.0.1 vmirror.fill=200 vmirror.workset=20 \
                    vmirror.rate=4MiB vmirror.pattern=counter vmirror.check=off vmirror.content=noise vmirror.check_rate=0 \
                    vmirror.read=on vmirror.disk=d1:blocks,region=8:journal vmirror.disk=d2:ext4\n";
        let expected = Parameters {
            address: Some((Ipv4Addr::new(10, 88, 0, 10), 24)),
            gateway: Some(Ipv4Addr::new(10, 88, 0, 1)),
            fill_mib: 200,
            working_set_mib: Some(20),
            rate: 1024,
            pattern: Pattern::Counter,
            content: Some(Content::Noise),
            read: true,
            userland: None,
            disks: vec![Plan::parse("d1:blocks,region=8:journal").unwrap(), Plan::parse("d2:ext4").unwrap()],
            check: false,
            check_rate: 0,
        };
        let parameters = Parameters::parse(line);
        assert_eq!(parameters.as_ref(), Ok(&expected));
        assert_eq!(expected.working_set_pages(), 5120);
        assert_eq!(expected.fill_bytes(), 200 << 20);
        assert_eq!(Parameters::parse("panic=-1 vmirror.gw="), Ok(Parameters::default()));
    }

    #[test]
    fn a_userland_is_written_to_only_where_it_says_so() {
        let userland =
            |value| Parameters::parse(&format!("vmirror.userland={value}")).map(|found| found.userland);
        assert_eq!(userland("off"), Ok(None));
        assert_eq!(userland("on"), Ok(Some(Changes::InMemory)));
        assert_eq!(userland("writable"), Ok(Some(Changes::OnDisk)));
        assert!(userland("read-only").unwrap_err().to_string().contains("off, on or writable"));
    }

    #[test]
    fn content_goes_with_the_pattern_unless_chosen() {
        let parameters = |line| Parameters::parse(line).unwrap().page_content();
        assert_eq!(parameters("vmirror.pattern=incompressible"), Content::Noise);
        assert_eq!(parameters("vmirror.pattern=counter"), Content::Still);
        assert_eq!(parameters("vmirror.pattern=counter vmirror.content=zero"), Content::Zero);
    }

    #[test]
    fn the_working_set_is_no_larger_than_what_is_filled() {
        assert_eq!(Parameters::parse("vmirror.fill=2 vmirror.workset=9").unwrap().working_set_pages(), 512);
    }

    #[test]
    fn bad_words_are_named() {
        for word in [
            "vmirror.ip=10.0.0.1",
            "vmirror.ip=10.0.0.1/33",
            "vmirror.rate=fast",
            "vmirror.rate=99999999999MiB",
            "vmirror.fill=-1",
            "vmirror.disk=d1",
            "vmirror.disk=d1:blocks,io=mapped",
        ] {
            let error = Parameters::parse(word).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(Parameters::parse("vmirror.patern=random").is_err());
        assert!(Parameters::parse("vmirror.disk=a:ext4 vmirror.disk=a:blocks").is_err());
        assert!(Parameters::parse("vmirror.userland=on vmirror.read=off").is_ok());
        assert!(Parameters::parse("vmirror.userland=on vmirror.read=on").is_err());
        assert!(Parameters::parse("vmirror.read=on vmirror.userland=writable").is_err());
    }

    proptest! {
        #[test]
        fn no_command_line_makes_it_panic(line in "(vmirror\\.[a-z]{2,7}=[0-9a-zA-Z./]{0,12} ?){0,4}") {
            let _ = Parameters::parse(&line);
        }
    }
}
