//! The file's own shape, and its errors in words that name file, line and key.

use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU64};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use cgroup::CgroupParent;
use host::hooks::{MAX_DEADLINE, MIN_DEADLINE};
use host::paths::{LONGEST_SOCKET_PATH, longest_name};
use host::{Allow, Firewall, Hooks, logs};
use humantime::{format_duration, parse_duration};
use network::nft::NftPattern;
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer};
use session::options::MIN_BANDWIDTH;
use session::rate;
use toml::Spanned;

use super::{Config, ConfigError, Tls};
use crate::daemon::socket;

/// Every table and the keys it knows, for the message about an unknown one.
const KEYS: [(&str, &[&str]); 5] = [
    (
        "",
        &[
            "name",
            "listen",
            "api",
            "state_dir",
            "run_dir",
            "log_dir",
            "log_max",
            "ram_dir",
            "bandwidth",
            "trust_seccomp",
            "tls",
            "allow",
            "hooks",
            "network",
        ],
    ),
    ("tls", &["ca", "cert", "key"]),
    (
        "allow",
        &[
            "peers",
            "disk_dirs",
            "bridges",
            "macvtap",
            "max_memory",
            "qemu",
            "cgroup",
            "forward",
            "arguments",
            "output_dirs",
            "socket_dirs",
            "disk_drivers",
            "listen",
            "unsandboxed",
            "user",
        ],
    ),
    ("hooks", &["directory", "deadline"]),
    ("network", &["conntrack", "nft_table", "forward_port"]),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Spanned<String>,
    listen: SocketAddr,
    #[serde(default = "default_api")]
    api: Spanned<PathBuf>,
    #[serde(default = "default_state_dir")]
    state_dir: PathBuf,
    #[serde(default = "default_run_dir")]
    run_dir: Spanned<PathBuf>,
    log_dir: Option<PathBuf>,
    log_max: Option<Spanned<String>>,
    #[serde(default = "default_ram_dir")]
    ram_dir: PathBuf,
    bandwidth: Option<Spanned<String>>,
    #[serde(default)]
    trust_seccomp: bool,
    tls: TlsTable,
    allow: Option<AllowTable>,
    hooks: Option<HooksTable>,
    network: Option<NetworkTable>,
    /// Named here only to be refused in words of its own.
    metrics: Option<Spanned<IgnoredAny>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AllowTable {
    peers: Vec<String>,
    #[serde(default = "nothing")]
    disk_dirs: Spanned<Vec<PathBuf>>,
    #[serde(default)]
    bridges: Vec<String>,
    #[serde(default)]
    macvtap: Vec<String>,
    #[serde(deserialize_with = "memory")]
    max_memory: u64,
    qemu: Spanned<Vec<PathBuf>>,
    cgroup: Option<Spanned<String>>,
    #[serde(default)]
    forward: bool,
    arguments: Option<Spanned<Vec<String>>>,
    #[serde(default = "nothing")]
    output_dirs: Spanned<Vec<PathBuf>>,
    #[serde(default = "nothing")]
    socket_dirs: Spanned<Vec<PathBuf>>,
    #[serde(default)]
    disk_drivers: Vec<String>,
    listen: Option<Spanned<Vec<String>>>,
    #[serde(default)]
    unsandboxed: bool,
    user: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HooksTable {
    directory: PathBuf,
    #[serde(default = "default_deadline", deserialize_with = "deadline")]
    deadline: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkTable {
    conntrack: Option<bool>,
    nft_table: Option<Spanned<String>>,
    forward_port: Option<NonZeroU16>,
}

/// The directory of logs below the state directory.
const LOGS: &str = "logs";
/// Nothing that is emulated does with less.
const LEAST_MEMORY: u64 = 1 << 20;

fn nothing() -> Spanned<Vec<PathBuf>> {
    Spanned::new(0..0, Vec::new())
}

fn default_api() -> Spanned<PathBuf> {
    Spanned::new(0..0, PathBuf::from("/run/vmirror/api.sock"))
}

fn default_state_dir() -> PathBuf {
    PathBuf::from("/var/lib/vmirror")
}

fn default_run_dir() -> Spanned<PathBuf> {
    Spanned::new(0..0, PathBuf::from("/run/vmirror"))
}

fn default_ram_dir() -> PathBuf {
    PathBuf::from("/dev/shm")
}

fn default_deadline() -> Duration {
    Hooks::default().deadline
}

/// A time such as `"10s"`, within what makes sense for a hook.
fn deadline<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let deadline = parse_duration(&text)
        .map_err(|_| D::Error::custom(format!("{text:?} is not a time such as \"10s\"")))?;
    if (MIN_DEADLINE..=MAX_DEADLINE).contains(&deadline) {
        return Ok(deadline);
    }
    let (least, most) = (format_duration(MIN_DEADLINE), format_duration(MAX_DEADLINE));
    Err(D::Error::custom(format!("{text:?} is not between {least} and {most}")))
}

/// A size such as `"16GiB"`, in bytes.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    ByteSize::from_str(&text)
        .map(|size| size.as_u64())
        .map_err(|_| D::Error::custom(format!("{text:?} is not a size such as \"16GiB\"")))
}

/// A size that a machine could have.
fn memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match size(deserializer)? {
        bytes if bytes < LEAST_MEMORY => Err(D::Error::custom(format!(
            "{bytes} bytes are less than any VM has; say for example \"16GiB\""
        ))),
        bytes => Ok(bytes),
    }
}

