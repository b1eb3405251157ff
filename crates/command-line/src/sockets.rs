//! The sockets of a command line: at which QEMU answers, our own among them, and at which it waits for somebody.

use std::path::{Path, PathBuf};

use crate::argument::Argument;
use crate::known::{SHORT_TCP, takes_short_chardev};
use crate::options::{Properties, escape, is_yes};
use crate::spec::Spec;

/// The id of our own QMP connection on a command line.
pub(crate) const OWN_QMP: &str = "vmirror-qmp";

impl Spec {
    /// Unix sockets on which QEMU serves QMP, in the order of the command line.
    #[must_use]
    pub fn qmp_sockets(&self) -> Vec<PathBuf> {
        let mut sockets = Vec::new();
        for argument in &self.arguments {
            match argument.name() {
                "qmp" | "qmp-pretty" => {
                    let value = argument.value().unwrap_or("");
                    match value.strip_prefix("unix:") {
                        Some(socket) => {
                            // `unix:PATH,server=on,…` is shorthand for a socket chardev.
                            let path = Properties::parse_pairs(socket, Some("path")).get("path");
                            sockets.extend(path.map(PathBuf::from));
                        }
                        None => sockets.extend(
                            value
                                .strip_prefix("chardev:")
                                .and_then(|id| self.chardev_path(id))
                                .map(PathBuf::from),
                        ),
                    }
                }
                "mon" => {
                    let properties = argument.properties();
                    if properties.get("mode").as_deref() == Some("control") {
                        let chardev = properties.get("chardev").and_then(|id| self.chardev_path(&id));
                        sockets.extend(chardev.map(PathBuf::from));
                    }
                }
                _ => {}
            }
        }
        sockets
    }

    fn chardev_path(&self, id: &str) -> Option<String> {
        let (_, chardev) =
            self.all("chardev").find(|(_, properties)| properties.get("id").as_deref() == Some(id))?;
        (chardev.get("backend").as_deref() == Some("socket")).then(|| chardev.get("path")).flatten()
    }

    /// Adds our QMP connection, or moves the one that is there.
    pub(crate) fn set_own_qmp(&mut self, socket: &Path) {
        let socket = socket.to_string_lossy();
        match self.own_qmp() {
            Some((at, mut chardev)) => {
                chardev.set("path", &socket);
                self.store(at, &chardev);
            }
            None => {
                let chardev = format!("socket,id={OWN_QMP},path={},server=on,wait=off", escape(&socket));
                self.arguments.push(Argument::with_value("-chardev", chardev));
                self.arguments.push(Argument::with_value("-mon", format!("chardev={OWN_QMP},mode=control")));
            }
        }
    }

    /// A QEMU that waits for somebody to connect to one of its sockets before it starts answers nobody else either.
    pub(crate) fn wait_for_nobody(&mut self) {
        for argument in &mut self.arguments {
            let Some(value) = argument.value().map(str::to_owned) else { continue };
            match argument.name() {
                "chardev" => {
                    let mut chardev = argument.properties();
                    let is_socket = chardev.get("backend").as_deref() == Some("socket");
                    if is_socket && waits(&chardev) {
                        waits_for_nobody(&mut chardev);
                        argument.value = Some(chardev.render());
                    }
                }
                name if takes_short_chardev(name) => {
                    let form = value.strip_prefix("mon:").unwrap_or(&value);
                    let is_socket = |kind: &str| kind == "unix" || SHORT_TCP.contains(&kind);
                    let Some((kind, at)) = form.split_once(':').filter(|(kind, _)| is_socket(kind)) else {
                        continue;
                    };
                    let mut socket = Properties::parse_pairs(at, Some("address"));
                    if waits(&socket) {
                        waits_for_nobody(&mut socket);
                        let before = &value[..value.len() - form.len()];
                        argument.value = Some(format!("{before}{kind}:{}", socket.render()));
                    }
                }
                _ => {}
            }
        }
    }

    fn own_qmp(&self) -> Option<(usize, Properties)> {
        self.all("chardev").find(|(_, chardev)| chardev.get("id").as_deref() == Some(OWN_QMP))
    }

    /// Our own QMP socket, once the machine is mirrorable.
    #[must_use]
    pub fn own_qmp_socket(&self) -> Option<PathBuf> {
        self.own_qmp()?.1.get("path").map(PathBuf::from)
    }
}

/// Whether a socket is one that QEMU waits at for somebody: its default.
fn waits(socket: &Properties) -> bool {
    socket.is_on("server") && socket.get("wait").is_none_or(|wait| is_yes(&wait))
}

/// A QEMU that waits for somebody to connect before it starts waits for ever at a place that nobody knows.
pub(crate) fn waits_for_nobody(socket: &mut Properties) {
    socket.remove("wait");
    socket.set_bool("wait", false);
}
