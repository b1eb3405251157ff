//! The guest's drives, and the nodes of QEMU's block graph.

use std::path::{Path, PathBuf};

use command_line::{BlockDriver, Protocol, from_file_name};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::connection::Qmp;
use super::error::QmpError;
use qapi::Command;

/// A drive of the guest that has a medium.
///
/// While a job's filter is on top of the image (see [`Qmp::mirror_disk`]), `node` and `format` are the filter's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// QEMU's name of the block back-end: the id of a `-drive`; empty for a node of `-blockdev`.
    pub device: String,
    /// The guest's device: its id, or its place in QEMU's object tree. None: no device uses the drive.
    pub qdev: Option<String>,
    /// The node that is attached to the guest's device; `#block…` where QEMU made the name up.
    pub node: String,
    /// The image file or block device; for another protocol the URL, as far as there is one.
    pub path: PathBuf,
    /// How the image is reached.
    pub protocol: Protocol,
    /// The image format, by QEMU's driver name: `raw`, `qcow2`, ….
    pub format: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes per cluster, for formats that have clusters.
    pub cluster_size: Option<u64>,
    /// The backing file that the image names, relative to nothing but QEMU's working directory.
    pub backing: Option<PathBuf>,
    /// The format of the backing file, where the image says it.
    pub backing_format: Option<String>,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
}

/// A node that QEMU reaches over NBD on a unix socket.
#[derive(Debug, Clone, Copy)]
pub struct NbdNode<'a> {
    /// The new node's name: letters, digits, `-`, `.` and `_`, a letter first, at most 31 in all.
    pub node: &'a str,
    /// Where the NBD server listens.
    pub socket: &'a Path,
    /// The name of the export.
    pub export: &'a str,
}

commands! {
    QueryBlock {} = "query-block" -> Vec<BlockBackend>;
    QueryFlatNodes { flat: bool } = "query-named-block-nodes" -> Vec<Node>;
    RemoveNode<'a> { node_name: &'a str } = "blockdev-del" -> Value;
}

#[derive(Deserialize)]
struct BlockBackend {
    device: String,
    qdev: Option<String>,
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    #[serde(rename = "node-name", default)]
    node_name: String,
    ro: bool,
    image: Image,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    filename: String,
    format: String,
    virtual_size: u64,
    cluster_size: Option<u64>,
    backing_filename: Option<String>,
    full_backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    /// What is behind it: of a filter, what it passes on.
    backing_image: Option<Box<Image>>,
}

impl Image {
    /// The image under the filters on top of it.
    fn without_filters(self) -> Image {
        let mut image = self;
        while BlockDriver::of(&image.format) == BlockDriver::Filter
            && let Some(below) = image.backing_image.take()
        {
            image = *below;
        }
        image
    }
}

#[derive(Deserialize)]
struct Node {
    #[serde(rename = "node-name", default)]
    name: String,
    #[serde(rename = "drv")]
    driver: String,
    file: String,
    cache: NodeCache,
}

#[derive(Deserialize)]
struct NodeCache {
    direct: bool,
}

/// A node of QEMU's block graph, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockNode {
    /// Its name; `#block…` where QEMU made it up.
    pub name: String,
    /// The name of its driver.
    pub driver: String,
    /// The file or block device that it opens, as QEMU was given it. None: it opens none of this host's by itself.
    pub path: Option<PathBuf>,
    /// Whether it bypasses the host's page cache: what it reads, devices write to guest memory.
    pub direct: bool,
}

impl From<Node> for BlockNode {
    fn from(node: Node) -> BlockNode {
        let local = BlockDriver::of(&node.driver) == BlockDriver::Local;
        // `cache.direct` means something to who opens files; the others pass it on, or not.
        BlockNode {
            path: local.then(|| from_file_name(&node.file, None).path),
            direct: local && node.cache.direct,
            name: node.name,
            driver: node.driver,
        }
    }
}

impl BlockBackend {
    fn drive(self) -> Option<Drive> {
        let Inserted { node_name, ro, image } = self.inserted?;
        let image = image.without_filters();
        let file = from_file_name(&image.filename, None);
        let backing = image.full_backing_filename.or(image.backing_filename);
        Some(Drive {
            device: self.device,
            qdev: self.qdev.filter(|qdev| !qdev.is_empty()),
            node: node_name,
            path: file.path,
            protocol: file.protocol,
            format: image.format,
            virtual_size: image.virtual_size,
            cluster_size: image.cluster_size,
            backing: backing.map(|name| from_file_name(&name, None).path),
            backing_format: image.backing_filename_format,
            read_only: ro,
        })
    }
}

