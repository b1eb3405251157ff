//! Relative paths, which mean something only in the directory in which QEMU was started.

use std::path::{Path, PathBuf};

use crate::argument::Argument;
use crate::disks::IMAGE_OPTIONS;
use crate::known::{BlockDriver, takes_short_chardev};
use crate::options::Properties;
use crate::spec::Spec;

impl Spec {
    /// Makes every relative path absolute, as seen from `directory`. Names that QEMU also looks up in its own
    /// directories (`-bios`, ROM files) become absolute only if `directory` has such a file, as QEMU would do.
    pub fn make_paths_absolute(&mut self, directory: &Path) {
        if self.binary.is_relative() && self.binary.components().count() > 1 {
            self.binary = directory.join(&self.binary);
        }
        for argument in &mut self.arguments {
            resolve(argument, directory);
        }
    }
}

impl Spec {
    /// The first option with a relative path, if there is one.
    #[must_use]
    pub fn relative_path(&self) -> Option<String> {
        self.arguments.iter().find_map(|argument| {
            let mut resolved = argument.clone();
            resolve(&mut resolved, Path::new("/"));
            (resolved != *argument).then(|| argument.to_string())
        })
    }
}

fn resolve(argument: &mut Argument, directory: &Path) {
    if argument.is_image() {
        argument.word = absolute_image(&argument.word, directory).unwrap_or_else(|| argument.word.clone());
        return;
    }
    let Some(value) = argument.value.clone() else { return };
    let whole = match argument.name() {
        name if IMAGE_OPTIONS.contains(&name) => absolute_image(&value, directory),
        "kernel" | "initrd" | "dtb" | "shim" | "pidfile" | "mem-path" | "pflash" | "readconfig" | "D"
        | "L" | "chroot" => absolute(&value, directory),
        "bios" => absolute(&value, directory).filter(|path| Path::new(path).exists()),
        name if takes_short_chardev(name) => shorthand(&value, directory),
        _ => None,
    };
    if let Some(whole) = whole {
        argument.value = Some(whole);
        return;
    }
    let keys: &[&str] = match argument.name() {
        "object" => &["mem-path", "filename", "dir", "file"],
        "chardev" => &["path", "input-path", "logfile"],
        "smbios" => &["file", "path"],
        "fw_cfg" => &["file"],
        "netdev" | "nic" | "net" => &["sock", "path", "addr.path"],
        "machine" => &["kernel", "initrd", "dtb"],
        "drive" => &["file", "file.filename"],
        "blockdev" => &["filename", "file.filename", "file.file.filename"],
        _ => return,
    };
    let mut properties = argument.properties();
    let mut changed = false;
    for key in keys {
        let Some(text) = properties.get(key) else { continue };
        let resolved = match argument.name() {
            "drive" => absolute_image(&text, directory),
            "blockdev" if !is_host_file(&properties, key) => None,
            // An object's `file` may be an id, and only certain kinds of objects name files.
            "object" if !names_a_file(&properties, key) => None,
            _ => absolute(&text, directory),
        };
        if let Some(path) = resolved {
            properties.set(key, &path);
            changed = true;
        }
    }
    if changed {
        argument.value = Some(properties.render());
    }
}

fn is_host_file(node: &Properties, key: &str) -> bool {
    let driver =
        key.strip_suffix("filename").map(|prefix| format!("{prefix}driver")).and_then(|key| node.get(&key));
    driver.is_some_and(|driver| BlockDriver::of(&driver) == BlockDriver::Local)
}

fn names_a_file(object: &Properties, key: &str) -> bool {
    let kind = object.get("qom-type").unwrap_or_default();
    match key {
        "mem-path" => kind == "memory-backend-file",
        "filename" => kind == "rng-random",
        "dir" => kind.starts_with("tls-creds-"),
        "file" => kind.starts_with("secret") || kind == "filter-dump",
        _ => false,
    }
}

