//! A machine's command line as a host starts it that has got it from another.
//!
//! Who sends a machine chooses its command line, and QEMU's options reach far beyond the machine: they write files, listen on
//! sockets, load code. So nothing of it is passed on because nobody has thought of it. Every option is known by its name, and what is
//! in it by its kind: it is passed as it is, rendered in another way, left out because it belongs to the process and not to
//! the machine, or refused by name. What a host's operator lets through beyond that is in [`Permissions`].
//!
//! A QEMU that waits for a machine must not touch what another one uses, which still runs it and may see the same files: it gets
//! [`Place`]s of its own for its sockets, in a directory that is nobody else's. Only when the machine is its own are they given the
//! names by which its users know them.

mod chardevs;
mod devices;
mod displays;
mod networks;
mod objects;
mod options;
mod storage;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub(super) use chardevs::waits_for_nobody;

use super::known::SHORT_CHARDEVS;
use super::{Argument, Properties, Spec};

/// What the operator of a host lets command lines have there that come from others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Arguments that are passed on as they are.
    pub arguments: Vec<Allowed>,
    /// Directories with files that may be read, and images.
    pub file_dirs: Vec<PathBuf>,
    /// Directories with files that may be written: consoles, logs.
    pub output_dirs: Vec<PathBuf>,
    /// Directories in which sockets may get the names that their users know, and that have sockets that may be connected to.
    pub socket_dirs: Vec<PathBuf>,
    /// Block drivers beyond those that only read and write the file that they are given.
    pub disk_drivers: Vec<String>,
    /// Addresses of this host on which it may be listened for displays and consoles.
    pub listen: Vec<IpAddr>,
    /// A QEMU that was under no filter of system calls where it comes from is under none here.
    pub unsandboxed: bool,
}

/// An option of QEMU's that may come from others, whatever is in it: `-trace`, or one kind of it, `-device vhost-vsock-pci`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Allowed {
    option: String,
    kind: Option<String>,
}

/// A text that allows no argument.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an option of QEMU's, or one and a kind of it, such as \"-device vhost-vsock-pci\"")]
pub struct NotAnArgument(pub String);

impl FromStr for Allowed {
    type Err = NotAnArgument;

    fn from_str(text: &str) -> Result<Allowed, NotAnArgument> {
        let mut words = text.split_whitespace();
        let wrong = || NotAnArgument(text.to_owned());
        let option = words.next().and_then(|word| word.strip_prefix('-')).ok_or_else(wrong)?;
        let option = option.strip_prefix('-').unwrap_or(option);
        let kind = words.next().map(str::to_owned);
        let plain = |word: &str| {
            !word.is_empty()
                && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if words.next().is_some() || !plain(option) || !kind.as_deref().is_none_or(plain) {
            return Err(wrong());
        }
        let option = if option == "M" { "machine" } else { option };
        Ok(Allowed { option: option.to_owned(), kind })
    }
}

impl TryFrom<String> for Allowed {
    type Error = NotAnArgument;

    fn try_from(text: String) -> Result<Allowed, NotAnArgument> {
        text.parse()
    }
}

impl From<Allowed> for String {
    fn from(allowed: Allowed) -> String {
        allowed.to_string()
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Some(kind) => write!(f, "-{} {kind}", self.option),
            None => write!(f, "-{}", self.option),
        }
    }
}

/// Why a command line is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Only to see whether QEMU takes it: nothing but its own directory is touched.
    Rehearsal,
    /// The machine is to run.
    Machine,
}

/// How a command line is rendered.
#[derive(Debug, Clone, Copy)]
pub struct Rendering<'a> {
    /// What is allowed.
    pub permissions: &'a Permissions,
    /// A directory that is nobody else's: QEMU makes its sockets there.
    pub directory: &'a Path,
    /// What for.
    pub purpose: Purpose,
}

/// A command line as QEMU is started with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// It.
    pub spec: Spec,
    /// What is at another place than the command line had it.
    pub places: Vec<Place>,
}

/// A socket, or another file of the process, that QEMU has at a place of its own, and others look for elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where the command line had it.
    pub wanted: PathBuf,
    /// Where it is.
    pub own: PathBuf,
    /// Which of the two is to lead to the other.
    pub way: Way,
}

