//! Making a user's machine one that can be mirrored, without changing what the guest sees.
//!
//! The mirror reads and writes guest RAM through a file, and QEMU leaves RAM out of its own stream
//! (`x-ignore-shared`) only where it is a shared mapping of a *named* file: since QEMU 8.1 `memory-backend-memfd`
//! does not count. So every piece of RAM becomes a `memory-backend-file` with `share=on`. Which host memory backs the
//! guest's RAM shows in no table that the guest can read.

use std::path::{Path, PathBuf};

use super::{Argument, Properties, RamKind, Spec, escape};

/// The id of our own QMP connection on a command line.
pub(super) const OWN_QMP: &str = "vmirror-qmp";

/// Where a machine that is started here gets its RAM files and sockets.
#[derive(Debug, Clone)]
pub struct Mirrorable {
    /// The VM's name: letters, digits, `.`, `_`, `-`. Part of the RAM files' names.
    pub name: String,
    /// The host's name, part of the names of RAM files that are not in `ram_dir`: who else uses the directory, nobody knows.
    pub host: String,
    /// Directory for RAM files, on tmpfs or hugetlbfs. RAM that the user has put on a hugetlbfs gets its file there.
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
    /// RAM that only this process has, where shared RAM is needed.
    #[error("RAM {id} is private to its QEMU process")]
    PrivateRam {
        /// The backend's id.
        id: String,
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

/// The name of the file that holds a piece of a VM's RAM. `@` can be in neither part, so no two are equal.
#[must_use]
pub(super) fn ram_file(ram_dir: &Path, vm: &str, backend: &str) -> PathBuf {
    ram_dir.join(format!("vmirror-{vm}@{backend}"))
}

/// The same in a directory that is not the host's alone.
#[must_use]
pub(super) fn ram_file_elsewhere(directory: &Path, vm: &str, backend: &str, host: &str) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let host: String = host.chars().map(plain).collect();
    directory.join(format!("vmirror-{vm}@{backend}@{host}"))
}

/// The directory on hugetlbfs that a `mem-path` asks for: itself, or the one that its file is or shall be in.
#[must_use]
pub(super) fn huge_directory(mem_path: &Path) -> Option<PathBuf> {
    let directory = if mem_path.is_dir() { mem_path } else { mem_path.parent()? };
    crate::ram::huge_page_size(directory).map(|_| directory.to_owned())
}

impl Mirrorable {
    /// The file for a piece of RAM: in `ram_dir`, unless the user has asked for huge pages at another place.
    fn ram_file(&self, backend: &str, mem_path: Option<&Path>) -> PathBuf {
        match mem_path.and_then(huge_directory).filter(|directory| *directory != self.ram_dir) {
            Some(directory) => ram_file_elsewhere(&directory, &self.name, backend, &self.host),
            None => ram_file(&self.ram_dir, &self.name, backend),
        }
    }
}

impl Spec {
    /// Makes the machine mirrorable: all RAM in shared, named files; our own QMP socket beside the
    /// user's; not daemonized (the launcher detaches it). The guest sees the same machine as before.
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
        if let Some(pid_file) = &how.pid_file {
            spec.set_pid_file(pid_file);
        }
        *self = spec;
        Ok(())
    }

