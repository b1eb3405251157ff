//! The files that hold guest RAM on this host: made before QEMU starts, nobody else's, and looked at once it has.

use std::path::{Path, PathBuf};

use qemu::spec::{ram_directory, ram_place};
use qemu::{MadeRamFile, RamBlock, RamDirectory, RamFileError, Spec, User};

use crate::host::Host;
use crate::vm::Record;
use finding::{Finding, chain};
use ownership::VmName;

/// The RAM files that a command line names.
pub(crate) fn files(spec: &Spec) -> Vec<PathBuf> {
    spec.ram_backends().iter().filter_map(|backend| backend.named_file().map(Path::to_owned)).collect()
}

/// Those of them that are this agent's own; a user's file is neither made nor removed with them.
pub fn own(host: &Host, name: &VmName, spec: &Spec) -> Vec<PathBuf> {
    files(spec).into_iter().filter(|file| is_own(host, name, file)).collect()
}

fn is_own(host: &Host, name: &VmName, file: &Path) -> bool {
    let Some(place) = ram_place(file) else { return false };
    let named = file.file_name().map(|file| file.as_encoded_bytes().to_vec()).unwrap_or_default();
    let of_it = named.starts_with(format!("vmirror-{name}@").as_bytes());
    // Outside of its own directory an agent puts RAM on hugetlbfs only.
    let placed = place == host.ram_dir || qemu::huge_page_size(place).is_some();
    of_it && placed && file.parent() == Some(&ram_directory(place, &host.name))
}

/// The directory of an agent's RAM files, which nobody else may enter, made if it is not there.
///
/// # Errors
/// [`RamFileError`] if it is not the agent's own.
pub fn directory(ram_dir: &Path, host: &str) -> Result<RamDirectory, RamFileError> {
    RamDirectory::open(&ram_directory(ram_dir, host))
}

/// RAM files that were made for a machine that is about to start.
#[derive(Debug)]
pub struct Made(Vec<MadeRamFile>);

/// Makes the files for a machine's RAM, for its QEMU to find, which may run as another user. What is there under their names is of an earlier machine, and goes.
///
/// # Errors
/// [`RamFileError`]; what was made is on the machine's record, and goes with that.
pub fn make(host: &Host, name: &VmName, spec: &Spec, user: Option<&User>) -> Result<Made, RamFileError> {
    let mut made = Vec::new();
    for backend in spec.ram_backends() {
        let Some(file) = backend.mem_path.filter(|file| is_own(host, name, file)) else { continue };
        let (Some(place), Some(of)) = (ram_place(&file), file.file_name()) else { continue };
        let directory = directory(place, &host.name)?;
        if user.is_some() {
            directory.let_through()?;
        }
        made.push(directory.make(&of.to_string_lossy(), backend.size, user)?);
    }
    Ok(Made(made))
}

impl Made {
    /// Whether QEMU has mapped what was made for it, and nobody else has got at that.
    ///
    /// # Errors
    /// [`RamFileError`] for the first that is not so: the machine must not run.
    pub fn check(&self, ram: &[RamBlock]) -> Result<(), RamFileError> {
        let of = |block: &&RamBlock| self.0.iter().find(|made| made.path() == block.path);
        ram.iter()
            .filter_map(|block| Some((of(&block)?, block)))
            .try_for_each(|(made, block)| made.check(block))
    }
}

/// What to do about a RAM file that cannot be had.
#[must_use]
pub fn hint(error: &RamFileError) -> &'static str {
    match error {
        RamFileError::Foreign { .. } => {
            "see who has made it and why, and remove it; a ram_dir that only the agent's user may write to keeps others out"
        }
        RamFileError::Stale { .. } => "see what is there, and remove it",
        RamFileError::Exposed { .. } => {
            "see who has changed it: only root and the agent's user can; then try again"
        }
        _ => "let the agent's user make files in ram_dir, or choose another one",
    }
}

/// What an operator is told of a RAM file that cannot be had.
#[must_use]
pub fn finding(host: &Host, error: &RamFileError) -> Finding {
    Finding::new("ram-file", format!("on {}: {}", host.name, chain(error)), hint(error))
}

/// RAM of a machine that others on this host can read or write, because somebody else has made its file. None is refused for that, and
/// where it goes it gets a file that is its own.
#[must_use]
pub fn exposed(record: &Record, spec: &Spec) -> Vec<Finding> {
    let exposed = |file: PathBuf| {
        let how = qemu::open_to_others(&file)?;
        let (name, file) = (&record.name, file.display());
        Some(Finding::new(
            "ram-exposed",
            format!("the memory of {name} is in {file}, and {how}"),
            format!(
                "chmod 600 {file}, now, while the VM runs; and start its QEMU with umask 077, or with `vmirror run`"
            ),
        ))
    };
    files(spec).into_iter().filter_map(exposed).collect()
}
