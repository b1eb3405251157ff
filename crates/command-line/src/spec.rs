//! A command line, and what it says of the machine as a whole.

use std::path::{Path, PathBuf};

use crate::argument::{Argument, would_be_one};
use crate::options::Properties;

/// One QEMU command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    pub(crate) binary: PathBuf,
    pub(crate) arguments: Vec<Argument>,
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

    /// Every use of an option that has properties, with its position.
    pub(crate) fn all<'a>(
        &'a self,
        name: &'a str,
    ) -> impl DoubleEndedIterator<Item = (usize, Properties)> + 'a {
        self.arguments
            .iter()
            .enumerate()
            .filter(move |(_, argument)| argument.name() == name)
            .map(|(at, argument)| (at, argument.properties()))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.arguments.iter().any(|argument| argument.name() == name)
    }

    pub(crate) fn last_value(&self, name: &str) -> Option<&str> {
        self.arguments.iter().rev().find(|argument| argument.name() == name).and_then(Argument::value)
    }

    pub(crate) fn remove_all(&mut self, name: &str) {
        self.arguments.retain(|argument| argument.name() != name);
        self.keep_images_apart();
    }

    /// An option that is not known would take for its value what came after one that is gone. An image goes before it, where it is the
    /// same image.
    pub(crate) fn keep_images_apart(&mut self) {
        while let Some(at) = self.arguments.windows(2).position(|pair| would_be_one(&pair[0], &pair[1])) {
            self.arguments.swap(at, at + 1);
        }
    }

    pub(crate) fn store(&mut self, at: usize, properties: &Properties) {
        self.arguments[at].value = Some(properties.render());
    }
}
