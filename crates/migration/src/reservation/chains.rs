//! Images that name other files in themselves: QEMU opens those too.
//!
//! Who sends a machine may have sent what is in an image here, byte for byte, with an earlier one.

use std::path::{Path, PathBuf};

use qemu::Image;
use qemu::spec::FilePurpose;

use super::{Request, disks};
use crate::failure::{Finding, chain};
use crate::host::Host;

/// How many images may be based on each other.
const LONGEST: usize = 64;

impl Request {
    /// Follows every image that is there to whatever it is based on.
    pub(super) fn examine_chains(&self, host: &Host, findings: &mut Vec<Finding>) {
        let drives = self.spec.disks().into_iter().filter_map(|disk| {
            let path = disk.host_path()?.to_owned();
            Some((path, disk.format))
        });
        let flash = self.spec.files().into_iter().filter(|file| file.purpose == FilePurpose::Flash);
        let images: Vec<(PathBuf, Option<String>)> =
            drives.chain(flash.map(|file| (file.path, None))).filter(|(path, _)| path.exists()).collect();
        findings.extend(images.into_iter().filter_map(|(image, format)| follow(host, &image, format).err()));
    }
}

fn follow(host: &Host, image: &Path, format: Option<String>) -> Result<(), Finding> {
    let (mut path, mut format) = (image.to_owned(), format);
    for _ in 0..LONGEST {
        // What is opened as raw names nothing, whatever is in it.
        if format.as_deref() == Some("raw") {
            return Ok(());
        }
        let found = match qemu::probe_format(&path) {
            Ok(found) => found,
            // That one cannot be read, or is broken, is told by who has to do with it.
            Err(e) if path == image => {
                tracing::debug!(image = %path.display(), error = chain(&e), "cannot be looked into");
                return Ok(());
            }
            Err(e) => {
                let message = format!("{} is based on {}: {}", image.display(), path.display(), chain(&e));
                return Err(Finding::new("disk-unreadable", message, "let the agent use it"));
            }
        };
        let header = match found {
            Image::Raw { .. } => return Ok(()),
            Image::Qcow2(header) => header,
            Image::Other { format } if host.allow.disk_drivers.iter().any(|driver| driver == format) => {
                return Ok(());
            }
            Image::Other { format } => {
                return Err(Finding::new(
                    "argument-not-allowed",
                    format!(
                        "{} on {} is of format {format}, which may name other files in itself",
                        path.display(),
                        host.name
                    ),
                    format!("add {format:?} to [allow] disk_drivers in the configuration of {}", host.name),
                ));
            }
        };
        if header.external_data {
            return Err(Finding::new(
                "path-not-allowed",
                format!(
                    "the data of {} on {} are in another file, which it names itself",
                    path.display(),
                    host.name
                ),
                "use an image that has its data in it",
            ));
        }
        let Some(backing) = header.backing else { return Ok(()) };
        let directory = std::fs::canonicalize(&path).ok();
        let base = directory.as_deref().and_then(Path::parent).unwrap_or(Path::new("/")).join(&backing);
        let named = backing.to_string_lossy();
        let is_protocol = named.find([':', '/']).is_some_and(|at| named.as_bytes()[at] == b':');
        if is_protocol || !disks::allowed(host, &base) {
            let base = if is_protocol { backing } else { base };
            return Err(Finding::new(
                "path-not-allowed",
                format!(
                    "{} on {} is based on {}, which is in none of the directories that {} allows",
                    path.display(),
                    host.name,
                    base.display(),
                    host.name
                ),
                format!("add its directory to [allow] disk_dirs in the configuration of {}", host.name),
            ));
        }
        (path, format) = (base, header.backing_format);
    }
    Err(Finding::new(
        "path-not-allowed",
        format!("{} on {} is based on more than {LONGEST} images", image.display(), host.name),
        "merge some of them (qemu-img commit)",
    ))
}
