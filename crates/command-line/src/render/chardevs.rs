//! Character devices: `-chardev`, and the short forms of `-serial`, `-monitor` and their kin.

use std::path::{Path, PathBuf};

use super::renderer::{Outcome, QMP_SOCKET, Renderer, Stop, changed};
use crate::argument::Argument;
use crate::known::SHORT_TCP;
use crate::options::{Properties, escape};
use crate::sockets::{OWN_QMP, waits_for_nobody};

/// Kinds that are nothing outside of QEMU. Its standard streams are nothing, and its log.
const WITHIN: &[&str] = &[
    "hub",
    "memory",
    "msmouse",
    "mux",
    "null",
    "pty",
    "qemu-vdagent",
    "ringbuf",
    "spiceport",
    "spicevmc",
    "stdio",
    "testdev",
    "vc",
    "wctablet",
];

/// Keys of a socket that are of TCP.
const OF_TCP: &[&str] = &[
    "host",
    "port",
    "to",
    "ipv4",
    "ipv6",
    "telnet",
    "websocket",
    "tn3270",
    "tls-creds",
    "tls-authz",
    "delay",
    "nodelay",
];

/// What may follow the path of a `unix:`, and the address of a `tcp:`. QEMU would take any key of a character device there, one that
/// names a file among them.
const OF_SHORT_UNIX: &[&str] = &["path", "server", "wait", "reconnect", "reconnect-ms"];
const OF_SHORT_TCP: &[&str] = &["address", "server", "wait", "nodelay", "delay", "ipv4", "ipv6", "to"];

/// How often somebody else's socket is looked for, in seconds.
const RECONNECT: u64 = 1;

pub(super) fn long(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let mut chardev = argument.properties();
    renderer.once_each(argument, &chardev)?;
    let kind = chardev.get("backend").unwrap_or_default();
    if chardev.get("id").as_deref() == Some(OWN_QMP) {
        // Ours, whatever is said of it.
        return Ok(vec![Argument::with_value("-chardev", own(renderer))]);
    }
    log(renderer, argument, &mut chardev)?;
    match kind.as_str() {
        "socket" => socket(renderer, argument, &mut chardev)?,
        "file" => {
            let path = PathBuf::from(chardev.get("path").unwrap_or_default());
            renderer.may_write(argument, &path)?;
            if chardev.get("input-path").is_some() {
                return renderer.unknown(argument, "it reads a file");
            }
            if renderer.is_rehearsal() {
                chardev.set("backend", "null");
                for key in ["path", "append"] {
                    chardev.remove(key);
                }
            }
        }
        kind if WITHIN.contains(&kind) => renderer.names_no_file(argument, &chardev, &["name", "logfile"])?,
        _ => return renderer.unknown(argument, "it reaches beyond QEMU"),
    }
    Ok(vec![changed(argument, &chardev)])
}

/// Our own monitor.
fn own(renderer: &Renderer<'_>) -> String {
    let path = renderer.how.directory.join(QMP_SOCKET);
    format!("socket,id={OWN_QMP},path={},server=on,wait=off", escape(&path.to_string_lossy()))
}

/// What goes through a character device can be written to a file.
fn log(renderer: &mut Renderer<'_>, argument: &Argument, chardev: &mut Properties) -> Result<(), Stop> {
    let Some(path) = chardev.get("logfile") else { return Ok(()) };
    renderer.may_write(argument, Path::new(&path))?;
    if renderer.is_rehearsal() {
        chardev.remove("logfile");
        chardev.remove("logappend");
    }
    Ok(())
}

fn socket(renderer: &mut Renderer<'_>, argument: &Argument, socket: &mut Properties) -> Result<(), Stop> {
    let serves = socket.is_on("server");
    if let Some(path) = socket.get("path") {
        if socket.is_on("abstract") {
            return renderer.unknown(
                argument,
                "a socket without a file cannot be kept apart from the one at its source",
            );
        }
        let own = if serves {
            renderer.offer(Path::new(&path))
        } else {
            renderer.seek(argument, Path::new(&path))?
        };
        socket.set("path", &own.to_string_lossy());
        if !serves && ["reconnect", "reconnect-ms"].iter().all(|key| socket.get(key).is_none()) {
            socket.set_number("reconnect", RECONNECT);
        }
    } else if serves {
        renderer.may_listen(argument, &socket.get("host").unwrap_or_default())?;
        if renderer.is_rehearsal() {
            for key in OF_TCP {
                socket.remove(key);
            }
            socket.set("path", &renderer.hide().to_string_lossy());
        }
    } else {
        return renderer.unknown(argument, "it connects to another host");
    }
    if serves {
        waits_for_nobody(socket);
    }
    Ok(())
}

/// The short forms: `unix:PATH,server=on`, `tcp:HOST:PORT,…`, `file:PATH`, `chardev:ID`, `mon:…`, or just a kind.
pub(super) fn short(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let value = argument.value().unwrap_or_default();
    let (multiplexed, form) = match value.strip_prefix("mon:") {
        Some(form) => ("mon:", form),
        None => ("", value),
    };
    let kind = form.split([':', ',']).next().unwrap_or_default();
    let rest = form.get(kind.len() + 1..).unwrap_or_default();
    let rendered = match kind {
        "none" | "chardev" => form.to_owned(),
        "unix" => {
            let mut unix = Properties::parse_pairs(rest, Some("path"));
            renderer.once_each(argument, &unix)?;
            renderer.only(argument, &unix, OF_SHORT_UNIX)?;
            socket(renderer, argument, &mut unix)?;
            format!("unix:{}", unix.render())
        }
        kind if SHORT_TCP.contains(&kind) => {
            let mut tcp = Properties::parse_pairs(rest, Some("address"));
            renderer.once_each(argument, &tcp)?;
            renderer.only(argument, &tcp, OF_SHORT_TCP)?;
            let address = tcp.get("address").unwrap_or_default();
            if !tcp.is_on("server") {
                return renderer.unknown(argument, "it connects to another host");
            }
            renderer.may_listen(argument, address.rsplit_once(':').map_or("", |(host, _)| host))?;
            if renderer.is_rehearsal() {
                let own = renderer.hide();
                tcp = Properties::new("path", &own.to_string_lossy());
                tcp.set_bool("server", true);
            }
            waits_for_nobody(&mut tcp);
            let kind = if renderer.is_rehearsal() { "unix" } else { kind };
            format!("{kind}:{}", tcp.render())
        }
        "file" => {
            renderer.may_write(argument, Path::new(rest))?;
            if !multiplexed.is_empty() && !renderer.is_rehearsal() {
                return renderer.unknown(argument, "it would begin the file anew");
            }
            if renderer.is_rehearsal() { "null".to_owned() } else { form.to_owned() }
        }
        kind if WITHIN.contains(&kind) && !form.contains('/') => form.to_owned(),
        _ => return renderer.unknown(argument, "it reaches beyond QEMU"),
    };
    let mut changed = argument.clone();
    changed.value = Some(format!("{multiplexed}{rendered}"));
    Ok(vec![changed])
}
