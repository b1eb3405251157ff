//! Guest RAM: its size and what backs it.

use std::path::{Path, PathBuf};

use crate::options::is_yes;
use crate::spec::Spec;

/// QEMU's default memory size where `-m` is missing (`default_ram_size` of the PC machines).
const DEFAULT_RAM: u64 = 128 << 20;

/// The largest size that is taken for one, 4 PiB: no processor addresses more (52 bits on x86-64 and on Arm). What is
/// made of such sizes, sums among them, stays far from any overflow.
const LARGEST: u64 = 1 << 52;

/// A text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size such as 512M or 4G")]
pub struct SizeError {
    /// The text.
    pub text: String,
}

/// What a RAM backend is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RamKind {
    /// No backend is named: QEMU makes its own, private, from `-m`.
    Implicit,
    /// `memory-backend-ram`: anonymous memory.
    Ram,
    /// `memory-backend-memfd`: a file without a name.
    Memfd,
    /// `memory-backend-file`
    File,
    /// Another kind, by its name.
    Other(String),
}

/// A piece of guest RAM on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBackend {
    /// The object's id; for implicit RAM, the id that QEMU gives it.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: RamKind,
    /// Whether other processes can share it.
    pub share: bool,
    /// The file or directory, where there is one.
    pub mem_path: Option<PathBuf>,
    /// Bytes into the file at which the RAM begins (`offset=`, QEMU 8.2).
    pub offset: u64,
    /// Whether a memfd is to have huge pages (`hugetlb=on`).
    pub hugetlb: bool,
}

impl RamBackend {
    /// The file that it is, shared and with a name: only such can others map, and only such are a machine's own.
    #[must_use]
    pub fn named_file(&self) -> Option<&Path> {
        let path = self.mem_path.as_deref().filter(|path| !path.is_dir())?;
        (self.kind == RamKind::File && self.share).then_some(path)
    }
}

impl Spec {
    /// RAM at start in bytes: `-m`, or that of the machine's backend, or QEMU's default of 128 MiB.
    ///
    /// # Errors
    /// When a size cannot be read. [`Spec::parse`] has checked those it saw.
    pub fn memory(&self) -> Result<u64, SizeError> {
        if let Some(text) = self.memory_text() {
            return memory_size(&text);
        }
        if let Some(id) = self.machine_property("memory-backend")
            && let Some(backend) = self.explicit_backends().find(|backend| backend.id == id)
        {
            return Ok(backend.size);
        }
        Ok(DEFAULT_RAM)
    }

    fn memory_text(&self) -> Option<String> {
        self.arguments.iter().rev().find_map(|argument| match argument.name() {
            "m" => argument.properties().get("size"),
            "machine" => argument.properties().get("memory.size"),
            _ => None,
        })
    }

    /// What backs the guest's RAM, in the order of the command line. Without any backend for the machine's main
    /// memory, the implicit one comes first.
    #[must_use]
    pub fn ram_backends(&self) -> Vec<RamBackend> {
        let implicit = self.has_implicit_ram().then(|| RamBackend {
            id: self.default_ram_id().to_owned(),
            size: self
                .memory()
                .expect("-m was checked when the command line was parsed")
                .next_multiple_of(8192),
            kind: RamKind::Implicit,
            share: false,
            mem_path: self.last_value("mem-path").map(PathBuf::from),
            offset: 0,
            hugetlb: false,
        });
        implicit.into_iter().chain(self.explicit_backends()).collect()
    }

    /// Whether the main memory has no backend on the command line.
    pub(crate) fn has_implicit_ram(&self) -> bool {
        let numa = self.all("numa").any(|(_, properties)| properties.get("memdev").is_some());
        !numa && self.machine_property("memory-backend").is_none()
    }

    /// The id that QEMU itself gives to implicit RAM (`default_ram_id` of the machine class), so that the RAM block
    /// has the same name in the migration stream as without our doing. Where we do not know it, one of our own.
    pub(crate) fn default_ram_id(&self) -> &'static str {
        let binary =
            self.binary().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let machine = self.machine().unwrap_or_default();
        // Distributors add to the names: Proxmox has pc+pve0, Ubuntu pc-i440fx-jammy.
        let is = |family: &str| {
            machine.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '+']))
        };
        if is("pc") || is("q35") || machine == "isapc" {
            "pc.ram"
        } else if is("microvm") {
            "microvm.ram"
        } else if is("virt") && (binary.contains("aarch64") || binary.ends_with("-arm")) {
            "mach-virt.ram"
        } else if machine.is_empty()
            && !["aarch64", "-arm", "ppc", "s390", "riscv", "mips"].iter().any(|other| binary.contains(other))
        {
            // The default machine of the x86 binaries, and of wrappers around them, is a PC.
            "pc.ram"
        } else {
            "vmirror.ram"
        }
    }

    fn explicit_backends(&self) -> impl Iterator<Item = RamBackend> + '_ {
        self.all("object").filter_map(|(_, properties)| {
            let qom_type = properties.get("qom-type")?;
            let kind = match qom_type.strip_prefix("memory-backend-")? {
                "ram" => RamKind::Ram,
                "memfd" => RamKind::Memfd,
                "file" => RamKind::File,
                other => RamKind::Other(other.to_owned()),
            };
            let size = properties.get("size").map_or(Ok(0), |text| size(&text));
            Some(RamBackend {
                id: properties.get("id").unwrap_or_default(),
                size: size.expect("sizes of backends were checked when the command line was parsed"),
                share: match properties.get("share") {
                    Some(text) => is_yes(&text),
                    // QEMU's default: memfd is shared, everything else is private.
                    None => kind == RamKind::Memfd,
                },
                mem_path: properties.get("mem-path").map(PathBuf::from),
                offset: properties.get("offset").and_then(|text| self::size(&text).ok()).unwrap_or(0),
                hugetlb: properties.is_on("hugetlb"),
                kind,
            })
        })
    }
}