fn absolute(path: &str, directory: &Path) -> Option<String> {
    (!path.is_empty() && Path::new(path).is_relative()).then(|| joined(directory, path))
}

/// A file name of an old-style drive option: a path unless it names a protocol.
fn absolute_image(name: &str, directory: &Path) -> Option<String> {
    if let Some(path) = name.strip_prefix("file:") {
        return absolute(path, directory);
    }
    let is_protocol = name.find([':', '/']).is_some_and(|at| name.as_bytes()[at] == b':');
    if is_protocol { None } else { absolute(name, directory) }
}

/// `unix:PATH,…`, `file:PATH`, `pipe:PATH`: the short forms of a chardev.
fn shorthand(value: &str, directory: &Path) -> Option<String> {
    let (kind, rest) = value.split_once(':')?;
    match kind {
        "unix" => {
            let mut properties = Properties::parse_pairs(rest, Some("path"));
            let path = absolute(&properties.get("path")?, directory)?;
            properties.set("path", &path);
            Some(format!("unix:{}", properties.render()))
        }
        "file" | "pipe" => Some(format!("{kind}:{}", absolute(rest, directory)?)),
        "mon" => Some(format!("mon:{}", shorthand(rest, directory)?)),
        _ => None,
    }
}

fn joined(directory: &Path, path: &str) -> String {
    let path: PathBuf =
        Path::new(path).components().filter(|part| *part != std::path::Component::CurDir).collect();
    directory.join(path).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_absolute_and_nothing_else_changes() {
        let table = [
            ("-hda", "a.img", "/d/a.img"),
            ("-hda", "nbd:localhost:1", "nbd:localhost:1"),
            ("-kernel", "./k", "/d/k"),
            ("-kernel", "/k", "/k"),
            ("-bios", "bios-256k.bin", "bios-256k.bin"),
            ("-drive", "file=x,,y,if=virtio", "file=/d/x,,y,if=virtio"),
            ("-drive", "if=none,id=cd", "if=none,id=cd"),
            ("-qmp", "unix:q.sock,server,nowait", "unix:/d/q.sock,server,nowait"),
            ("-qmp", "tcp:localhost:4444,server", "tcp:localhost:4444,server"),
            ("-serial", "mon:stdio", "mon:stdio"),
            ("-serial", "file:log", "file:/d/log"),
            ("-chardev", "socket,id=a,path=s", "socket,id=a,path=/d/s"),
            ("-blockdev", "driver=file,node-name=n,filename=f", "driver=file,node-name=n,filename=/d/f"),
            ("-blockdev", "driver=qcow2,node-name=n,file=f", "driver=qcow2,node-name=n,file=f"),
            (
                "-object",
                "memory-backend-file,id=r,size=1M,mem-path=ram",
                "memory-backend-file,id=r,size=1M,mem-path=/d/ram",
            ),
            ("-object", "iothread,id=t", "iothread,id=t"),
        ];
        for (option, before, after) in table {
            let mut spec = Spec::parse(&["./bin/qemu", option, before]).unwrap();
            spec.make_paths_absolute(Path::new("/d"));
            assert_eq!(spec.to_argv()[2], after);
            assert_eq!(spec.binary(), Path::new("/d/./bin/qemu"));
        }
        let mut spec = Spec::parse(&["qemu", "disk.img"]).unwrap();
        assert_eq!(spec.relative_path().as_deref(), Some("disk.img"));
        spec.make_paths_absolute(Path::new("/d"));
        assert_eq!(spec.to_argv(), ["qemu", "/d/disk.img"]);
    }

    #[test]
    fn json_stays_json() {
        let mut spec =
            Spec::parse(&["q", "-blockdev", r#"{"driver":"raw","file":{"driver":"file","filename":"f"}}"#])
                .unwrap();
        spec.make_paths_absolute(Path::new("/d"));
        assert_eq!(spec.to_argv()[2], r#"{"driver":"raw","file":{"driver":"file","filename":"/d/f"}}"#);
    }
}
