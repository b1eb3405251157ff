//! The agent's configuration file.
//!
//! TOML, every key known by name: a key that is not is refused with its line, so that a misspelt
//! limit can never be an absent one. Relative paths are taken from the file's own directory.

mod file;

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use host::fence::Keeper;
use host::{Allow, Firewall, Hooks};

/// What an agent is told when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This agent's name, the same as in its certificate.
    pub name: String,
    /// Where the link listens. Port 0 lets the kernel choose.
    pub listen: SocketAddr,
    /// The API's unix socket.
    pub api: PathBuf,
    /// Journal and history: what must survive a reboot.
    pub state_dir: PathBuf,
    /// Sockets and process ids: what need not.
    pub run_dir: PathBuf,
    /// What QEMUs write, and guests on their consoles: on a disk.
    pub log_dir: PathBuf,
    /// How long the log of one VM may become, in bytes.
    pub log_max: u64,
    /// A tmpfs or hugetlbfs for guest RAM.
    pub ram_dir: PathBuf,
    /// What all mirrors that leave this host may send together, in bytes per second; `None` is unlimited.
    pub bandwidth: Option<NonZeroU64>,
    /// Seccomp filters of QEMUs let pass what is done to track them.
    pub trust_seccomp: bool,
    /// Who this agent is, and whom it believes.
    pub tls: Tls,
    /// What peers may ask this host to run. By default nobody may ask for anything.
    pub allow: Allow,
    /// Programs of the operator's that make a network follow a VM. By default there are none.
    pub hooks: Hooks,
    /// What of this host's firewall moves with a machine: the `[network]` table.
    pub firewall: Firewall,
    /// UDP port of the tunnels for VMs that stay in another host's network.
    pub forward_port: u16,
    /// What keeps images of VMs that have left locked while no agent runs. Not in the file: the program that is the agent names itself.
    pub keeper: Option<Keeper>,
}

/// The `[tls]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The authority whose certificates are believed.
    pub ca: PathBuf,
    /// This agent's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key that no version knows.
    #[error("{}:{line}: unknown key {key:?}; known here: {}", path.display(), known.join(", "))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key, with the tables it is in.
        key: String,
        /// The keys that would be known in its place.
        known: Vec<String>,
    },
    /// A key of a later version.
    #[error("{}:{line}: {key} is not yet available in this version", path.display())]
    NotYet {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: &'static str,
    },
    /// A key that must be there is not.
    #[error("{}: {key} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key, with the table it belongs to.
        key: String,
    },
    /// A value that makes no sense.
    #[error("{}:{line}: {key}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key, with the tables it is in.
        key: String,
        /// What is wrong with the value, naming it.
        problem: String,
    },
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`], always with the file, and with the line and key where there is one.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Config::parse(path, &text)
    }

    /// Understands the text of a configuration file; `path` is for messages and as the place that relative
    /// paths are relative to.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        file::parse(path, text)
    }
}

#[cfg(test)]
mod tests;