/// Checks every size that the functions above read. Of the first that is none, with the option that it is in.
pub(crate) fn check(spec: &Spec) -> Result<(), (String, SizeError)> {
    let failed = |option: &str, value: Option<&str>| {
        let option = format!("{option} {}", value.unwrap_or(""));
        |source| (option, source)
    };
    for argument in &spec.arguments {
        match argument.name() {
            "m" => argument.properties().get("size"),
            "machine" => argument.properties().get("memory.size"),
            _ => None,
        }
        .map_or(Ok(0), |text| memory_size(&text))
        .map_err(failed(argument.word(), argument.value()))?;
        if argument.name() == "object" {
            let properties = argument.properties();
            if properties.get("qom-type").is_some_and(|name| name.starts_with("memory-backend-")) {
                for key in ["size", "offset"] {
                    properties
                        .get(key)
                        .map_or(Ok(0), |text| size(&text))
                        .map_err(failed(argument.word(), argument.value()))?;
                }
            }
        }
    }
    Ok(())
}

/// The size in `-m`: mebibytes where there is no suffix.
fn memory_size(text: &str) -> Result<u64, SizeError> {
    if text.ends_with(|last: char| last.is_ascii_digit()) { size(&format!("{text}M")) } else { size(text) }
}

/// A size as QEMU reads it: digits, a fraction if there is a suffix, hexadecimal without one; B, K, M, G, T, P, E
/// in either case, powers of 1024; bytes without a suffix.
pub(crate) fn size(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError { text: text.to_owned() };
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))
        && let Ok(value) = u64::from_str_radix(digits, 16)
    {
        return if value <= LARGEST { Ok(value) } else { Err(wrong()) };
    }
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, last)) if !last.is_ascii_digit() => {
            let power = "BKMGTPE".find(last.to_ascii_uppercase()).ok_or_else(wrong)?;
            (&text[..at], u32::try_from(power * 10).map_err(|_| wrong())?)
        }
        Some(_) => (text, 0),
        None => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || (number.contains('.') && !digits(fraction)) {
        return Err(wrong());
    }
    let unit = 1u64 << shift;
    let value = whole.parse::<u64>().ok().and_then(|value| value.checked_mul(unit)).ok_or_else(wrong)?;
    if fraction.is_empty() {
        return if value <= LARGEST { Ok(value) } else { Err(wrong()) };
    }
    // Integer arithmetic: 12 digits of fraction are more than any size that makes sense has.
    let fraction = &fraction[..fraction.len().min(12)];
    let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| wrong())?);
    let part = fraction.parse::<u128>().map_err(|_| wrong())? * u128::from(unit) / scale;
    let value = value.checked_add(u64::try_from(part).map_err(|_| wrong())?);
    value.filter(|value| *value <= LARGEST).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(line: &str) -> Spec {
        Spec::parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn all_forms_of_m() {
        let table = [
            ("q -m 512", 512 << 20),
            ("q -m 1G", 1 << 30),
            ("q -m 1g", 1 << 30),
            ("q -m 0.5G", 512 << 20),
            ("q -m 1.5G,slots=2,maxmem=4G", 3 << 29),
            ("q -m size=1048576K", 1 << 30),
            ("q -m size=256,slots=4,maxmem=2G", 256 << 20),
            ("q -m 1 -m 64", 64 << 20),
            ("q --m 64 -m slots=1,maxmem=1G", 64 << 20),
            ("q -M q35,memory.size=2G", 2 << 30),
            ("q", 128 << 20),
            ("q -machine q35,memory-backend=r -object memory-backend-ram,id=r,size=96M", 96 << 20),
        ];
        for (line, bytes) in table {
            assert_eq!(spec(line).memory(), Ok(bytes), "{line}");
        }
    }

    #[test]
    fn sizes_that_are_none_are_refused_with_their_text() {
        for text in [
            "",
            "G",
            "1X",
            "-1",
            "1..5G",
            "16777216T",
            "99999999999999999999",
            "1.G",
            ".5G",
            "18446744073709551615",
            "0xfffffffffffffff",
            "4097T",
            "15E",
            "0.6E",
            "4096.5T",
        ] {
            assert_eq!(size(text), Err(SizeError { text: text.to_owned() }));
        }
        let error = Spec::parse(&["q", "-m", "lots"]).unwrap_err();
        assert_eq!(error.to_string(), "-m lots has a size that cannot be read");
        assert!(Spec::parse(&["q", "-object", "memory-backend-ram,id=a,size=1Q"]).is_err());
    }

    #[test]
    fn backends_of_numa_nodes_and_json() {
        let spec = Spec::parse(&[
            "q",
            "-m",
            "2G",
            "-object",
            r#"{"qom-type":"memory-backend-memfd","id":"n0","size":1073741824}"#,
            "-object",
            "memory-backend-file,id=n1,size=1G,share=on,mem-path=/dev/shm/n1",
            "-numa",
            "node,memdev=n0",
            "-numa",
            "node,memdev=n1",
        ])
        .unwrap();
        let backends = spec.ram_backends();
        assert_eq!(backends.len(), 2);
        assert_eq!(
            (backends[0].size, &backends[0].kind, backends[0].share),
            (1 << 30, &RamKind::Memfd, true)
        );
        assert_eq!(backends[1].mem_path.as_deref(), Some("/dev/shm/n1".as_ref()));
    }
}
