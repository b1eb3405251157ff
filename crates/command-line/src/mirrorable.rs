//! Making a user's machine one that can be mirrored, without changing what the guest sees.
//!
//! The mirror reads and writes guest RAM through a file, and QEMU leaves RAM out of its own stream
//! (`x-ignore-shared`) only where it is a shared mapping of a *named* file: since QEMU 8.1 `memory-backend-memfd`
//! does not count. So every piece of RAM becomes a `memory-backend-file` with `share=on`. Which host memory backs the
//! guest's RAM shows in no table that the guest can read.

use std::path::{Path, PathBuf};

use crate::argument::Argument;
use crate::memory::{RamBackend, RamKind};
use crate::options::{Properties, escape};
use crate::ram_files::{huge_directory, huge_page_size, ram_file};
use crate::spec::Spec;

/// Where a machine that is started here gets its RAM files and sockets.
#[derive(Debug, Clone)]
pub struct Mirrorable {
    /// The VM's name: letters, digits, `.`, `_`, `-`. Part of the RAM files' names.
    pub name: String,
    /// The host's name: RAM files are in a directory that is called after it.
    pub host: String,
    /// Directory in which that is, on tmpfs or hugetlbfs. RAM that the user has put on a hugetlbfs gets its file there.
    pub ram_dir: PathBuf,
    /// Where QEMU shall listen for us.
    pub qmp_socket: PathBuf,
    /// Where QEMU shall write its process id; None leaves the user's `-pidfile`, if any.
    pub pid_file: Option<PathBuf>,
}

/// Why a machine cannot be mirrored or cannot be started elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotMirrorable {
    /// The name does not fit into file names.
    #[error("the name {name:?} is not made of letters, digits, '.', '_' and '-'")]
    Name {
        /// The name.
        name: String,
    },
    /// An option that contradicts what is wanted.
    #[error("{option} cannot be used: {why}")]
    Option {
        /// The option with its value.
        option: String,
        /// Why not.
        why: &'static str,
    },
    /// A device that is tied to this host.
    #[error("tied to this host: {device}")]
    HostDevice {
        /// The option and the reason.
        device: String,
    },
    /// A RAM file that QEMU would make without a name.
    #[error("RAM {id} is in directory {}, where QEMU makes a file without a name; give mem-path a file name", path.display())]
    UnnamedRam {
        /// The backend's id.
        id: String,
        /// The directory.
        path: PathBuf,
    },
    /// A private mapping of a file with content of its own.
    #[error("RAM {id} is a private copy of {}, which has content of its own; it cannot become shared", path.display())]
    PrivateFile {
        /// The backend's id.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// Huge pages were asked for, and the directory for RAM files has none.
    #[error("RAM {id} is to have huge pages, but {} is not on hugetlbfs", ram_dir.display())]
    HugePages {
        /// The backend's id.
        id: String,
        /// The directory for RAM files.
        ram_dir: PathBuf,
    },
    /// A kind of backend that we do not know.
    #[error("RAM {id} has a backend of unknown kind memory-backend-{kind}")]
    UnknownBackend {
        /// The backend's id.
        id: String,
        /// Its kind.
        kind: String,
    },
    /// A descriptor that the program starting QEMU would have to hand in.
    #[error("{option} uses a descriptor of the process that started it")]
    Descriptor {
        /// The option with its value.
        option: String,
    },
}

/// Options that no mirrored machine can have, and why.
const REFUSED: &[(&str, &str)] = &[
    ("readconfig", "what is in the file cannot be carried over; write it out as options"),
    ("snapshot", "its disk changes go to files without a name"),
    ("preconfig", "the machine waits to be configured by its monitor"),
    ("xen-attach", "Xen has a migration of its own"),
    ("icount", "QEMU does not carry its state over exactly"),
];

/// Options that a machine to be started under our care cannot have, though a running one may have been started with them.
const REFUSED_AT_START: &[(&str, &str)] = &[
    ("incoming", "the machine would wait for a migration of its own"),
    ("loadvm", "start it without, then load the snapshot through its monitor"),
];

