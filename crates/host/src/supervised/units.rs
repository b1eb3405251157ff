//! Units of systemd that restart what has ended. Where systemd runs it is asked; its files say the same of a unit that was loaded since
//! they were last changed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Supervisor;

/// Where unit files are, those first that take precedence (systemd.unit(5)).
const SYSTEM: [&str; 10] = [
    "etc/systemd/system.control",
    "run/systemd/system.control",
    "run/systemd/transient",
    "run/systemd/generator.early",
    "etc/systemd/system",
    "run/systemd/system",
    "run/systemd/generator",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];
const USER: [&str; 4] =
    ["etc/systemd/user", "run/systemd/user", "usr/local/lib/systemd/user", "usr/lib/systemd/user"];

/// The last word in a directory's drop-ins is that of the one whose name comes last.
const DROP_IN: &str = "zz-vmirror.conf";

/// A service that a process belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unit {
    name: String,
    /// Of the manager of this user.
    user: Option<u32>,
}

pub(super) fn of(root: &Path, pid: u32, own: u32) -> Option<Supervisor> {
    let unit = unit_of(root, pid)?;
    // What the agent starts is in its unit too, and not started by that.
    if unit_of(root, own).as_ref() == Some(&unit) {
        return None;
    }
    let restart = asked(root, &unit).or_else(|| on_disk(root, &unit));
    let (name, remedy) = (&unit.name, remedy(&unit));
    match restart.as_deref() {
        Some("" | "no") => None,
        Some(restart) => Some(Supervisor {
            what: format!("unit {name}, by its Restart={restart},"),
            certain: true,
            remedy,
        }),
        None => {
            let what = format!("unit {name}, whose Restart= cannot be read,");
            Some(Supervisor { what, certain: false, remedy })
        }
    }
}

/// Drop-ins of all directories count, which no unit file and no link in another directory does: a unit in /etc cannot be masked from /run,
/// and one that was made while the host runs cannot be edited.
fn remedy(unit: &Unit) -> String {
    let Unit { name, user } = unit;
    let (directory, who) = match user {
        None => ("/run/systemd/system".to_owned(), String::new()),
        // Root's own manager is another one.
        Some(user) => (format!("/run/user/{user}/systemd/user"), format!(" --user --machine={user}@")),
    };
    format!(
        "before it leaves, say `mkdir -p '{directory}/{name}.d' && printf '[Service]\\nRestart=no\\n' > \
         '{directory}/{name}.d/{DROP_IN}' && systemctl{who} daemon-reload`, after which this is not found any more; for good, \
         `systemctl{who} edit '{name}'` with Restart=no, and `systemctl{who} disable '{name}'`"
    )
}

/// The service in whose cgroup a process is.
fn unit_of(root: &Path, pid: u32) -> Option<Unit> {
    let text = fs::read_to_string(root.join(format!("proc/{pid}/cgroup"))).ok()?;
    let path = |line: &str| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let systemds = controllers == "name=systemd" || number == "0" && controllers.is_empty();
        systemds.then(|| path.to_owned())
    };
    // Version 1 has a hierarchy of systemd's own, beside which that of version 2 is the same or empty.
    let found = text.lines().filter_map(path).find_map(|path| service_in(&path));
    found.filter(|unit| !unit.name.starts_with("user@"))
}

fn service_in(path: &str) -> Option<Unit> {
    let name = path.rsplit('/').find(|part| part.ends_with(".service"))?.to_owned();
    let manager = path.split('/').find_map(|part| part.strip_prefix("user@")?.strip_suffix(".service"));
    Some(Unit { name, user: manager.and_then(|user| user.parse().ok()) })
}

/// What systemd says.
fn asked(root: &Path, unit: &Unit) -> Option<String> {
    if root != Path::new("/") || !Path::new("/run/systemd/system").is_dir() {
        return None;
    }
    // A manager that hangs is not waited for. A user's may be out of reach: its files are asked then.
    let mut show = Command::new("timeout");
    show.args(["2", "systemctl"]);
    if let Some(user) = unit.user {
        show.args(["--user".to_owned(), format!("--machine={user}@")]);
    }
    show.args(["show", "--property=Restart", "--property=LoadState", "--", &unit.name]);
    let said = show.output().ok().filter(|said| said.status.success())?;
    let text = String::from_utf8(said.stdout).ok()?;
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    match (value("LoadState"), value("Restart")) {
        (Some("masked"), _) => Some("no".to_owned()),
        (_, Some(restart)) if !restart.is_empty() => Some(restart.to_owned()),
        _ => None,
    }
}

/// What its files say.
fn on_disk(root: &Path, unit: &Unit) -> Option<String> {
    let directories: Vec<PathBuf> = match unit.user {
        None => SYSTEM.iter().map(|directory| root.join(directory)).collect(),
        Some(user) => {
            let own = format!("run/user/{user}/systemd");
            let transient = ["transient", "user"].map(|kind| root.join(&own).join(kind));
            transient.into_iter().chain(USER.iter().map(|directory| root.join(directory))).collect()
        }
    };
    let mut names = vec![unit.name.clone()];
    if let Some((template, _)) = unit.name.split_once('@') {
        names.push(format!("{template}@.service"));
    }
    let places = names.iter().flat_map(|name| directories.iter().map(move |directory| directory.join(name)));
    let file = places.into_iter().find(|file| file.symlink_metadata().is_ok())?;
    if fs::read_link(&file).is_ok_and(|target| target == Path::new("/dev/null")) {
        return Some("no".to_owned());
    }
    let mut restart = restart_in(&fs::read_to_string(file).ok()?).unwrap_or_else(|| "no".to_owned());
    // Drop-ins by name, of each that in the first directory.
    let mut drop_ins: BTreeMap<String, PathBuf> = BTreeMap::new();
    names.push("service".to_owned());
    for directory in
        names.iter().flat_map(|name| directories.iter().map(move |d| d.join(format!("{name}.d"))))
    {
        for file in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if name.ends_with(".conf") {
                drop_ins.entry(name).or_insert(file.path());
            }
        }
    }
    for text in drop_ins.values().filter_map(|file| fs::read_to_string(file).ok()) {
        restart = restart_in(&text).unwrap_or(restart);
    }
    Some(restart)
}

/// The last `Restart=` of a file's `[Service]`.
fn restart_in(text: &str) -> Option<String> {
    let mut section = "";
    let mut restart = None;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| section == "[Service]")
            && key.trim() == "Restart"
        {
            restart = Some(value.trim().to_owned());
        }
    }
    restart
}