/// What a [`Place`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// QEMU has made the own one, and others look for it at the wanted one.
    Offered,
    /// The wanted one is somebody else's socket, and QEMU looks for it at its own.
    Sought,
}

/// What of a command line is not let through, and what its host's operator could do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The option with its value, as it is on the command line.
    pub option: String,
    /// Why not.
    pub why: String,
    /// The key of `[allow]`, and what to add to it.
    pub remedy: Remedy,
}

/// What would have something that is refused be let through.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// This entry of `arguments`.
    Arguments(Allowed),
    /// A directory in `disk_dirs`.
    FileDirs(PathBuf),
    /// A directory in `output_dirs`.
    OutputDirs(PathBuf),
    /// A directory in `socket_dirs`.
    SocketDirs(PathBuf),
    /// A driver in `disk_drivers`.
    DiskDrivers(String),
    /// An address in `listen`.
    Listen(String),
    /// Nothing at that host: the machine has to be started in another way.
    Start(&'static str),
}

impl Spec {
    /// The command line with which a host starts this machine that has got it from another: this one, with nothing in it that is not
    /// allowed, and with its sockets, our own monitor's among them, in a directory of its own. To be called for what [`Spec::for_destination`] returns, or for what it
    /// is called with, to hear what stands in the way.
    ///
    /// # Errors
    /// Everything that is not let through.
    pub fn render(&self, how: &Rendering<'_>) -> Result<Rendered, Vec<Refused>> {
        let mut renderer = Renderer { spec: self, how, sockets: 0, places: Vec::new(), refused: Vec::new() };
        let mut arguments = Vec::new();
        for argument in &self.arguments {
            if renderer.is_let_through(argument) {
                arguments.push(argument.clone());
            } else {
                arguments.extend(renderer.argument(argument));
            }
        }
        renderer.is_not_silent();
        arguments.extend(renderer.displays());
        if self.sandboxes() > 0 || !how.permissions.unsandboxed {
            arguments.push(Argument::with_value("-sandbox", SANDBOX));
        }
        arguments.push(Argument::with_value("-pidfile", how.directory.join(PID_FILE).to_string_lossy()));
        if !renderer.refused.is_empty() {
            return Err(renderer.refused);
        }
        let mut spec = Spec { binary: self.binary.clone(), arguments };
        spec.keep_images_apart();
        Ok(Rendered { spec, places: renderer.places })
    }

    /// This command line, under the filters of system calls that another one is under: those that the process has which is on record
    /// with it.
    #[must_use]
    pub fn sandboxed_as(mut self, rendered: &Spec) -> Spec {
        self.remove_all("sandbox");
        self.arguments
            .extend(rendered.arguments.iter().filter(|argument| argument.name() == "sandbox").cloned());
        self
    }
}

/// The name of the file with the process's id, in a directory that is nobody else's.
const PID_FILE: &str = "pid";
/// The name of our own monitor's socket there.
pub const QMP_SOCKET: &str = "qmp";

/// The filter of system calls that QEMU puts itself under: what a machine never needs. The same as libvirt's.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

struct Renderer<'a> {
    spec: &'a Spec,
    how: &'a Rendering<'a>,
    /// How many there are in the directory.
    sockets: usize,
    places: Vec<Place>,
    refused: Vec<Refused>,
}

/// An argument that is not passed on.
struct Stop;

/// What an argument becomes: none, one, or one with something else.
type Outcome = Result<Vec<Argument>, Stop>;