impl Mirrorable {
    /// The file for a piece of RAM: in `ram_dir`, unless the user has asked for huge pages at another place.
    fn ram_file(&self, backend: &str, mem_path: Option<&Path>) -> PathBuf {
        let huge = mem_path.and_then(huge_directory);
        ram_file(huge.as_deref().unwrap_or(&self.ram_dir), &self.host, &self.name, backend)
    }
}

impl Spec {
    /// Makes the machine mirrorable: all RAM in shared, named files; our own QMP socket beside the
    /// user's; not daemonized (the launcher detaches it), and waiting for nobody at its sockets. The guest sees the same machine as before.
    ///
    /// # Errors
    /// Names the first option that stands in the way. Nothing is changed then.
    pub fn make_mirrorable(&mut self, how: &Mirrorable) -> Result<(), NotMirrorable> {
        check_name(&how.name)?;
        check_ram_ids(self)?;
        self.refuse(REFUSED_AT_START)?;
        self.check_portable()?;
        if let Some(option) = self.uses_of_descriptors(true).into_iter().next() {
            return Err(NotMirrorable::Descriptor { option });
        }
        let mut spec = self.clone();
        spec.share_ram(how)?;
        spec.set_own_qmp(&how.qmp_socket);
        spec.remove_all("daemonize");
        spec.wait_for_nobody();
        if let Some(pid_file) = &how.pid_file {
            spec.set_pid_file(pid_file);
        }
        *self = spec;
        Ok(())
    }

    /// Whether something keeps the machine on this host, whatever is done to its command line.
    ///
    /// # Errors
    /// Names the first option that does.
    pub fn check_portable(&self) -> Result<(), NotMirrorable> {
        self.refuse(REFUSED)?;
        let why = "its disk changes go to a file without a name";
        let temporary =
            |argument: &&Argument| argument.name() == "drive" && argument.properties().is_on("snapshot");
        if let Some(drive) = self.arguments.iter().find(temporary) {
            return Err(NotMirrorable::Option { option: drive.to_string(), why });
        }
        match self.host_devices().into_iter().next() {
            Some(device) => Err(NotMirrorable::HostDevice { device }),
            None => Ok(()),
        }
    }