impl Qmp {
    /// The guest's drives that have a medium, those of firmware and those without a device included.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn drives(&self) -> Result<Vec<Drive>, QmpError> {
        Ok(self.execute(QueryBlock {}).await?.into_iter().filter_map(BlockBackend::drive).collect())
    }

    /// The names of all nodes of the block graph, sorted. What they were before a mirror, they must be after it.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn node_names(&self) -> Result<Vec<String>, QmpError> {
        let nodes = self.block_nodes().await?;
        let mut names: Vec<String> = nodes.into_iter().map(|node| node.name).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// All nodes of the block graph, with those that no drive uses.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn block_nodes(&self) -> Result<Vec<BlockNode>, QmpError> {
        // Not flat, each node would come with all that is below it.
        Ok(self.execute(QueryFlatNodes { flat: true }).await?.into_iter().map(BlockNode::from).collect())
    }

    /// Adds a node for an NBD export, and connects to it at once. Discards are passed on; writes are not held back
    /// (there is no page cache on this side), and flushes reach the server.
    ///
    /// QEMU does nothing else while it waits for the server's greeting, the guest's I/O included (seen with 7.2 and 10.0).
    ///
    /// # Errors
    /// [`QmpError::Refused`] if the server cannot be reached, has no such export, or the node's name is taken or too
    /// long.
    pub async fn add_nbd_node(&self, nbd: &NbdNode<'_>) -> Result<(), QmpError> {
        let arguments = json!({
            "driver": "nbd",
            "node-name": nbd.node,
            "server": { "type": "unix", "path": nbd.socket },
            "export": nbd.export,
            "discard": "unmap",
            "cache": { "direct": false, "no-flush": false },
        });
        self.execute_raw("blockdev-add", arguments).await.map(drop)
    }

    /// Removes a node that was added by name. It is flushed and closed first; an error of that flush is not told. No
    /// error if there is no such node.
    ///
    /// QEMU does nothing else while it waits for the flush, the guest's I/O included: an NBD server that does not answer any
    /// more must have closed its connections before (seen with 7.2 and 10.0).
    ///
    /// # Errors
    /// [`QmpError::Refused`] if something still uses it: a device, a job, an export, a node on top of it.
    pub async fn remove_node(&self, node: &str) -> Result<(), QmpError> {
        match self.execute(RemoveNode { node_name: node }).await {
            // QEMU has no error class of its own for this.
            Err(QmpError::Refused { .. }) if !self.node_names().await?.iter().any(|name| name == node) => {
                Ok(())
            }
            answer => answer.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_are_read_from_what_qemu_says() {
        let answer = json!([
            { "device": "floppy0", "type": "unknown", "removable": true, "locked": false },
            {
                "device": "", "qdev": "/machine/peripheral/vd0/virtio-backend", "new": [],
                "inserted": { "node-name": "#block1", "ro": false, "drv": "qcow2", "image": {
                    "filename": "json:{\"driver\": \"qcow2\", \"file\": {\"driver\": \"file\", \"filename\": \"/i/a:b\"}}",
                    "format": "qcow2", "virtual-size": 1 << 30, "cluster-size": 65536,
                    "backing-filename": "base", "full-backing-filename": "/i/base",
                    "backing-filename-format": "raw", "dirty-flag": false } },
            },
            {
                "device": "d1", "inserted": { "ro": true, "image": {
                    "filename": "nbd+unix:///x?socket=/s", "format": "raw", "virtual-size": 512 } },
            },
        ]);
        let backends: Vec<BlockBackend> = serde_json::from_value(answer).unwrap();
        let drives: Vec<Drive> = backends.into_iter().filter_map(BlockBackend::drive).collect();
        assert_eq!(drives.len(), 2);
        assert_eq!(
            (drives[0].path.as_path(), drives[0].protocol.clone()),
            (Path::new("/i/a:b"), Protocol::File)
        );
        assert_eq!((drives[0].virtual_size, drives[0].cluster_size), (1 << 30, Some(65536)));
        assert_eq!(drives[0].backing.as_deref(), Some(Path::new("/i/base")));
        assert_eq!(drives[1].protocol, Protocol::Other("nbd".to_owned()));
        assert!(drives[1].read_only && drives[1].qdev.is_none());
    }

    #[test]
    fn a_drive_under_a_filter_is_what_the_filter_passes_on() {
        let answer = json!([{
            "device": "", "qdev": "scsi0",
            "inserted": { "node-name": "drive-scsi0", "ro": false, "drv": "throttle", "image": {
                "filename": "json:{\"driver\": \"throttle\", \"file\": {\"driver\": \"qcow2\"}}",
                "format": "throttle", "virtual-size": 1 << 20, "cluster-size": 65536,
                "backing-image": {
                    "filename": "/i/t.qcow2", "format": "qcow2", "virtual-size": 1 << 20, "cluster-size": 65536,
                    "backing-filename": "base", "full-backing-filename": "/i/base", "backing-filename-format": "raw",
                    "backing-image": { "filename": "/i/base", "format": "raw", "virtual-size": 1 << 20 } } } },
        }]);
        let mut backends: Vec<BlockBackend> = serde_json::from_value(answer).unwrap();
        let drive = backends.remove(0).drive().unwrap();
        assert_eq!((drive.node.as_str(), drive.path.as_path()), ("drive-scsi0", Path::new("/i/t.qcow2")));
        assert_eq!((drive.format.as_str(), drive.cluster_size), ("qcow2", Some(65536)));
        assert_eq!(drive.backing.as_deref(), Some(Path::new("/i/base")));
    }

    #[test]
    fn a_node_bypasses_the_page_cache_if_it_opens_a_file_so() {
        let node = |driver: &str, direct: bool| {
            let node = json!({ "node-name": "n", "drv": driver, "file": "file:/i/a", "ro": false,
                "cache": { "direct": direct, "no-flush": false, "writeback": true } });
            BlockNode::from(serde_json::from_value::<Node>(node).unwrap())
        };
        assert!(node("file", true).direct && node("host_device", true).direct && !node("file", false).direct);
        assert!(!node("qcow2", true).direct && !node("nbd", true).direct && !node("nvme", true).direct);
        assert_eq!(node("file", true).path.as_deref(), Some(Path::new("/i/a")));
        assert_eq!(node("qcow2", true).path, None);
    }
}