impl Renderer<'_> {
    fn argument(&mut self, argument: &Argument) -> Vec<Argument> {
        options::render(self, argument).unwrap_or_default()
    }

    /// Whether the operator lets an argument through, whatever is in it.
    fn is_let_through(&self, argument: &Argument) -> bool {
        let kind = kind_of(argument);
        self.how.permissions.arguments.iter().any(|allowed| {
            allowed.option == argument.name() && (allowed.kind.is_none() || allowed.kind == kind)
        })
    }

    fn is_rehearsal(&self) -> bool {
        self.how.purpose == Purpose::Rehearsal
    }

    fn refuse<T>(&mut self, argument: &Argument, why: impl Into<String>, remedy: Remedy) -> Result<T, Stop> {
        self.refused.push(Refused { option: argument.to_string(), why: why.into(), remedy });
        Err(Stop)
    }

    /// Refuses what only the operator's word on that very kind of argument lets through.
    fn unknown<T>(&mut self, argument: &Argument, why: impl Into<String>) -> Result<T, Stop> {
        let allowed = Allowed { option: argument.name().to_owned(), kind: kind_of(argument) };
        let plain = allowed.to_string().parse() == Ok(allowed.clone());
        let allowed = if plain { allowed } else { Allowed { kind: None, ..allowed } };
        self.refuse(argument, why, Remedy::Arguments(allowed))
    }

    /// Refuses an argument of which a value that is not known to be one is a path.
    fn names_no_file(
        &mut self,
        argument: &Argument,
        properties: &Properties,
        known: &[&str],
    ) -> Result<(), Stop> {
        let is_known = |key: &str| known.contains(&key);
        match properties.texts().into_iter().find(|(key, text)| text.contains('/') && !is_known(key)) {
            Some((key, _)) => self.unknown(argument, format!("{key} names a file of the host")),
            None => Ok(()),
        }
    }

    /// Refuses a key that is there twice: QEMU takes the last of some and each of others, and what was looked at need not be what
    /// it takes.
    fn once_each(&mut self, argument: &Argument, properties: &Properties) -> Result<(), Stop> {
        let texts = properties.texts();
        let twice = (1..texts.len()).find(|&at| texts[..at].iter().any(|(key, _)| *key == texts[at].0));
        match twice {
            Some(at) => self.unknown(argument, format!("{} is in it twice", texts[at].0)),
            None => Ok(()),
        }
    }

    /// Refuses a key that is none of these.
    fn only(&mut self, argument: &Argument, properties: &Properties, known: &[&str]) -> Result<(), Stop> {
        match properties.texts().into_iter().find(|(key, _)| !known.contains(&key.as_str())) {
            Some((key, _)) => self.unknown(argument, format!("{key} is not known to be harmless there")),
            None => Ok(()),
        }
    }

    /// Refuses a file that is none that may be read.
    fn may_read(&mut self, argument: &Argument, path: &Path) -> Result<(), Stop> {
        if is_inside(&self.how.permissions.file_dirs, path) {
            return Ok(());
        }
        let why = format!("{} is in no directory whose files may be used", path.display());
        self.refuse(argument, why, Remedy::FileDirs(directory_of(path)))
    }

    /// Refuses a file that is none that may be written.
    fn may_write(&mut self, argument: &Argument, path: &Path) -> Result<(), Stop> {
        let plain = std::fs::metadata(path).map_or(true, |file| file.is_file());
        if plain && is_inside(&self.how.permissions.output_dirs, path) {
            return Ok(());
        }
        let why = if plain { "it writes a file" } else { "it writes to what is no plain file" };
        self.refuse(argument, why, Remedy::OutputDirs(directory_of(path)))
    }

    /// Refuses an address that may not be listened on.
    fn may_listen(&mut self, argument: &Argument, host: &str) -> Result<(), Stop> {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        // QEMU listens on all where there is none.
        let shown = match host {
            "" => "0.0.0.0",
            "localhost" => "127.0.0.1",
            other => other,
        };
        if shown.parse().is_ok_and(|address: IpAddr| self.how.permissions.listen.contains(&address)) {
            return Ok(());
        }
        self.refuse(argument, format!("it listens on {shown}"), Remedy::Listen(shown.to_owned()))
    }

    /// A place for a socket that others look for at `wanted`.
    fn offer(&mut self, wanted: &Path) -> PathBuf {
        let own = self.hide();
        self.place(wanted, own.clone(), Way::Offered);
        own
    }

    /// A place for a socket that nobody looks for.
    fn hide(&mut self) -> PathBuf {
        self.sockets += 1;
        self.how.directory.join(format!("socket{}", self.sockets))
    }

    /// A place at which somebody else's socket is sought, which is connected to when the machine runs.
    fn seek(&mut self, argument: &Argument, wanted: &Path) -> Result<PathBuf, Stop> {
        if !is_inside(&self.how.permissions.socket_dirs, wanted) {
            let why = format!("it connects to {}", wanted.display());
            return self.refuse(argument, why, Remedy::SocketDirs(directory_of(wanted)));
        }
        let own = self.hide();
        self.place(wanted, own.clone(), Way::Sought);
        Ok(own)
    }

    /// The file of the process's id, which tools of the machine's user may look for.
    fn pid_file(&mut self, argument: &Argument) -> Outcome {
        let own = self.how.directory.join(PID_FILE);
        self.place(Path::new(argument.value().unwrap_or_default()), own, Way::Offered);
        Ok(Vec::new())
    }

    fn place(&mut self, wanted: &Path, own: PathBuf, way: Way) {
        if wanted != own {
            self.places.push(Place { wanted: wanted.to_owned(), own, way });
        }
    }
}