/// The file being read, for positions in messages.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    /// The line, from 1, of a byte offset.
    fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().iter().take(offset);
        1 + before.filter(|byte| **byte == b'\n').count()
    }

    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        let line = self.line(error.span().map_or(0, |span| span.start));
        ConfigError::Syntax { path: self.path.to_owned(), line, message: error.message().trim().to_owned() }
    }

    fn value(&self, at: usize, key: &str, problem: String) -> ConfigError {
        ConfigError::Value { path: self.path.to_owned(), line: self.line(at), key: key.to_owned(), problem }
    }

    /// An error of the shape: which key it is about is known from the path that was being read, and what kind
    /// it is from the parser's words.
    fn shape(&self, error: &serde_path_to_error::Error<toml::de::Error>) -> ConfigError {
        let inner = error.inner();
        let at = inner.span().map_or(0, |span| span.start);
        // `Spanned` reads its value from a field of a made-up name.
        let place = error.path().to_string().replace(".$__serde_spanned_private_value", "");
        let place = if place == "." { "" } else { &place };
        let message = inner.message().trim();
        if let Some(key) = quoted_after(message, "missing field ") {
            let key = joined(place, key);
            return ConfigError::Missing { path: self.path.to_owned(), key };
        }
        if let Some(key) = quoted_after(message, "unknown field ") {
            let table = place.strip_suffix(key).unwrap_or(place).trim_end_matches('.');
            let known = KEYS.iter().find(|(name, _)| *name == table).map_or(&[][..], |(_, keys)| keys);
            return ConfigError::UnknownKey {
                path: self.path.to_owned(),
                line: self.line(at),
                key: joined(table, key),
                known: known.iter().map(|key| (*key).to_owned()).collect(),
            };
        }
        if place.is_empty() { self.syntax(inner) } else { self.value(at, place, message.to_owned()) }
    }
}

/// The word in backquotes after `prefix`.
fn quoted_after<'m>(message: &'m str, prefix: &str) -> Option<&'m str> {
    message.strip_prefix(prefix)?.strip_prefix('`')?.split('`').next()
}

fn joined(table: &str, key: &str) -> String {
    if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
    let source = Source { path, text };
    let deserializer = toml::Deserializer::parse(text).map_err(|error| source.syntax(&error))?;
    let file: File = serde_path_to_error::deserialize(deserializer).map_err(|error| source.shape(&error))?;
    if let Some(metrics) = file.metrics {
        let line = source.line(metrics.span().start);
        return Err(ConfigError::NotYet { path: path.to_owned(), line, key: "[metrics]" });
    }

    let name = file.name.get_ref();
    if name.is_empty() || name.len() > 64 || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let problem = format!("{name:?} cannot name an agent: use 1 to 64 characters without spaces");
        return Err(source.value(file.name.span().start, "name", problem));
    }

    let base = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned));
    let base = base.unwrap_or_else(|| PathBuf::from("/"));
    let api = base.join(file.api.get_ref());
    // It is made under a longer name, and gets its own when nobody else can connect to it.
    let most = LONGEST_SOCKET_PATH - socket::beside(Path::new(""), socket::FRESH).as_os_str().len();
    if api.as_os_str().len() > most {
        let problem = format!(
            "{} is too long for a unix socket: {} bytes, at most {most} fit",
            api.display(),
            api.as_os_str().len()
        );
        return Err(source.value(file.api.span().start, "api", problem));
    }

    let run_dir = base.join(file.run_dir.get_ref());
    if longest_name(&run_dir) == 0 {
        let problem = format!(
            "{} is too long: the sockets of a VM would have paths of more than {LONGEST_SOCKET_PATH} bytes there",
            run_dir.display()
        );
        return Err(source.value(file.run_dir.span().start, "run_dir", problem));
    }

    let bandwidth = file.bandwidth.map_or(Ok(None), |text| {
        bandwidth(text.get_ref()).map_err(|problem| source.value(text.span().start, "bandwidth", problem))
    })?;

    let log_max = file.log_max.map_or(Ok(logs::DEFAULT_MOST), |text| {
        log_max(text.get_ref()).map_err(|problem| source.value(text.span().start, "log_max", problem))
    })?;

    let state_dir = base.join(file.state_dir);
    let forward_port = file.network.as_ref().and_then(|table| table.forward_port);
    Ok(Config {
        name: file.name.into_inner(),
        listen: file.listen,
        api,
        log_dir: file.log_dir.map_or_else(|| state_dir.join(LOGS), |directory| base.join(directory)),
        log_max,
        state_dir,
        run_dir,
        ram_dir: base.join(file.ram_dir),
        bandwidth,
        trust_seccomp: file.trust_seccomp,
        tls: Tls { ca: base.join(file.tls.ca), cert: base.join(file.tls.cert), key: base.join(file.tls.key) },
        allow: file.allow.map_or(Ok(Allow::default()), |table| allow(&source, table))?,
        hooks: file.hooks.map_or_else(Hooks::default, |table| Hooks {
            directory: Some(base.join(table.directory)),
            deadline: table.deadline,
        }),
        keeper: None,
        forward_port: forward_port.map_or(host::forward::PORT, NonZeroU16::get),
        firewall: file.network.map_or(Ok(Firewall::default()), |table| firewall(&source, table))?,
    })
}

