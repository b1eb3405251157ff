//! What all kinds of options are rendered with: refusing, and finding other places.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::permissions::{Allowed, Permissions, Place, Refused, Remedy, Way, is_inside};
use crate::argument::Argument;
use crate::known::SHORT_CHARDEVS;
use crate::names::implied_key;
use crate::options::Properties;
use crate::spec::Spec;

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

/// The name of the file with the process's id, in a directory that is nobody else's.
pub(super) const PID_FILE: &str = "pid";
/// The name of our own monitor's socket there.
pub const QMP_SOCKET: &str = "qmp";

pub(super) struct Renderer<'a> {
    pub(super) spec: &'a Spec,
    pub(super) how: &'a Rendering<'a>,
    /// How many there are in the directory.
    pub(super) sockets: usize,
    pub(super) places: Vec<Place>,
    pub(super) refused: Vec<Refused>,
}

/// An argument that is not passed on.
pub(super) struct Stop;

/// What an argument becomes: none, one, or one with something else.
pub(super) type Outcome = Result<Vec<Argument>, Stop>;

impl Renderer<'_> {
    /// Whether the operator lets an argument through, whatever is in it.
    pub(super) fn is_let_through(&self, argument: &Argument) -> bool {
        let kind = kind_of(argument);
        self.how.permissions.arguments.iter().any(|allowed| {
            allowed.option == argument.name() && (allowed.kind.is_none() || allowed.kind == kind)
        })
    }

    pub(super) fn is_rehearsal(&self) -> bool {
        self.how.purpose == Purpose::Rehearsal
    }

    pub(super) fn refuse<T>(
        &mut self,
        argument: &Argument,
        why: impl Into<String>,
        remedy: Remedy,
    ) -> Result<T, Stop> {
        self.refused.push(Refused { option: argument.to_string(), why: why.into(), remedy });
        Err(Stop)
    }

    /// Refuses what only the operator's word on that very kind of argument lets through.
    pub(super) fn unknown<T>(&mut self, argument: &Argument, why: impl Into<String>) -> Result<T, Stop> {
        let allowed = Allowed { option: argument.name().to_owned(), kind: kind_of(argument) };
        let plain = allowed.to_string().parse() == Ok(allowed.clone());
        let allowed = if plain { allowed } else { Allowed { kind: None, ..allowed } };
        self.refuse(argument, why, Remedy::Arguments(allowed))
    }

    /// Refuses an argument of which a value that is not known to be one is a path.
    pub(super) fn names_no_file(
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
    pub(super) fn once_each(&mut self, argument: &Argument, properties: &Properties) -> Result<(), Stop> {
        let texts = properties.texts();
        let twice = (1..texts.len()).find(|&at| texts[..at].iter().any(|(key, _)| *key == texts[at].0));
        match twice {
            Some(at) => self.unknown(argument, format!("{} is in it twice", texts[at].0)),
            None => Ok(()),
        }
    }

    /// Refuses a key that is none of these.
    pub(super) fn only(
        &mut self,
        argument: &Argument,
        properties: &Properties,
        known: &[&str],
    ) -> Result<(), Stop> {
        match properties.texts().into_iter().find(|(key, _)| !known.contains(&key.as_str())) {
            Some((key, _)) => self.unknown(argument, format!("{key} is not known to be harmless there")),
            None => Ok(()),
        }
    }

    /// Refuses a file that is none that may be read.
    pub(super) fn may_read(&mut self, argument: &Argument, path: &Path) -> Result<(), Stop> {
        if is_inside(&self.how.permissions.file_dirs, path) {
            return Ok(());
        }
        let why = format!("{} is in no directory whose files may be used", path.display());
        self.refuse(argument, why, Remedy::FileDirs(directory_of(path)))
    }

    /// Refuses a file that is none that may be written.
    pub(super) fn may_write(&mut self, argument: &Argument, path: &Path) -> Result<(), Stop> {
        let plain = std::fs::metadata(path).map_or(true, |file| file.is_file());
        if plain && is_inside(&self.how.permissions.output_dirs, path) {
            return Ok(());
        }
        let why = if plain { "it writes a file" } else { "it writes to what is no plain file" };
        self.refuse(argument, why, Remedy::OutputDirs(directory_of(path)))
    }

    /// Refuses an address that may not be listened on.
    pub(super) fn may_listen(&mut self, argument: &Argument, host: &str) -> Result<(), Stop> {
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
    pub(super) fn offer(&mut self, wanted: &Path) -> PathBuf {
        let own = self.hide();
        self.place(wanted, own.clone(), Way::Offered);
        own
    }

    /// A place for a socket that nobody looks for.
    pub(super) fn hide(&mut self) -> PathBuf {
        self.sockets += 1;
        self.how.directory.join(format!("socket{}", self.sockets))
    }

    /// A place at which somebody else's socket is sought, which is connected to when the machine runs.
    pub(super) fn seek(&mut self, argument: &Argument, wanted: &Path) -> Result<PathBuf, Stop> {
        if !is_inside(&self.how.permissions.socket_dirs, wanted) {
            let why = format!("it connects to {}", wanted.display());
            return self.refuse(argument, why, Remedy::SocketDirs(directory_of(wanted)));
        }
        let own = self.hide();
        self.place(wanted, own.clone(), Way::Sought);
        Ok(own)
    }

    /// The file of the process's id, which tools of the machine's user may look for.
    pub(super) fn pid_file(&mut self, argument: &Argument) -> Outcome {
        let own = self.how.directory.join(PID_FILE);
        self.place(Path::new(argument.value().unwrap_or_default()), own, Way::Offered);
        Ok(Vec::new())
    }

    pub(super) fn place(&mut self, wanted: &Path, own: PathBuf, way: Way) {
        if wanted != own {
            self.places.push(Place { wanted: wanted.to_owned(), own, way });
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
        let key = implied_key(argument.name())?;
        return argument.properties().get(key);
    }
    let is_short = argument.name() == "usbdevice" || SHORT_CHARDEVS.contains(&argument.name());
    argument.value().filter(|_| is_short).and_then(|value| value.split([':', ',']).next()).map(str::to_owned)
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).to_owned()
}

pub(super) fn changed(argument: &Argument, properties: &Properties) -> Argument {
    let mut changed = argument.clone();
    changed.value = Some(properties.render());
    changed
}
