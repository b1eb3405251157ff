//! Files that QEMU makes when it starts, and leaves behind when it is killed.

use std::path::PathBuf;

use crate::argument::Argument;
use crate::known::takes_short_chardev;
use crate::options::Properties;
use crate::spec::Spec;

impl Spec {
    /// Files and listening sockets of character devices and displays, and logs, in the order of the command line: what QEMU makes where it is not
    /// there.
    #[must_use]
    pub fn files_made(&self) -> Vec<PathBuf> {
        self.arguments.iter().flat_map(made).map(PathBuf::from).collect()
    }
}

fn made(argument: &Argument) -> Vec<String> {
    let value = argument.value().unwrap_or_default();
    match argument.name() {
        name if takes_short_chardev(name) => shorthand(value).into_iter().collect(),
        "chardev" => {
            let properties = argument.properties();
            let kind = properties.get("backend");
            let own = match kind.as_deref() {
                Some("file") => properties.get("path"),
                Some("socket") if properties.is_on("server") => properties.get("path"),
                _ => None,
            };
            own.into_iter().chain(properties.get("logfile")).collect()
        }
        "vnc" => {
            let place = Properties::parse_pairs(value, Some("vnc")).get("vnc");
            place.and_then(|place| place.strip_prefix("unix:").map(str::to_owned)).into_iter().collect()
        }
        "spice" => {
            let spice = Properties::parse_pairs(value, None);
            spice.get("addr").filter(|_| spice.is_on("unix")).into_iter().collect()
        }
        "D" => vec![value.to_owned()],
        _ => Vec::new(),
    }
}

/// The short forms of a chardev.
fn shorthand(value: &str) -> Option<String> {
    match value.split_once(':')? {
        ("file", path) => Some(path.to_owned()),
        ("mon", rest) => shorthand(rest),
        ("unix", rest) => {
            let properties = Properties::parse_pairs(rest, Some("path"));
            properties.get("path").filter(|_| properties.is_on("server"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_qemu_makes_is_named() {
        let words = [
            "qemu-system-x86_64",
            "-serial",
            "file:/v/serial",
            "-serial",
            "mon:unix:/v/a,,b,server=on,wait=off",
            "-monitor",
            "unix:/v/client",
            "-qmp",
            "tcp:localhost:4444,server",
            "-qmp",
            "unix:/v/qmp,server,nowait",
            "-chardev",
            "file,id=c,path=/v/c,append=on",
            "-chardev",
            "socket,id=s,path=/v/s,server=on,logfile=/v/log",
            "-chardev",
            "socket,id=t,path=/v/theirs",
            "-D",
            "/v/d",
            "-vnc",
            "unix:/v/vnc,password=on",
            "-vnc",
            "127.0.0.1:1",
            "-spice",
            "unix=on,addr=/v/spice,disable-ticketing=on",
            "-spice",
            "port=5900,addr=127.0.0.1",
            "-kernel",
            "/v/kernel",
        ];
        let made = Spec::parse(&words).unwrap().files_made();
        let expected = ["serial", "a,b", "qmp", "c", "s", "log", "d", "vnc", "spice"]
            .map(|name| PathBuf::from(format!("/v/{name}")));
        assert_eq!(made, expected);
    }
}
