//! Displays and sound: windows and loudspeakers of the host a machine comes from are not there, its listeners may be.

use std::path::Path;

use super::renderer::{Outcome, Purpose, Renderer, changed};
use crate::argument::Argument;
use crate::options::{Properties, escape};

/// Windows on the screen of whoever starts QEMU.
const WINDOWS: &[&str] = &["cocoa", "curses", "default", "gtk", "none", "sdl"];

/// Sound systems of whoever starts QEMU.
const SOUND: &[&str] = &["alsa", "coreaudio", "dsound", "jack", "oss", "pa", "pipewire", "sdl", "sndio"];

/// What of a display listens on a network.
const OF_TCP: &[&str] = &["ipv4", "ipv6", "to", "websocket", "port", "tls-port", "addr"];

impl Renderer<'_> {
    /// Where there is no display at all, QEMU takes one: a window, or a listener.
    pub(super) fn displays(&mut self) -> Vec<Argument> {
        let spec = self.spec;
        if spec.has("display") || spec.has("nographic") {
            return Vec::new();
        }
        vec![Argument::with_value("-display", "none")]
    }
}

pub(super) fn display(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let display = argument.properties();
    let kind = display.get("type").unwrap_or_default();
    if let Some(listener) = argument.value().and_then(|value| value.strip_prefix("vnc=")) {
        let mut arguments = listener_of(renderer, argument, listener)?;
        arguments.insert(0, Argument::with_value("-display", "none"));
        return Ok(arguments);
    }
    match kind.as_str() {
        kind if WINDOWS.contains(&kind) => Ok(vec![Argument::with_value("-display", "none")]),
        // A window of another program, to which QEMU serves SPICE.
        "spice-app" => {
            let own = renderer.hide();
            let spice = format!("unix=on,addr={},disable-ticketing=on", escape(&own.to_string_lossy()));
            let mut arguments = vec![Argument::with_value("-display", "none")];
            if !renderer.spec.has("spice") {
                arguments.push(Argument::with_value("-spice", spice));
            }
            Ok(arguments)
        }
        _ => renderer.unknown(argument, "it uses a display, or a graphics card, of the host"),
    }
}

pub(super) fn vnc(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    listener_of(renderer, argument, argument.value().unwrap_or_default())
}

fn listener_of(renderer: &mut Renderer<'_>, argument: &Argument, value: &str) -> Outcome {
    let mut vnc = Properties::parse_pairs(value, Some("vnc"));
    renderer.once_each(argument, &vnc)?;
    let at = vnc.get("vnc").unwrap_or_default();
    let by_number =
        |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) || ["on", "off"].contains(&port);
    if vnc.get("websocket").is_some_and(|port| !by_number(&port)) {
        return renderer.unknown(argument, "it listens for web sockets at an address of its own");
    }
    if ["reverse", "connect", "x509", "x509verify"].iter().any(|key| vnc.get(key).is_some()) {
        return renderer.unknown(
            argument,
            "it connects to another host, or reads files in a way that is not QEMU's any more",
        );
    }
    if at == "none" {
        return Ok(vec![Argument::with_value("-vnc", value)]);
    }
    renderer.names_no_file(argument, &vnc, &["vnc"])?;
    if let Some(path) = at.strip_prefix("unix:") {
        if vnc.get("websocket").is_some() {
            return renderer.unknown(argument, "it listens for web sockets beside");
        }
        let own = renderer.offer(Path::new(path));
        vnc.set("vnc", &format!("unix:{}", own.display()));
        return Ok(vec![Argument::with_value("-vnc", vnc.render())]);
    }
    renderer.may_listen(argument, at.rsplit_once(':').map_or("", |(host, _)| host))?;
    if renderer.how.purpose == Purpose::Rehearsal {
        let own = renderer.hide();
        for key in OF_TCP {
            vnc.remove(key);
        }
        vnc.set("vnc", &format!("unix:{}", own.display()));
    }
    Ok(vec![Argument::with_value("-vnc", vnc.render())])
}

pub(super) fn spice(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let mut spice = Properties::parse_pairs(argument.value().unwrap_or_default(), None);
    let mut single = spice.clone();
    for repeated in ["tls-channel", "plaintext-channel"] {
        single.remove(repeated);
    }
    renderer.once_each(argument, &single)?;
    let addr = spice.get("addr").unwrap_or_default();
    for key in ["x509-dir", "x509-key-file", "x509-cert-file", "x509-cacert-file", "x509-dh-key-file"] {
        if let Some(path) = spice.get(key) {
            renderer.may_read(argument, Path::new(&path))?;
        }
    }
    if spice.get("rendernode").is_some() || spice.is_on("gl") {
        return renderer.unknown(argument, "it uses a graphics card of the host");
    }
    if spice.is_on("unix") {
        let own = renderer.offer(Path::new(&addr));
        spice.set("addr", &own.to_string_lossy());
        return Ok(vec![changed(argument, &spice)]);
    }
    renderer.may_listen(argument, &addr)?;
    if renderer.is_rehearsal() {
        let own = renderer.hide();
        for key in OF_TCP {
            spice.remove(key);
        }
        spice.set_bool("unix", true);
        spice.set("addr", &own.to_string_lossy());
    }
    Ok(vec![changed(argument, &spice)])
}

/// What is heard there nobody hears here: the guest has the same card, and plays into nothing.
pub(super) fn audio(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let mut audio = argument.properties();
    let driver = audio.get("driver").unwrap_or_default();
    match driver.as_str() {
        "none" => {}
        "spice" if renderer.spec.has("spice") => {}
        "spice" => audio = silent(&audio),
        driver if SOUND.contains(&driver) => audio = silent(&audio),
        _ => return renderer.unknown(argument, "it reaches beyond QEMU"),
    }
    renderer.names_no_file(argument, &audio, &[])?;
    Ok(vec![changed(argument, &audio)])
}

fn silent(audio: &Properties) -> Properties {
    let mut silent = Properties::new("driver", "none");
    for key in ["id", "model"] {
        if let Some(value) = audio.get(key) {
            silent.set(key, &value);
        }
    }
    silent
}
