//! Taking in a QEMU that somebody else has started, while it runs.
//!
//! Its command line is what the destination will be started with, so everything that was changed since the start
//! (hot-plugged or removed devices, other disk images) is looked for through QMP and refused by name.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    FilePurpose, LocateError, NotMirrorable, ParseError, Process, ProcessError, Protocol, RamAddresses,
    RamError, RamTable, Spec, Vm,
    qmp::{Qmp, QmpError},
    ram::is_named_file,
    ram_blocks,
};

/// A VM that was taken in.
#[derive(Debug)]
pub struct Adopted {
    /// Its process and command line, all paths absolute, the binary as the kernel knows it.
    pub vm: Vm,
    /// Its versioned machine type.
    pub machine: String,
    /// Where its RAM is that is no named file.
    pub ram: RamAddresses,
    /// The connection to its monitor.
    pub qmp: Qmp,
}

/// Why a running QEMU cannot be taken in. It was not changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// Its monitor cannot be talked to: no such socket, taken by another client, not QMP.
    #[error("cannot talk to QEMU")]
    Qmp(#[from] QmpError),
    /// The kernel does not tell who listens on the socket.
    #[error("cannot tell which process listens on {}", socket.display())]
    NoPeer {
        /// The socket.
        socket: PathBuf,
    },
    /// The process cannot be looked at.
    #[error("cannot look at the process")]
    Process(#[from] ProcessError),
    /// Its command line, binary or directory cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file below /proc.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The process that listens is not the QEMU that answers.
    #[error("process {pid} listens on {}, but that socket is not on its command line: {command:?}", socket.display())]
    NotOnCommandLine {
        /// The socket.
        socket: PathBuf,
        /// The process.
        pid: u32,
        /// Its command line's first word.
        command: String,
    },
    /// Its command line cannot be understood.
    #[error("cannot understand QEMU's command line")]
    Parse(#[from] ParseError),
    /// A daemonized QEMU has left the directory in which it was started.
    #[error(
        "{option} has a relative path, and a daemonized QEMU does not know any more from where; start it with absolute paths"
    )]
    UnknownDirectory {
        /// The option with its value.
        option: String,
    },
    /// Its RAM cannot be found.
    #[error("cannot find its memory")]
    Ram(#[from] RamError),
    /// QEMU does not say where its RAM is.
    #[error("cannot find its memory")]
    Locate(#[from] LocateError),
    /// It is tied to this host.
    #[error("it cannot leave this host")]
    NotMirrorable(#[from] NotMirrorable),
    /// It waits for a migration, or has been migrated away.
    #[error("it is not a machine in use: its state is {status}")]
    NotInUse {
        /// QEMU's word for its state.
        status: String,
    },
    /// A device was added since the start.
    #[error("device {device} was plugged in after the start and is not on the command line")]
    HotPlugged {
        /// Its id or driver.
        device: String,
    },
    /// A device was removed since the start.
    #[error("device {device} is on the command line but was unplugged")]
    Unplugged {
        /// Its id or driver.
        device: String,
    },
    /// Another number of devices without id than on the command line.
    #[error("{found} devices without id are plugged in, but {declared} are on the command line: {drivers}")]
    Anonymous {
        /// How many there are.
        found: usize,
        /// How many the command line has.
        declared: usize,
        /// The drivers of those that there are.
        drivers: String,
    },
    /// An image is open that is not on the command line: another medium, an overlay, a hot-plugged disk.
    #[error("image {file} is in use and not on the command line")]
    OtherImage {
        /// The file.
        file: String,
    },
    /// An image on the command line is not open any more.
    #[error("image {file} is on the command line but not in use any more")]
    MissingImage {
        /// The file.
        file: String,
    },
}

/// Takes in the QEMU whose QMP is at `qmp_socket`.
///
/// # Errors
/// Says what stands in the way; for a QMP socket that another client has, how to give it a second one. QEMU is left as it was.
pub async fn adopt(qmp_socket: &Path) -> Result<Adopted, AdoptError> {
    let socket = std::path::absolute(qmp_socket).unwrap_or_else(|_| qmp_socket.to_owned());
    let qmp = Qmp::connect(&socket).await?;
    let pid =
        qmp.peer().filter(|&pid| pid != 0).ok_or_else(|| AdoptError::NoPeer { socket: socket.clone() })?;
    let process = Process::of_pid(pid, &socket)?;
    let (spec, directory) = command_line(pid)?;
    if !spec.qmp_sockets().iter().any(|known| same_file(known, &socket)) {
        let command = spec.binary().display().to_string();
        return Err(AdoptError::NotOnCommandLine { socket, pid, command });
    }
    let status = qmp.status().await?.status;
    if matches!(
        status.as_str(),
        "inmigrate" | "postmigrate" | "finish-migrate" | "prelaunch-incoming" | "preconfig"
    ) {
        return Err(AdoptError::NotInUse { status });
    }
    // It has arrived by now, or has loaded its snapshot; the next start is not to do so again.
    let spec = spec.without_incoming().without_snapshot();
    spec.check_portable()?;
    let ram = ram_addresses(&qmp, &process, &spec).await?;
    ram_blocks(&process, &spec, &ram)?;
    check_devices(&qmp, &spec).await?;
    check_images(&qmp, &spec, &directory).await?;
    let machine = qmp.machine_type().await?;
    tracing::info!(pid, machine, socket = %socket.display(), "adopted a running QEMU");
    Ok(Adopted { vm: Vm { process, spec, qmp_socket: socket }, machine, ram, qmp })
}

/// Whether a QEMU was started to receive a migration, as far as that can be read. The command line by which it is [taken in](adopt)
/// does not say so any more.
#[must_use]
pub fn was_started_incoming(process: &Process) -> bool {
    command_line(process.pid).is_ok_and(|(spec, _)| spec.is_incoming())
}

/// The command line of a running QEMU, with the binary as the kernel knows it and all paths absolute; and its working
/// directory.
fn command_line(pid: u32) -> Result<(Spec, PathBuf), AdoptError> {
    let link = |name: &str| {
        let path = PathBuf::from(format!("/proc/{pid}/{name}"));
        fs::read_link(&path).map_err(|source| AdoptError::Read { path, source })
    };
    let path = PathBuf::from(format!("/proc/{pid}/cmdline"));
    let bytes = fs::read(&path).map_err(|source| AdoptError::Read { path, source })?;
    let text = String::from_utf8_lossy(&bytes);
    let argv: Vec<&str> = text.strip_suffix('\0').unwrap_or(&text).split('\0').collect();
    let mut spec = Spec::parse(&argv)?;
    spec.set_binary(&link("exe")?);
    // -daemonize makes QEMU go to / once it has opened its files.
    if let Some(option) = spec.relative_path().filter(|_| spec.is_daemonized()) {
        return Err(AdoptError::UnknownDirectory { option });
    }
    let directory = link("cwd")?;
    spec.make_paths_absolute(&directory);
    Ok((spec, directory))
}

/// Where RAM is that is no named file. Nothing is asked of a machine that has none.
async fn ram_addresses(qmp: &Qmp, process: &Process, spec: &Spec) -> Result<RamAddresses, LocateError> {
    let backends = spec.ram_backends();
    let wanted: Vec<&str> = backends
        .iter()
        .filter(|backend| !is_named_file(backend))
        .map(|backend| backend.id.as_str())
        .collect();
    if wanted.is_empty() {
        return Ok(RamAddresses::new());
    }
    let blocks = RamTable::of(qmp).await?.located(process).await?;
    let address = |id: &&str| {
        let mut of = blocks.iter().filter(|block| block.is_of(id));
        let block = of.next().filter(|_| of.next().is_none())?;
        Some(((*id).to_owned(), block.address))
    };
    Ok(wanted.iter().filter_map(address).collect())
}

fn same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Compares what is plugged in with what the command line declares.
async fn check_devices(qmp: &Qmp, spec: &Spec) -> Result<(), AdoptError> {
    let children = |list: Vec<crate::qmp::QomProperty>| -> Vec<(String, String)> {
        let child = |kind: &str| Some(kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned());
        list.into_iter().filter_map(|property| Some((property.name, child(&property.kind)?))).collect()
    };
    let declared = spec.declared_devices();
    let wanted: BTreeSet<&str> = declared.iter().filter_map(|device| device.id.as_deref()).collect();
    let named = children(qmp.qom_list("/machine/peripheral").await?);
    let found: BTreeSet<&str> = named.iter().map(|(id, _)| id.as_str()).collect();
    if let Some(device) = found.difference(&wanted).next() {
        return Err(AdoptError::HotPlugged { device: (*device).to_owned() });
    }
    if let Some(device) = wanted.difference(&found).next() {
        return Err(AdoptError::Unplugged { device: (*device).to_owned() });
    }
    for device in qmp.memory_devices().await? {
        if let Some(id) = device.id().filter(|id| !wanted.contains(id)) {
            return Err(AdoptError::HotPlugged { device: id.to_owned() });
        }
    }
    let anonymous = children(qmp.qom_list("/machine/peripheral-anon").await?);
    let declared = declared.iter().filter(|device| device.id.is_none()).count();
    if anonymous.len() != declared {
        let found = anonymous.len();
        let drivers = anonymous.into_iter().map(|(_, driver)| driver).collect::<Vec<_>>().join(", ");
        return Err(AdoptError::Anonymous { found, declared, drivers });
    }
    Ok(())
}

/// Compares the images in use with those of the command line.
async fn check_images(qmp: &Qmp, spec: &Spec, directory: &Path) -> Result<(), AdoptError> {
    let blocks = qmp.blocks().await?;
    let mut declared: Vec<PathBuf> = spec
        .disks()
        .into_iter()
        .filter(|disk| disk.protocol == Protocol::File)
        .map(|disk| disk.path)
        .collect();
    let flash =
        spec.files().into_iter().filter(|file| file.purpose == FilePurpose::Flash).map(|file| file.path);
    declared.extend(flash);
    // QEMU tells names as it was given them, so relative ones are relative to its directory.
    let absolute =
        |names: Vec<String>| names.into_iter().map(|name| directory.join(name)).collect::<Vec<_>>();
    let (open, backing) = (absolute(blocks.files), absolute(blocks.backing_files));
    let is_in = |list: &[PathBuf], path: &Path| list.iter().any(|known| same_file(known, path));
    if let Some(path) = open.iter().find(|path| !is_in(&declared, path) && !is_in(&backing, path)) {
        return Err(AdoptError::OtherImage { file: path.display().to_string() });
    }
    match declared.iter().find(|path| !is_in(&open, path)) {
        Some(path) => Err(AdoptError::MissingImage { file: path.display().to_string() }),
        None => Ok(()),
    }
}
