//! The programs and images a testbed works with, and where they are found.

use std::env;
use std::path::{Path, PathBuf};

use crate::TestbedError;

/// The programs a testbed runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// The vmirror to test; none where it has not been built, as when the testbed tests only itself.
    pub vmirror: Option<PathBuf>,
    /// The QEMU to run guests with.
    pub qemu: PathBuf,
}

impl Programs {
    /// `VMIRROR`, or the vmirror built beside the running program or under `target/release`; `QEMU`, or the machine's
    /// `qemu-system-x86_64`.
    pub fn find() -> Self {
        let vmirror = env::var_os("VMIRROR").map(PathBuf::from).or_else(|| {
            // A test runs in target/PROFILE/deps, a binary in target/PROFILE.
            let running = env::current_exe().unwrap_or_default();
            let beside = running.ancestors().skip(1).take(2).map(|directory| directory.join("vmirror"));
            beside.chain([target().join("release/vmirror")]).find(|path| path.is_file())
        });
        let qemu = env::var_os("QEMU").map_or_else(|| "qemu-system-x86_64".into(), PathBuf::from);
        Self { vmirror, qemu: resolve(qemu) }
    }

    /// The QEMU unpacked from backports, if that was possible; if not, says on standard error that `what` is skipped, and why.
    pub fn qemu_10_or_skip(what: &str) -> Option<PathBuf> {
        let directory = target().join("qemu-10");
        let qemu = directory.join("qemu-system-x86_64");
        if qemu.is_file() {
            return Some(qemu);
        }
        let why = std::fs::read_to_string(directory.join("unavailable"))
            .unwrap_or_else(|_| "`make setup` has not run".into());
        eprintln!("SKIPPED {what}: no QEMU 10: {}", why.lines().last().unwrap_or_default());
        None
    }
}

/// The test guest's kernel and initramfs.
///
/// # Errors
/// [`TestbedError::NotSetUp`] where they have not been built.
pub fn guest_images() -> Result<(PathBuf, PathBuf), TestbedError> {
    let directory = target().join("guest");
    let image = |name: &str| {
        let path = directory.join(name);
        if path.is_file() { Ok(path) } else { Err(TestbedError::NotSetUp { path }) }
    };
    Ok((image("vmlinuz")?, image("initramfs.cpio")?))
}

/// The file system image of the Debian userland.
///
/// # Errors
/// [`TestbedError::Unavailable`] where set-up could not make it, with its reason, or was not asked to.
pub fn userland() -> Result<PathBuf, TestbedError> {
    userland_in(&target().join("userland"), "make setup-userland")
}

/// What set-up made for guests that run PostgreSQL, and for their clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postgresql {
    /// The file system image of a Debian userland that runs it, with a database for pgbench. To be copied: a guest writes it.
    pub image: PathBuf,
    /// PostgreSQL's terminal.
    pub psql: PathBuf,
    /// PostgreSQL's benchmark.
    pub pgbench: PathBuf,
}

impl Postgresql {
    /// What was made, if that was possible; if not, says on standard error that `what` is skipped, and why.
    pub fn find_or_skip(what: &str) -> Option<Self> {
        let directory = target().join("postgresql");
        match userland_in(&directory, "make setup-postgresql") {
            Ok(image) => {
                let [psql, pgbench] = ["psql", "pgbench"].map(|name| directory.join("clients").join(name));
                Some(Self { image, psql, pgbench })
            }
            Err(error) => {
                eprintln!("SKIPPED {what}: no PostgreSQL: {error}");
                None
            }
        }
    }
}

/// The image in a directory of setup/userland, which that command would have made.
fn userland_in(directory: &Path, command: &str) -> Result<PathBuf, TestbedError> {
    let path = directory.join("root.img");
    if path.is_file() {
        return Ok(path);
    }
    let why = std::fs::read_to_string(directory.join("unavailable"))
        .unwrap_or_else(|_| format!("`{command}` has not run"));
    Err(TestbedError::Unavailable { path, why: why.lines().last().unwrap_or_default().trim().to_owned() })
}

/// The workspace's `target` directory, where set-up leaves what it makes.
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target")
}

/// An absolute path for a program named as on a command line; unchanged where it is not found, so that running it says so.
fn resolve(program: PathBuf) -> PathBuf {
    if program.components().count() > 1 {
        return std::path::absolute(&program).unwrap_or(program);
    }
    let paths = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&paths)
        .map(|directory| directory.join(&program))
        .find(|path| path.is_file())
        .unwrap_or(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_could_not_be_made_comes_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let found = || userland_in(directory.path(), "make it");
        assert!(matches!(found(), Err(TestbedError::Unavailable { why, .. }) if why.contains("`make it`")));
        std::fs::write(directory.path().join("unavailable"), "I: Retrieving\nE: no network\n").unwrap();
        assert!(matches!(found(), Err(TestbedError::Unavailable { why, .. }) if why == "E: no network"));
        std::fs::write(directory.path().join("root.img"), "").unwrap();
        assert_eq!(found().unwrap(), directory.path().join("root.img"));
    }

    #[test]
    fn a_program_is_found_as_a_shell_would() {
        assert_eq!(resolve("sh".into()).file_name(), Some("sh".as_ref()));
        assert!(resolve("sh".into()).is_absolute());
        assert_eq!(resolve("/bin/sh".into()), Path::new("/bin/sh"));
        assert_eq!(resolve("no-such-program".into()), Path::new("no-such-program"));
    }
}
