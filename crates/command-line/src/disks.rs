//! Disk images on the command line.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::argument::Argument;
use crate::known::BlockDriver;
use crate::options::{self, Properties};
use crate::spec::Spec;

/// More levels than a graph of nodes has.
const DEEPEST: usize = 64;

/// How QEMU reaches the bytes of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// A file or block device of this host.
    File,
    /// Over the network or through a driver of its own, by the driver's name: `nbd`, `rbd`, `nvme`, `vvfat`, ….
    Other(String),
}

/// A disk image that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The file or block device; for another protocol the URL, as far as the command line has one.
    pub path: PathBuf,
    /// How it is reached.
    pub protocol: Protocol,
    /// The image format. None: QEMU looks into the image.
    pub format: Option<String>,
    /// The name by which QMP knows it: drive id or node name of the top node.
    pub id: Option<String>,
    /// The node name of the protocol layer, where it has one of its own.
    pub file_node: Option<String>,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// Whether it is a backing file that another image on the command line names.
    pub is_backing: bool,
    /// Whether what the guest writes goes to a file without a name, and is lost with it (`snapshot=on`).
    pub is_temporary: bool,
    /// Whether a drive of the guest has it from the start: all but nodes of `-blockdev` that no `-device` names.
    pub is_attached: bool,
}

impl Disk {
    /// The path, if it is one of this host.
    #[must_use]
    pub fn host_path(&self) -> Option<&Path> {
        (self.protocol == Protocol::File).then_some(self.path.as_path())
    }

    /// Whether QEMU writes the image.
    #[must_use]
    pub fn is_written(&self) -> bool {
        !(self.read_only || self.is_backing || self.is_temporary)
    }
}