    /// What keeps the machine on this host, whatever is done to its command line.
    pub(crate) fn check_portable(&self) -> Result<(), NotMirrorable> {
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
    pub(super) fn uses_of_descriptors(&self, networks_too: bool) -> Vec<String> {
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
        if self.has_implicit_ram() {
            self.name_implicit_ram(how);
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

    /// Gives the RAM that QEMU would allocate for `-m` a backend of its own.
    fn name_implicit_ram(&mut self, how: &Mirrorable) {
        let id = self.default_ram_id();
        let ram = self.ram_backends().into_iter().find(|backend| backend.kind == RamKind::Implicit);
        let Some(ram) = ram else { return };
        let path = how.ram_file(id, ram.mem_path.as_deref());
        self.arguments.push(Argument::with_value(
            "-object",
            format!(
                "memory-backend-file,id={id},size={}B,mem-path={},share=on",
                ram.size,
                escape(&path.to_string_lossy())
            ),
        ));
        // -mem-path and a backend exclude each other; a directory on a disk was refused before.
        self.remove_all("mem-path");
        match self.all("machine").last() {
            Some((at, mut machine)) => {
                machine.set("memory-backend", id);
                self.store(at, &machine);
            }
            None => self.arguments.push(Argument::with_value("-machine", format!("memory-backend={id}"))),
        }
    }

    /// Adds our QMP connection, or moves the one that is there.
    pub(super) fn set_own_qmp(&mut self, socket: &Path) {
        let socket = socket.to_string_lossy();
        match self.own_qmp() {
            Some((at, mut chardev)) => {
                chardev.set("path", &socket);
                self.store(at, &chardev);
            }
            None => {
                let chardev = format!("socket,id={OWN_QMP},path={},server=on,wait=off", escape(&socket));
                self.arguments.push(Argument::with_value("-chardev", chardev));
                self.arguments.push(Argument::with_value("-mon", format!("chardev={OWN_QMP},mode=control")));
            }
        }
    }

    fn own_qmp(&self) -> Option<(usize, Properties)> {
        self.all("chardev").find(|(_, chardev)| chardev.get("id").as_deref() == Some(OWN_QMP))
    }

    /// Our own QMP socket, once the machine is mirrorable.
    #[must_use]
    pub fn own_qmp_socket(&self) -> Option<PathBuf> {
        self.own_qmp()?.1.get("path").map(PathBuf::from)
    }

    pub(super) fn set_pid_file(&mut self, pid_file: &Path) {
        self.remove_all("pidfile");
        self.arguments.push(Argument::with_value("-pidfile", pid_file.to_string_lossy()));
    }

    /// The options with which a machine with private RAM would have to be started to be mirrored, as a user would
    /// type them.
    #[must_use]
    pub fn advice_for_shared_ram(&self, vm: &str) -> String {
        let mut advice = Vec::new();
        for backend in self.ram_backends() {
            let named = backend.kind == RamKind::File && backend.share && backend.mem_path.is_some();
            if named {
                continue;
            }
            let path = format!("/dev/shm/{vm}-{}", backend.id);
            let object = format!(
                "-object memory-backend-file,id={},size={},share=on,mem-path={path}",
                backend.id,
                human(backend.size)
            );
            advice.push(match backend.kind {
                RamKind::Implicit => format!("-machine memory-backend={} {object}", backend.id),
                _ => object,
            });
        }
        advice.join(" ")
    }
}

/// Whether every piece of RAM has an id that QEMU would take: it becomes part of a file's name.
pub(super) fn check_ram_ids(spec: &Spec) -> Result<(), NotMirrorable> {
    let odd = |id: &str| !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    match spec.ram_backends().into_iter().find(|backend| odd(&backend.id)) {
        Some(backend) => Err(NotMirrorable::Name { name: backend.id }),
        None => Ok(()),
    }
}

pub(super) fn check_name(name: &str) -> Result<(), NotMirrorable> {
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
        if object.is_on("hugetlb") && crate::ram::huge_page_size(&how.ram_dir).is_none() {
            return Err(NotMirrorable::HugePages { id: id.to_owned(), ram_dir: how.ram_dir.clone() });
        }
        // Properties that only memory-backend-memfd has.
        for key in ["hugetlb", "hugetlbsize", "seal"] {
            object.remove(key);
        }
        object.set("qom-type", "memory-backend-file");
        object.set_bool("share", true);
    }
    object.set("mem-path", &how.ram_file(id, path.as_deref()).to_string_lossy());
    Ok(())
}

fn human(bytes: u64) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1 << 30) => format!("{}G", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how() -> Mirrorable {
        Mirrorable {
            name: "web1".to_owned(),
            host: "host-a".to_owned(),
            ram_dir: PathBuf::from("/dev/shm"),
            qmp_socket: PathBuf::from("/run/v/web1,a.qmp"),
            pid_file: None,
        }
    }

    fn made(argv: &[&str]) -> Result<Vec<String>, NotMirrorable> {
        let mut spec = Spec::parse(&[&["q"], argv].concat()).unwrap();
        let before = spec.clone();
        match spec.make_mirrorable(&how()) {
            Ok(()) => Ok(spec.to_argv()[1..].to_vec()),
            Err(error) => {
                assert_eq!(spec, before, "a refused machine must stay as it was");
                Err(error)
            }
        }
    }

    const OWN: [&str; 4] = [
        "-chardev",
        "socket,id=vmirror-qmp,path=/run/v/web1,,a.qmp,server=on,wait=off",
        "-mon",
        "chardev=vmirror-qmp,mode=control",
    ];

    #[test]
    fn plain_memory_gets_a_backend() {
        let argv = made(&["-M", "q35,accel=tcg", "-m", "512", "-daemonize"]).unwrap();
        let expected = [
            "-M",
            "q35,accel=tcg,memory-backend=pc.ram",
            "-m",
            "512",
            "-object",
            "memory-backend-file,id=pc.ram,size=536870912B,mem-path=/dev/shm/vmirror-web1@pc.ram,share=on",
        ];
        assert_eq!(argv, [expected.as_slice(), &OWN].concat());
        let argv = made(&["-m", "1G", "-mem-path", "/nonexistent/x"]).unwrap();
        assert!(
            argv.contains(&"memory-backend=pc.ram".to_owned()) && !argv.contains(&"-mem-path".to_owned())
        );
    }

    #[test]
    fn named_backends_become_shared_files() {
        let argv = made(&[
            "-m",
            "2G",
            "-object",
            "memory-backend-ram,id=n0,size=1G,policy=bind,host-nodes=0",
            "-object",
            r#"{"qom-type":"memory-backend-memfd","id":"n1","size":1073741824,"share":true,"seal":true}"#,
            "-numa",
            "node,memdev=n0",
            "-numa",
            "node,memdev=n1",
        ])
        .unwrap();
        assert_eq!(
            argv[3],
            "memory-backend-file,id=n0,size=1G,policy=bind,host-nodes=0,share=on,mem-path=/dev/shm/vmirror-web1@n0"
        );
        let second: serde_json::Value = serde_json::from_str(&argv[5]).unwrap();
        assert_eq!(
            second,
            serde_json::json!({"qom-type":"memory-backend-file","id":"n1","size":1_073_741_824,"share":true,
                "mem-path":"/dev/shm/vmirror-web1@n1"})
        );
        assert!(!argv.iter().any(|word| word.contains("memory-backend=")));
    }

    #[test]
    fn a_shared_named_file_stays_where_it_is() {
        let object = "memory-backend-file,id=r,size=64M,share=on,mem-path=/dev/shm/my.ram";
        let argv = made(&["-machine", "pc,memory-backend=r", "-m", "64", "-object", object]).unwrap();
        assert_eq!(argv[5], object);
    }

    #[test]
    fn making_it_mirrorable_twice_changes_nothing_more() {
        let mut spec = Spec::parse(&["q", "-m", "64"]).unwrap();
        spec.make_mirrorable(&how()).unwrap();
        let once = spec.clone();
        spec.make_mirrorable(&how()).unwrap();
        assert_eq!(spec, once);
        assert_eq!(spec.own_qmp_socket(), Some(how().qmp_socket));
    }

    #[test]
    fn refusals_name_the_option() {
        let table: &[(&[&str], &str)] = &[
            (&["-incoming", "defer"], "-incoming defer cannot be used"),
            (&["-loadvm", "x"], "-loadvm x cannot be used"),
            (&["-snapshot"], "-snapshot cannot be used"),
            (&["-drive", "file=/d,snapshot=on"], "-drive file=/d,snapshot=on cannot be used"),
            (&["-readconfig", "f"], "-readconfig f cannot be used"),
            (&["-device", "vfio-pci,host=1"], "tied to this host: -device vfio-pci,host=1"),
            (&["-mem-path", "/dev/shm"], "RAM pc.ram is in directory /dev/shm"),
            (&["-object", "memory-backend-file,id=a,size=1M,mem-path=/tmp"], "RAM a is in directory /tmp"),
            (&["-object", "memory-backend-memfd,id=a,size=2M,hugetlb=on"], "RAM a is to have huge pages"),
            (&["-object", "memory-backend-odd,id=a,size=2M"], "RAM a has a backend of unknown kind"),
            (
                &["-object", "memory-backend-file,id=a,size=1M,mem-path=/proc/self/exe,share=off"],
                "RAM a is a private copy",
            ),
            (&["-netdev", "tap,id=n,fd=7"], "-netdev tap,id=n,fd=7 uses a descriptor"),
            (&["-add-fd", "fd=3,set=1"], "-add-fd fd=3,set=1 uses a descriptor"),
        ];
        for (argv, message) in table {
            let error = made(argv).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let bad = Mirrorable { name: "../x".to_owned(), ..how() };
        assert!(matches!(
            Spec::parse(&["q"]).unwrap().make_mirrorable(&bad),
            Err(NotMirrorable::Name { .. })
        ));
    }

    #[test]
    fn the_pid_file_asked_for_replaces_the_users() {
        let mut spec = Spec::parse(&["q", "-pidfile", "/a"]).unwrap();
        spec.make_mirrorable(&how()).unwrap();
        assert_eq!(spec.pid_file(), Some(Path::new("/a")));
        spec.make_mirrorable(&Mirrorable { pid_file: Some("/b".into()), ..how() }).unwrap();
        assert_eq!(spec.pid_file(), Some(Path::new("/b")));
    }
}
