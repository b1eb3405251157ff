//! Processes that have started a machine's QEMU, and wait for its end.

use std::fs;
use std::path::Path;

use super::Supervisor;

/// Programs that only become, or wait for, what they are told to start: who told them is meant.
const WRAPPERS: [&str; 17] = [
    "sudo", "doas", "su", "env", "nice", "ionice", "chrt", "taskset", "numactl", "nsenter", "unshare", "ip",
    "setpriv", "setsid", "nohup", "timeout", "strace",
];
/// Of wrappers around wrappers, so many.
const DEEP: usize = 8;
const SHELLS: [&str; 8] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "busybox"];
/// Where a person works: what is started there is started by that person.
const SEATS: [&str; 10] =
    ["login", "sshd", "tmux: server", "screen", "systemd", "init", "fish", "script", "cron", "sshd-session"];

pub(super) fn of(root: &Path, pid: u32, own: u32) -> Option<Supervisor> {
    let mut parent = parent_of(root, pid)?;
    for _ in 0..DEEP {
        // The agent's own; and of what has lost its parent the first process is one in name only, but for a loop.
        if parent == own {
            return None;
        }
        let name = fs::read_to_string(root.join(format!("proc/{parent}/comm"))).ok()?;
        let name = shell_of(root, parent).unwrap_or_else(|| name.trim_end().to_owned());
        if !WRAPPERS.contains(&name.as_str()) {
            return by_name(root, parent, &name);
        }
        parent = parent_of(root, parent)?;
    }
    None
}

fn by_name(root: &Path, pid: u32, name: &str) -> Option<Supervisor> {
    let certain = |what: &str, remedy: &str| {
        let (what, remedy) = (format!("{what} (process {pid})"), remedy.to_owned());
        Some(Supervisor { what, certain: true, remedy })
    };
    match name {
        "runsv" => certain("runit", "say `sv once` of its service: runit then leaves it ended"),
        "supervise" => certain("daemontools", "say `svc -o` of its directory: it is then left ended"),
        "s6-supervise" => certain("s6", "say `s6-svc -o` of its directory: s6 then leaves it ended"),
        "supervise-daemo" | "supervise-daemon" => {
            certain("OpenRC's supervise-daemon", "start it by start-stop-daemon, which does not respawn")
        }
        "supervisord" => {
            certain("supervisord", "set autorestart=false for it, and have supervisord read that")
        }
        "conmon" | "dockerd" | "docker-init" | "podman" => container(pid, name),
        name if name.starts_with("containerd-shim") => container(pid, name),
        name if SHELLS.contains(&name) => loops(root, pid).then(|| Supervisor {
            what: format!("a loop of a shell (process {pid})"),
            certain: true,
            remedy: "end that shell, or have it end when QEMU does".to_owned(),
        }),
        _ if pid == 1 || SEATS.contains(&name) => None,
        name => Some(Supervisor {
            what: format!("{name} (process {pid}), whose child it is,"),
            certain: false,
            remedy: "see what that does when QEMU ends".to_owned(),
        }),
    }
}

fn container(pid: u32, name: &str) -> Option<Supervisor> {
    Some(Supervisor {
        what: format!("the restart policy of its container ({name}, process {pid})"),
        certain: false,
        remedy: "say `docker update --restart=no`, or what your container manager has for that".to_owned(),
    })
}

/// The shell that a process is: one that was started by a script's `#!` has that script's name.
fn shell_of(root: &Path, pid: u32) -> Option<String> {
    let program = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let is_shell = |name: &String| SHELLS.contains(&name.as_str());
    let by_file = fs::read_link(root.join(format!("proc/{pid}/exe"))).ok();
    // Busybox is a shell among much else.
    let by_file = by_file.as_deref().and_then(program).filter(|name| is_shell(name) && name != "busybox");
    by_file.or_else(|| {
        // Of another user's process the file is not shown; `#!` has the shell's path come first.
        let first = words(root, pid).into_iter().next()?;
        program(Path::new(&first)).filter(is_shell)
    })
}

fn words(root: &Path, pid: u32) -> Vec<String> {
    let line = fs::read(root.join(format!("proc/{pid}/cmdline"))).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Whether a shell runs something with a loop in it: a command, or a script that can be read.
fn loops(root: &Path, pid: u32) -> bool {
    let words = words(root, pid);
    let mut arguments = words.iter().skip(1).skip_while(|word| word.starts_with('-') && !word.contains('c'));
    let text = match arguments.next() {
        None => return false,
        Some(option) if option.starts_with('-') => arguments.next().cloned().unwrap_or_default(),
        Some(script) => {
            let relative = Path::new(script.trim_start_matches('/'));
            let place =
                if script.starts_with('/') { root.to_owned() } else { root.join(format!("proc/{pid}/cwd")) };
            fs::read(place.join(relative))
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .unwrap_or_default()
        }
    };
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_word(c)).any(|word| matches!(word, "while" | "until" | "for"))
}

fn parent_of(root: &Path, pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(root.join(format!("proc/{pid}/stat"))).ok()?;
    // The name in parentheses may have blanks and parentheses in it.
    stat[stat.rfind(')')? + 1..].split_whitespace().nth(1)?.parse().ok().filter(|parent| *parent > 0)
}
