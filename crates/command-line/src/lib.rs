//! A user's QEMU command line as typed data.
//!
//! A [`Spec`] keeps every argument verbatim and in order. Questions about it ([`Spec::disks`], [`Spec::nics`], …)
//! read the arguments; changes ([`Spec::make_mirrorable`], [`Spec::for_destination`]) touch only the properties
//! that have to change. So an option that this crate has never heard of reaches QEMU as the user wrote it.

mod destination;
mod devices;
mod disks;
mod drivers;
mod files;
mod huge_pages;
mod known;
mod made;
mod memory;
mod mirrorable;
mod network;
mod options;
mod parse;
mod paths;
pub mod render;

pub use destination::Destination;
pub use devices::DeclaredDevice;
pub use disks::{Disk, Protocol, from_file_name};
pub use files::{FilePurpose, FileUse};
pub use huge_pages::huge_page_size;
pub use known::BlockDriver;
pub use memory::{RamBackend, RamKind, SizeError};
pub use mirrorable::{Mirrorable, NotMirrorable, ram_directory, ram_place};
pub use network::{Nic, NicKind};
pub use options::{Properties, escape};
pub use parse::ParseError;

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// One QEMU command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    binary: PathBuf,
    arguments: Vec<Argument>,
}

/// One option with its value, or the image of the first hard disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Argument {
    /// As written, dashes included.
    word: String,
    value: Option<String>,
}

impl Argument {
    fn image(path: &str) -> Argument {
        Argument { word: path.to_owned(), value: None }
    }

    fn option(word: &str, value: Option<String>) -> Argument {
        Argument { word: word.to_owned(), value }
    }

    fn with_value(word: &str, value: impl Into<String>) -> Argument {
        Argument { word: word.to_owned(), value: Some(value.into()) }
    }

    fn word(&self) -> &str {
        &self.word
    }

    fn value(&self) -> Option<&str> {
        self.value.as_deref()
    }

    /// The option's name without dashes and with `-M` as `machine`; empty for an image.
    fn name(&self) -> &str {
        let name = match self.word.strip_prefix('-') {
            Some(name) => name.strip_prefix('-').unwrap_or(name),
            None => return "",
        };
        if name == "M" { "machine" } else { name }
    }

    fn is_image(&self) -> bool {
        !self.word.starts_with('-')
    }

    /// Whether QEMU reads a value that begins with `{` as JSON.
    fn takes_json(&self) -> bool {
        matches!(self.name(), "device" | "blockdev" | "object" | "netdev" | "audiodev" | "display")
    }

    /// The value as properties. Not to be used for options whose value is not a list of properties.
    fn properties(&self) -> Properties {
        let text = self.value().unwrap_or("");
        let implied = parse::implied_key(self.name());
        if !self.takes_json() {
            return Properties::parse_pairs(text, implied);
        }
        Properties::parse(text, implied).expect("JSON values were checked when the command line was parsed")
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} {value}", self.word),
            None => f.write_str(&self.word),
        }
    }
}

impl Spec {
    /// The program to run.
    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The same machine run by another program.
    pub fn set_binary(&mut self, binary: &Path) {
        self.binary = binary.to_owned();
    }

    /// The machine type as the user wrote it, which may be an alias such as `q35`. None: the binary's default.
    #[must_use]
    pub fn machine(&self) -> Option<&str> {
        self.arguments.iter().rev().filter(|argument| argument.name() == "machine").find_map(|argument| {
            let machine = argument.properties().get("type")?;
            // Borrowed from the argument itself: a machine type has no comma, so it stands there as it is.
            let text = argument.value()?;
            text.find(&machine).map(|at| &text[at..at + machine.len()])
        })
    }

    /// A property of `-machine`, of several the last.
    pub(crate) fn machine_property(&self, key: &str) -> Option<String> {
        self.all("machine").filter_map(|(_, properties)| properties.get(key)).next_back()
    }

    /// The value of `-cpu`, model and features.
    #[must_use]
    pub fn cpu(&self) -> Option<&str> {
        self.last_value("cpu")
    }

    /// Accelerators in the order in which QEMU tries them; empty means QEMU's default, which is `tcg`.
    #[must_use]
    pub fn accelerators(&self) -> Vec<String> {
        // As QEMU does: -accel in order; without one, the list in -machine accel=; -enable-kvm is the same as the
        // latter with "kvm", and the last of these two counts.
        let explicit: Vec<String> =
            self.all("accel").filter_map(|(_, properties)| properties.get("accel")).collect();
        if !explicit.is_empty() {
            return explicit;
        }
        let listed = self.arguments.iter().rev().find_map(|argument| match argument.name() {
            "machine" => argument.properties().get("accel"),
            "enable-kvm" => Some("kvm".to_owned()),
            _ => None,
        });
        listed.map(|list| list.split(':').map(str::to_owned).collect()).unwrap_or_default()
    }