impl Permissions {
    /// Whether a socket may get that name, or may be connected to there. In directories with images everything may be made that was
    /// not there.
    #[must_use]
    pub fn may_place(&self, place: &Place) -> bool {
        match place.way {
            Way::Offered => [&self.socket_dirs, &self.file_dirs].iter().any(|directories| {
                // What is there now, if anything, is not followed: nothing is put over it.
                let directory =
                    place.wanted.parent().and_then(|directory| std::fs::canonicalize(directory).ok());
                let name = place.wanted.file_name();
                let path = directory.zip(name).map(|(directory, name)| directory.join(name));
                path.is_some_and(|path| has(directories, &path))
            }),
            Way::Sought => is_inside(&self.socket_dirs, &place.wanted),
        }
    }
}

/// The kind that an argument is of: the driver of a device, the type of an object, the backend of a character device.
fn kind_of(argument: &Argument) -> Option<String> {
    let has_kind = matches!(
        argument.name(),
        "device"
            | "object"
            | "chardev"
            | "netdev"
            | "nic"
            | "net"
            | "blockdev"
            | "audiodev"
            | "audio"
            | "display"
            | "tpmdev"
            | "fsdev"
            | "virtfs"
            | "accel"
    );
    if has_kind {
        let key = super::parse::implied_key(argument.name())?;
        return argument.properties().get(key);
    }
    let is_short = argument.name() == "usbdevice" || SHORT_CHARDEVS.contains(&argument.name());
    argument.value().filter(|_| is_short).and_then(|value| value.split([':', ',']).next()).map(str::to_owned)
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).to_owned()
}

/// Whether a path, with every link in it followed, is in one of these directories. What is not there yet is where its directory is.
fn is_inside(directories: &[PathBuf], path: &Path) -> bool {
    if path.is_relative() {
        return false;
    }
    let real = std::fs::canonicalize(path).or_else(|error| {
        // A link that leads nowhere leads wherever its maker wants to.
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(error);
        }
        let (directory, name) = path.parent().zip(path.file_name()).ok_or(error)?;
        Ok::<_, std::io::Error>(std::fs::canonicalize(directory)?.join(name))
    });
    real.is_ok_and(|real| has(directories, &real))
}

/// Whether one of these directories has a path that no link is in.
fn has(directories: &[PathBuf], real: &Path) -> bool {
    let has = |directory: &PathBuf| {
        std::fs::canonicalize(directory)
            .is_ok_and(|directory| real.starts_with(&directory) && real != directory)
    };
    directories.iter().any(has)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_allows_an_argument_is_read_and_told_in_one_way() {
        for text in ["-trace", "-device vhost-vsock-pci", "-object secret", "-chardev udp"] {
            assert_eq!(text.parse::<Allowed>().unwrap().to_string(), text);
        }
        assert_eq!("--M".parse::<Allowed>().unwrap().to_string(), "-machine");
        for text in ["", "-", "device", "-device a b", "-device a,b", "-device=a"] {
            assert_eq!(text.parse::<Allowed>(), Err(NotAnArgument(text.to_owned())));
        }
    }

    #[test]
    fn links_are_followed() {
        let place = tempfile::tempdir().unwrap();
        let (inside, outside) = (place.path().join("in"), place.path().join("out"));
        for directory in [&inside, &outside] {
            std::fs::create_dir(directory).unwrap();
        }
        std::fs::write(outside.join("file"), "").unwrap();
        let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, inside.join(name)).unwrap();
        link(&outside, "directory");
        link(&outside.join("file"), "file");
        link(&outside.join("new"), "new");
        let directories = [inside.clone()];
        assert!(is_inside(&directories, &inside.join("x")));
        for path in ["directory/x", "file", "new", "../out/file", "no/x", ""] {
            assert!(!is_inside(&directories, &inside.join(path)), "{path}");
        }
        assert!(!is_inside(&directories, Path::new("x")));
    }
}