/// Options whose whole value is the path of an image.
pub(crate) const IMAGE_OPTIONS: &[&str] =
    &["hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "mtdblock"];

impl Spec {
    /// The images behind the guest's drives, in order. Drives without a medium are left out, firmware in pflash too
    /// (that is among the [`Spec::files`]).
    #[must_use]
    pub fn disks(&self) -> Vec<Disk> {
        // Nodes of `-blockdev` are not meant by that, nor a drive that says otherwise itself.
        let all_temporary = self.has("snapshot");
        let of_options = self.arguments.iter().filter_map(|argument| {
            let disk = disk_of_option(argument)?;
            let says = argument.name() == "drive" && argument.properties().get("snapshot").is_some();
            Some(Disk { is_temporary: disk.is_temporary || all_temporary && !says, ..disk })
        });
        let mut disks: Vec<Disk> = of_options.collect();
        disks.extend(self.block_nodes());
        disks
    }

    /// Images from `-blockdev`: one for every node that no other node is built on, and one for each backing file.
    fn block_nodes(&self) -> Vec<Disk> {
        let nodes: Vec<Node> = self.all("blockdev").map(|(_, properties)| Node::of(&properties)).collect();
        let pflash = self.pflash_nodes();
        let mut disks = Vec::new();
        for node in &nodes {
            let name = node.name.as_deref();
            let used_by =
                |edge: fn(&Node) -> Option<&str>| name.is_some() && nodes.iter().any(|n| edge(n) == name);
            if used_by(|n| n.file_node.as_deref())
                || name.is_some_and(|name| pflash.iter().any(|used| used == name))
            {
                continue;
            }
            let is_attached = name.is_some_and(|name| self.has_device_of(name));
            let disk = node.disk(&nodes, used_by(|n| n.backing.as_deref()));
            disks.extend(disk.map(|disk| Disk { is_attached, ..disk }));
        }
        disks
    }

    /// Whether a device on the command line has the drive, or node, of this name.
    fn has_device_of(&self, name: &str) -> bool {
        self.all("device").any(|(_, device)| device.get("drive").as_deref() == Some(name))
    }

    /// Nodes that the machine's firmware properties (`-machine pflash0=`) use.
    pub(crate) fn pflash_nodes(&self) -> Vec<String> {
        ["pflash0", "pflash1"].iter().filter_map(|key| self.machine_property(key)).collect()
    }

    /// The file behind a node of `-blockdev`.
    pub(crate) fn node_disk(&self, name: &str) -> Option<Disk> {
        let nodes: Vec<Node> = self.all("blockdev").map(|(_, properties)| Node::of(&properties)).collect();
        nodes.iter().find(|node| node.name.as_deref() == Some(name))?.disk(&nodes, false)
    }
}

fn disk_of_option(argument: &Argument) -> Option<Disk> {
    if argument.is_image() {
        return Some(from_file_name(argument.word(), Some("raw")));
    }
    let name = argument.name();
    if IMAGE_OPTIONS.contains(&name) {
        let mut disk = from_file_name(argument.value()?, None);
        disk.read_only = name == "cdrom";
        return Some(disk);
    }
    if name != "drive" {
        return None;
    }
    let drive = argument.properties();
    if drive.get("if").as_deref() == Some("pflash") {
        return None;
    }
    drive_disk(&drive)
}

/// The image of a `-drive`.
pub(crate) fn drive_disk(drive: &Properties) -> Option<Disk> {
    let format = drive.get("format").or_else(|| drive.get("driver"));
    let mut disk = match drive.get("file").filter(|file| !file.is_empty()) {
        Some(file) => from_file_name(&file, format.as_deref()),
        // The spelled-out form: file.driver=…,file.filename=….
        None => {
            let mut disk = from_file_name(&drive.get("file.filename")?, format.as_deref());
            if let Some(driver) = drive.get("file.driver") {
                disk.protocol = protocol(&driver);
            }
            disk
        }
    };
    let cdrom = drive.get("media").as_deref() == Some("cdrom");
    disk.id = drive.get("id").or_else(|| drive.get("node-name"));
    disk.file_node = drive.get("file.node-name");
    disk.read_only = cdrom || drive.is_on("readonly") || drive.is_on("read-only");
    disk.is_temporary = drive.is_on("snapshot");
    Some(disk)
}

/// A file name as QEMU's old-style options take it and as QEMU tells it: a path, `PROTOCOL:…`, or `json:{…}`.
#[must_use]
pub fn from_file_name(file: &str, format: Option<&str>) -> Disk {
    let mut disk = Disk {
        path: PathBuf::from(file),
        protocol: Protocol::File,
        format: format.map(str::to_owned),
        id: None,
        file_node: None,
        read_only: false,
        is_backing: false,
        is_temporary: false,
        is_attached: true,
    };
    if let Some(text) = file.strip_prefix("json:")
        && let Ok(Value::Object(node)) = serde_json::from_str(text)
    {
        let node = Node::of_object(&node);
        if let Some(found) = node.disk(&[], false) {
            return Disk { format: disk.format.or(found.format.clone()), ..found };
        }
        return disk;
    }
    // As QEMU does: a colon before the first slash makes it a protocol, and file: is the plain one.
    let prefix = file.find([':', '/']).filter(|&at| file.as_bytes()[at] == b':').map(|at| &file[..at]);
    match prefix {
        Some("file") => disk.path = PathBuf::from(&file["file:".len()..]),
        Some("fat") => disk.protocol = Protocol::Other("vvfat".to_owned()),
        Some(prefix) => {
            disk.protocol = protocol(prefix.split('+').next().unwrap_or(prefix));
        }
        None => {}
    }
    disk
}

fn protocol(driver: &str) -> Protocol {
    match BlockDriver::of(driver) {
        BlockDriver::Local => Protocol::File,
        _ => Protocol::Other(driver.to_owned()),
    }
}

/// One node of a block graph, as far as it matters where the bytes are.
#[derive(Debug)]
struct Node {
    driver: String,
    name: Option<String>,
    location: Option<String>,
    /// The node below it by reference, or …
    file_node: Option<String>,
    /// … spelled out inside it.
    file: Option<Box<Node>>,
    backing: Option<String>,
    read_only: bool,
}

impl Node {
    fn of(properties: &Properties) -> Node {
        match properties.json() {
            Some(object) => Node::of_object(object),
            None => Node::of_object(&nested(properties)),
        }
    }

    fn of_object(object: &Map<String, Value>) -> Node {
        let text = |key: &str| options::member(object, key).and_then(options::as_text);
        let is_on = |key: &str| text(key).is_some_and(|value| options::is_yes(&value));
        let child = |key: &str| object.get(key).and_then(Value::as_object);
        let driver = text("driver").unwrap_or_default();
        let location = ["filename", "path", "uri", "url", "image", "device"].iter().find_map(|key| text(key));
        Node {
            location: location.or_else(|| text("server.path")).or_else(|| text("server.host")),
            name: text("node-name"),
            file_node: text("file"),
            file: child("file").map(|inner| Box::new(Node::of_object(inner))),
            backing: text("backing"),
            read_only: is_on("read-only"),
            driver,
        }
    }

    /// The image that this node is the top of.
    fn disk(&self, nodes: &[Node], is_backing: bool) -> Option<Disk> {
        let mut below = self;
        let mut read_only = self.read_only;
        // A graph that refers to itself is refused by QEMU; the bound keeps it from hanging us.
        let mut format = None;
        for _ in 0..DEEPEST {
            let next = match (&below.file, &below.file_node) {
                (Some(inner), _) => inner.as_ref(),
                (None, Some(name)) => nodes.iter().find(|node| node.name.as_deref() == Some(name))?,
                (None, None) => break,
            };
            // A filter has nothing of its own: the format is that of what it passes on.
            if format.is_none() && BlockDriver::of(&below.driver) != BlockDriver::Filter {
                format = Some(below.driver.clone());
            }
            below = next;
            read_only |= next.read_only;
        }
        let is_format = !std::ptr::eq(below, self);
        let holds = BlockDriver::of(&self.driver);
        if !is_format && matches!(holds, BlockDriver::Nothing | BlockDriver::Filter) {
            return None;
        }
        Some(Disk {
            path: PathBuf::from(below.location.clone().unwrap_or_default()),
            protocol: protocol(&below.driver),
            format: Some(format.unwrap_or_else(|| "raw".to_owned())),
            id: self.name.clone(),
            file_node: if is_format { below.name.clone() } else { None },
            read_only,
            is_backing,
            is_temporary: false,
            is_attached: true,
        })
    }
}

/// Dotted keys as nested objects, the way QEMU reads `-blockdev file.driver=…`.
pub(crate) fn nested(properties: &Properties) -> Map<String, Value> {
    let mut object = Map::new();
    for key in properties.keys() {
        let Some(value) = properties.get(&key) else { continue };
        let mut at = &mut object;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                at.insert(part.to_owned(), Value::String(value.clone()));
                break;
            }
            let inner = at.entry(part).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                // `file=x,file.driver=y` contradicts itself; QEMU refuses it, we only must not stumble.
                *inner = Value::Object(Map::new());
            }
            let Value::Object(map) = inner else { break };
            at = map;
        }
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(argv: &[&str]) -> Vec<Disk> {
        Spec::parse(&[&["q"], argv].concat()).unwrap().disks()
    }

    #[test]
    fn old_style_options() {
        let found =
            disks(&["-hda", "a.img", "-cdrom", "/iso/b.iso", "-drive", "if=ide,media=cdrom", "c.raw"]);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].path, Path::new("a.img"));
        assert!(found[1].read_only && !found[0].read_only);
        assert_eq!(found[2].format.as_deref(), Some("raw"));
    }

    #[test]
    fn commas_and_access_of_drives() {
        let found = disks(&[
            "-drive",
            "file=/d/a,,b.qcow2,format=qcow2,cache=none,id=d0,if=none",
            "-drive",
            "file=/d/c,cache=none,cache.direct=off,readonly",
            "-drive",
            "file.driver=file,file.filename=/d/e,file.cache.direct=on",
        ]);
        assert_eq!(found[0].path, Path::new("/d/a,b.qcow2"));
        assert!(found[1].read_only && !found[0].read_only);
        assert_eq!(found[0].id.as_deref(), Some("d0"));
    }

    #[test]
    fn an_image_whose_changes_go_elsewhere_is_not_written() {
        let written = |argv: &[&str]| disks(argv).iter().map(Disk::is_written).collect::<Vec<_>>();
        let drives = ["-drive", "file=/a,snapshot=on", "-drive", "file=/b,snapshot=off", "-drive", "file=/c"];
        let node = ["-hda", "/d", "-blockdev", "driver=file,filename=/e,node-name=e"];
        assert_eq!(written(&[&drives[..], &node].concat()), [false, true, true, true, true]);
        // Of all that do not say otherwise; nodes are not meant.
        let all = [&["-snapshot"], &drives[..], &node].concat();
        assert_eq!(written(&all), [false, true, false, false, true]);
    }

    #[test]
    fn protocols() {
        let found = disks(&[
            "-drive",
            "file=nbd+unix:///x?socket=/s",
            "-drive",
            "file=rbd:pool/image",
            "-drive",
            "file=file:/plain",
            "-drive",
            "file=fat:rw:/dir",
            "-drive",
            r#"file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"/j"}}"#,
            "-hda",
            "./with:colon",
        ]);
        let other = |name: &str| Protocol::Other(name.to_owned());
        assert_eq!(found[0].protocol, other("nbd"));
        assert_eq!(found[1].protocol, other("rbd"));
        assert_eq!(found[2].host_path(), Some(Path::new("/plain")));
        assert_eq!(found[3].protocol, other("vvfat"));
        assert_eq!(
            (found[4].host_path(), found[4].format.as_deref()),
            (Some(Path::new("/j")), Some("qcow2"))
        );
        assert_eq!(found[5].host_path(), Some(Path::new("./with:colon")));
    }

    #[test]
    fn block_graph_as_libvirt_writes_it() {
        let found = disks(&[
            "-blockdev",
            r#"{"driver":"file","filename":"/i/base.qcow2","node-name":"s2","auto-read-only":true,"discard":"unmap"}"#,
            "-blockdev",
            r#"{"node-name":"f2","read-only":true,"driver":"qcow2","file":"s2","backing":null}"#,
            "-blockdev",
            r#"{"driver":"file","filename":"/i/top.qcow2","node-name":"s1","cache":{"direct":true,"no-flush":false}}"#,
            "-blockdev",
            r#"{"node-name":"f1","read-only":false,"driver":"qcow2","file":"s1","backing":"f2"}"#,
            "-device",
            r#"{"driver":"virtio-blk-pci","drive":"f1","id":"virtio-disk0"}"#,
        ]);
        assert_eq!(found.len(), 2);
        assert!(found[0].is_backing && found[0].read_only);
        assert!(found[1].is_attached && !found[0].is_attached);
        assert_eq!(found[1].path, Path::new("/i/top.qcow2"));
        assert_eq!((found[1].id.as_deref(), found[1].file_node.as_deref()), (Some("f1"), Some("s1")));
    }

    #[test]
    fn a_filter_on_top_hides_neither_format_nor_path() {
        let node = r#"{"driver":"throttle","node-name":"t","throttle-group":"g","file":{"driver":"qcow2","node-name":"f","file":{"driver":"file","filename":"/i/t.qcow2","cache":{"direct":true}}}}"#;
        let found = disks(&["-blockdev", node, "-device", "scsi-hd,drive=t"]);
        assert_eq!(found[0].host_path(), Some(Path::new("/i/t.qcow2")));
        assert_eq!((found[0].format.as_deref(), found[0].id.as_deref()), (Some("qcow2"), Some("t")));
        // As QEMU tells it: without any other node to refer to.
        let told = from_file_name(&format!("json:{node}"), None);
        assert_eq!(
            (told.host_path(), told.format.as_deref()),
            (Some(Path::new("/i/t.qcow2")), Some("qcow2"))
        );
        let raw = disks(&[
            "-blockdev",
            r#"{"driver":"throttle","node-name":"t","file":{"driver":"file","filename":"/i/r"}}"#,
        ]);
        assert_eq!((raw[0].host_path(), raw[0].format.as_deref()), (Some(Path::new("/i/r")), Some("raw")));
    }

    #[test]
    fn block_graph_with_dotted_keys() {
        let found =
            disks(&["-blockdev", "qcow2,node-name=d,file.driver=file,file.filename=/x,file.cache.direct=on"]);
        assert_eq!(found[0].host_path(), Some(Path::new("/x")));
    }
}