/// A size such as `"16MiB"` that a log can have.
fn log_max(text: &str) -> Result<u64, String> {
    let most =
        ByteSize::from_str(text).map_err(|_| format!("{text:?} is not a size such as \"16MiB\""))?.as_u64();
    if most >= logs::LEAST_MOST {
        return Ok(most);
    }
    Err(format!("{text:?} is below the least that makes sense, {}KiB", logs::LEAST_MOST >> 10))
}

/// A rate such as `"900MiB/s"`, or `"unlimited"`.
fn bandwidth(text: &str) -> Result<Option<NonZeroU64>, String> {
    match rate::limit(text).map_err(|error| error.to_string())? {
        Some(limit) if limit.get() < MIN_BANDWIDTH => {
            Err(format!("{limit} bytes/s is below the least that makes sense, {MIN_BANDWIDTH} bytes/s"))
        }
        limit => Ok(limit),
    }
}

/// The `[allow]` table. What it lists is compared with what a peer names, so everything in it is absolute.
fn allow(source: &Source<'_>, table: AllowTable) -> Result<Allow, ConfigError> {
    for (key, paths) in [
        ("allow.disk_dirs", &table.disk_dirs),
        ("allow.qemu", &table.qemu),
        ("allow.output_dirs", &table.output_dirs),
        ("allow.socket_dirs", &table.socket_dirs),
    ] {
        if let Some(relative) = paths.get_ref().iter().find(|path| path.is_relative()) {
            let problem = format!("{} is not an absolute path", relative.display());
            return Err(source.value(paths.span().start, key, problem));
        }
    }
    let cgroup = |text: Spanned<String>| {
        let parsed = text.get_ref().parse::<CgroupParent>();
        parsed.map_err(|error| source.value(text.span().start, "allow.cgroup", error.to_string()))
    };
    let user = |text: Spanned<String>| {
        let parsed = text.get_ref().parse::<qemu::User>();
        parsed.map_err(|error| source.value(text.span().start, "allow.user", error.to_string()))
    };
    Ok(Allow {
        peers: table.peers,
        disk_dirs: table.disk_dirs.into_inner(),
        bridges: table.bridges,
        macvtap: table.macvtap,
        max_memory: table.max_memory,
        qemu: table.qemu.into_inner(),
        cgroup: table.cgroup.map(cgroup).transpose()?,
        forward: table.forward,
        arguments: each(source, "allow.arguments", table.arguments)?,
        output_dirs: table.output_dirs.into_inner(),
        socket_dirs: table.socket_dirs.into_inner(),
        disk_drivers: table.disk_drivers,
        listen: each(source, "allow.listen", table.listen)?,
        unsandboxed: table.unsandboxed,
        user: table.user.map(user).transpose()?,
    })
}

/// Texts each of which is a value of its own.
fn each<T: FromStr<Err: std::fmt::Display>>(
    source: &Source<'_>,
    key: &str,
    texts: Option<Spanned<Vec<String>>>,
) -> Result<Vec<T>, ConfigError> {
    let Some(texts) = texts else { return Ok(Vec::new()) };
    let at = texts.span().start;
    let read = |text: String| {
        text.parse().map_err(|error: T::Err| {
            let problem = error.to_string();
            let named = if problem.contains(&text) { problem } else { format!("{text:?}: {problem}") };
            source.value(at, key, named)
        })
    };
    texts.into_inner().into_iter().map(read).collect()
}

/// The `[network]` table.
fn firewall(source: &Source<'_>, table: NetworkTable) -> Result<Firewall, ConfigError> {
    let default = Firewall::default();
    let pattern = |text: Spanned<String>| {
        let parsed = text.get_ref().parse::<NftPattern>();
        parsed.map_err(|error| source.value(text.span().start, "network.nft_table", error.to_string()))
    };
    Ok(Firewall {
        conntrack: table.conntrack.unwrap_or(default.conntrack),
        nft_table: table.nft_table.map(pattern).transpose()?,
    })
}