    /// The guest's name from `-name`.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.all("name").filter_map(|(_, properties)| properties.get("guest")).next_back()
    }

    /// The guest's UUID from `-uuid`.
    #[must_use]
    pub fn uuid(&self) -> Option<&str> {
        self.last_value("uuid")
    }

    /// Number of vCPUs that are there at start, from `-smp`; where only the topology is given, its product.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        let Some((_, smp)) = self.all("smp").last() else { return 1 };
        let number = |key: &str| smp.get(key).and_then(|text| text.parse::<u32>().ok());
        number("cpus").or_else(|| number("maxcpus")).unwrap_or_else(|| {
            ["sockets", "dies", "clusters", "cores", "threads"]
                .iter()
                .filter_map(|key| number(key))
                .fold(1, u32::saturating_mul)
        })
    }

    /// Where QEMU writes its process id.
    #[must_use]
    pub fn pid_file(&self) -> Option<&Path> {
        self.last_value("pidfile").map(Path::new)
    }

    /// Unix sockets on which QEMU serves QMP, in the order of the command line.
    #[must_use]
    pub fn qmp_sockets(&self) -> Vec<PathBuf> {
        let mut sockets = Vec::new();
        for argument in &self.arguments {
            match argument.name() {
                "qmp" | "qmp-pretty" => {
                    let value = argument.value().unwrap_or("");
                    match value.strip_prefix("unix:") {
                        Some(socket) => {
                            // `unix:PATH,server=on,…` is shorthand for a socket chardev.
                            let path = Properties::parse_pairs(socket, Some("path")).get("path");
                            sockets.extend(path.map(PathBuf::from));
                        }
                        None => sockets.extend(
                            value
                                .strip_prefix("chardev:")
                                .and_then(|id| self.chardev_path(id))
                                .map(PathBuf::from),
                        ),
                    }
                }
                "mon" => {
                    let properties = argument.properties();
                    if properties.get("mode").as_deref() == Some("control") {
                        let chardev = properties.get("chardev").and_then(|id| self.chardev_path(&id));
                        sockets.extend(chardev.map(PathBuf::from));
                    }
                }
                _ => {}
            }
        }
        sockets
    }

    /// How many seccomp filters QEMU puts itself under.
    #[must_use]
    pub fn sandboxes(&self) -> u32 {
        let on = |(_, sandbox): &(usize, Properties)| sandbox.is_on("enable");
        u32::try_from(self.all("sandbox").filter(on).count()).unwrap_or(u32::MAX)
    }

    /// Whether QEMU puts itself into the background.
    #[must_use]
    pub fn is_daemonized(&self) -> bool {
        self.has("daemonize")
    }

    /// Whether the command line asks for `-incoming`.
    #[must_use]
    pub fn is_incoming(&self) -> bool {
        self.has("incoming")
    }

    /// The same machine without what made it wait for a migration: for the record of a VM that has arrived.
    #[must_use]
    pub fn without_incoming(&self) -> Spec {
        let mut spec = self.clone();
        while let Some(at) = spec.arguments.iter().position(|argument| argument.name() == "incoming") {
            spec.arguments.remove(at);
            // for_destination() puts -S right after -incoming; a -S elsewhere is the user's own.
            if spec.arguments.get(at).is_some_and(|argument| argument.name() == "S") {
                spec.arguments.remove(at);
            }
        }
        spec.keep_images_apart();
        spec
    }

    /// The same machine without what it boots directly: a rehearsal of it needs no kernel.
    #[must_use]
    pub fn without_direct_boot(&self) -> Spec {
        let mut spec = self.clone();
        ["kernel", "initrd", "append", "dtb", "shim"].into_iter().for_each(|name| spec.remove_all(name));
        spec
    }

    /// The same machine without the snapshot that it loaded when it was started.
    #[must_use]
    pub fn without_snapshot(mut self) -> Spec {
        self.remove_all("loadvm");
        self
    }

    fn chardev_path(&self, id: &str) -> Option<String> {
        let (_, chardev) =
            self.all("chardev").find(|(_, properties)| properties.get("id").as_deref() == Some(id))?;
        (chardev.get("backend").as_deref() == Some("socket")).then(|| chardev.get("path")).flatten()
    }

    /// Every use of an option that has properties, with its position.
    fn all<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = (usize, Properties)> + 'a {
        self.arguments
            .iter()
            .enumerate()
            .filter(move |(_, argument)| argument.name() == name)
            .map(|(at, argument)| (at, argument.properties()))
    }

    fn has(&self, name: &str) -> bool {
        self.arguments.iter().any(|argument| argument.name() == name)
    }

    fn last_value(&self, name: &str) -> Option<&str> {
        self.arguments.iter().rev().find(|argument| argument.name() == name).and_then(Argument::value)
    }

    fn remove_all(&mut self, name: &str) {
        self.arguments.retain(|argument| argument.name() != name);
        self.keep_images_apart();
    }

    /// An option that is not known would take for its value what came after one that is gone. An image goes before it, where it is the
    /// same image.
    fn keep_images_apart(&mut self) {
        while let Some(at) =
            self.arguments.windows(2).position(|pair| parse::would_be_one(&pair[0], &pair[1]))
        {
            self.arguments.swap(at, at + 1);
        }
    }

    fn store(&mut self, at: usize, properties: &Properties) {
        self.arguments[at].value = Some(properties.render());
    }
}