    fn refuse(&self, table: &[(&str, &'static str)]) -> Result<(), NotMirrorable> {
        for argument in &self.arguments {
            if let Some((_, why)) = table.iter().find(|(name, _)| *name == argument.name()) {
                return Err(NotMirrorable::Option { option: argument.to_string(), why });
            }
        }
        Ok(())
    }

    /// Options that need a descriptor from whoever starts QEMU.
    pub(crate) fn uses_of_descriptors(&self, networks_too: bool) -> Vec<String> {
        let has =
            |properties: &Properties, keys: &[&str]| keys.iter().any(|key| properties.get(key).is_some());
        self.arguments
            .iter()
            .filter(|argument| match argument.name() {
                "add-fd" => true,
                "netdev" | "nic" | "net" => {
                    networks_too && has(&argument.properties(), &["fd", "fds", "vhostfd", "vhostfds"])
                }
                "chardev" | "fsdev" => has(&argument.properties(), &["fd", "sock_fd"]),
                "drive" | "blockdev" | "pflash" | "hda" | "hdb" | "hdc" | "hdd" | "cdrom" | "kernel"
                | "initrd" => argument.value().is_some_and(|value| value.contains("/dev/fdset/")),
                _ => false,
            })
            .map(ToString::to_string)
            .collect()
    }

    fn share_ram(&mut self, how: &Mirrorable) -> Result<(), NotMirrorable> {
        for backend in self.ram_backends() {
            let on_disk = |path: &&PathBuf| path.is_dir() && huge_directory(path).is_none();
            if let Some(path) = backend.mem_path.as_ref().filter(on_disk) {
                return Err(NotMirrorable::UnnamedRam { id: backend.id, path: path.clone() });
            }
            if matches!(&backend.kind, RamKind::Other(_)) {
                let RamKind::Other(kind) = backend.kind else { continue };
                return Err(NotMirrorable::UnknownBackend { id: backend.id, kind });
            }
        }
        if let Some(ram) = self.ram_backends().into_iter().find(|backend| backend.kind == RamKind::Implicit) {
            let path = how.ram_file(&ram.id, ram.mem_path.as_deref());
            self.name_implicit_ram(self.arguments.len(), &path);
        }
        let backends: Vec<(usize, Properties)> = self.all("object").collect();
        for (at, mut object) in backends {
            let kind = object.get("qom-type").unwrap_or_default();
            if kind.starts_with("memory-backend-") {
                let id = object.get("id").unwrap_or_default();
                share_backend(&mut object, &kind, &id, how)?;
                self.store(at, &object);
            }
        }
        Ok(())
    }

    /// Gives the RAM that QEMU would allocate for `-m` a backend of its own, in that file, as the argument at that place.
    pub(crate) fn name_implicit_ram(&mut self, at: usize, path: &Path) {
        let ram = self.ram_backends().into_iter().find(|backend| backend.kind == RamKind::Implicit);
        let Some(RamBackend { id, size, .. }) = ram else { return };
        let path = escape(&path.to_string_lossy());
        let object = format!("memory-backend-file,id={id},size={size}B,mem-path={path},share=on");
        self.arguments.insert(at, Argument::with_value("-object", object));
        // -mem-path and a backend exclude each other; a directory on a disk was refused before.
        self.remove_all("mem-path");
        match self.all("machine").last() {
            Some((at, mut machine)) => {
                machine.set("memory-backend", &id);
                self.store(at, &machine);
            }
            None => self.arguments.push(Argument::with_value("-machine", format!("memory-backend={id}"))),
        }
    }

    pub(crate) fn set_pid_file(&mut self, pid_file: &Path) {
        self.remove_all("pidfile");
        self.arguments.push(Argument::with_value("-pidfile", pid_file.to_string_lossy()));
    }
}

/// Whether every piece of RAM has an id that QEMU would take: it becomes part of a file's name.
pub(crate) fn check_ram_ids(spec: &Spec) -> Result<(), NotMirrorable> {
    let odd = |id: &str| !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    match spec.ram_backends().into_iter().find(|backend| odd(&backend.id)) {
        Some(backend) => Err(NotMirrorable::Name { name: backend.id }),
        None => Ok(()),
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), NotMirrorable> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(NotMirrorable::Name { name: name.to_owned() })
    }
}

fn share_backend(
    object: &mut Properties,
    kind: &str,
    id: &str,
    how: &Mirrorable,
) -> Result<(), NotMirrorable> {
    let path = object.get("mem-path").map(PathBuf::from);
    if kind == "memory-backend-file" {
        let path = path.clone().unwrap_or_default();
        if object.is_on("share") && !path.is_dir() {
            return Ok(());
        }
        if path.metadata().is_ok_and(|file| file.is_file() && file.len() > 0) {
            return Err(NotMirrorable::PrivateFile { id: id.to_owned(), path });
        }
        object.set_bool("share", true);
    } else {
        if object.is_on("hugetlb") && huge_page_size(&how.ram_dir).is_none() {
            return Err(NotMirrorable::HugePages { id: id.to_owned(), ram_dir: how.ram_dir.clone() });
        }
        into_shared_file(object);
    }
    object.set("mem-path", &how.ram_file(id, path.as_deref()).to_string_lossy());
    Ok(())
}

/// The same RAM in a shared file, which is to be named.
pub(crate) fn into_shared_file(object: &mut Properties) {
    // Properties that only memory-backend-memfd has.
    for key in ["hugetlb", "hugetlbsize", "seal"] {
        object.remove(key);
    }
    object.set("qom-type", "memory-backend-file");
    object.set_bool("share", true);
}

#[cfg(test)]
mod tests;
