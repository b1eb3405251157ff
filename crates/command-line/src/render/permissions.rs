//! What a host lets through of others' command lines, and what it has to say of the rest.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
    pub(super) option: String,
    pub(super) kind: Option<String>,
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

/// Whether a path, with every link in it followed, is in one of these directories. What is not there yet is where its directory is.
pub(super) fn is_inside(directories: &[PathBuf], path: &Path) -> bool {
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
