//! Images that name other files in themselves: QEMU opens those too.
//!
//! Who sends a machine may have sent what is in an image here, byte for byte, with an earlier one.

use std::path::Path;

use qemu::Image;
use qemu::spec::{BlockDriver, FilePurpose};

use super::Request;
use super::allowed::allowed;
use super::others::{self, LONGEST, base_of};
use finding::{Finding, chain};
use host::Host;
use ownership::VmName;

impl Request {
    /// Follows every image that is there to whatever it is based on. What is said of one already is not said twice.
    pub(super) fn examine_chains(&self, host: &Host, said: &[Finding]) -> Vec<Finding> {
        let drives = self.spec.disks().into_iter().filter_map(|disk| {
            let path = disk.host_path()?.to_owned();
            Some((path, disk.format))
        });
        let flash = self.spec.files().into_iter().filter(|file| file.purpose == FilePurpose::Flash);
        let images = drives.chain(flash.map(|file| (file.path, None))).filter(|(path, _)| path.exists());
        let followed = images.filter_map(|(image, format)| {
            let finding = follow(host, &self.name, &image, format).err()?;
            let begins = format!("{} on ", image.display());
            let same = |other: &Finding| other.kind == finding.kind && other.message.starts_with(&begins);
            (!said.iter().any(same)).then_some(finding)
        });
        followed.collect()
    }
}

fn follow(host: &Host, name: &VmName, image: &Path, format: Option<String>) -> Result<(), Finding> {
    let (mut path, mut format) = (image.to_owned(), format);
    for _ in 0..LONGEST {
        // What is opened as raw, or without a format, names nothing, whatever is in it.
        let stated = format.as_deref().map(|stated| (stated, BlockDriver::of(stated)));
        if matches!(stated, Some(("raw", _) | (_, BlockDriver::Local))) {
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
        // What is there now says nothing of what is when QEMU opens it.
        if let Some(writer) = others::writer(host, name, &path) {
            return Err(Finding::new(
                "disk-in-use",
                format!("{} on {} is written by VM {writer} there", path.display(), host.name),
                "give each VM an image of its own; one that several are to write must be raw, and be said to be",
            ));
        }
        let may_be_any = |format: &str| host.allow.disk_drivers.iter().any(|driver| driver == format);
        // A filter passes on whatever is below it.
        let stated = stated.filter(|(_, driver)| *driver != BlockDriver::Filter).map(|(stated, _)| stated);
        if let Some(stated) = stated.filter(|stated| *stated != found.format() && !may_be_any(stated)) {
            return Err(Finding::new(
                "disk-format",
                format!(
                    "{} on {} is of format {}, and would be opened as {stated}",
                    path.display(),
                    host.name,
                    found.format()
                ),
                "start the VM with the format that it has; or have another image there",
            ));
        }
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
        let base = base_of(&path, &backing);
        let named = backing.to_string_lossy();
        let is_protocol = named.find([':', '/']).is_some_and(|at| named.as_bytes()[at] == b':');
        if is_protocol || !allowed(host, &base) {
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use host::{Origin, Record};
    use ownership::Standing;
    use testing::Hosts;

    /// Makes an image that is based on this.
    pub(in crate::reservation) fn qcow2(path: &Path, backing: Option<&str>) {
        let mut image = vec![0; 65536];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        image[20..24].copy_from_slice(&16_u32.to_be_bytes());
        image[24..32].copy_from_slice(&(1_u64 << 20).to_be_bytes());
        if let Some(backing) = backing {
            image[8..16].copy_from_slice(&512_u64.to_be_bytes());
            image[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
            image[512..512 + backing.len()].copy_from_slice(backing.as_bytes());
        }
        std::fs::write(path, image).unwrap();
    }

    /// What is said of an image with this format on the command line.
    fn followed(host: &Host, image: &Path, format: Option<&str>) -> Option<&'static str> {
        let name = "web2".parse().unwrap();
        let kinds = ["disk-format", "disk-in-use", "path-not-allowed", "argument-not-allowed"];
        let kind = follow(host, &name, image, format.map(str::to_owned)).err()?.kind;
        Some(kinds.into_iter().find(|known| *known == kind).unwrap_or_else(|| panic!("{kind}")))
    }

    #[tokio::test]
    async fn an_image_that_may_yet_come_to_name_other_files_is_not_opened() {
        let mut hosts = Hosts::new().await;
        let place = hosts.directory.path().to_owned();
        let host = &mut hosts.b.host;
        host.allow.disk_dirs = vec![place.clone()];
        let [raw, top, base] = ["raw", "top", "base"].map(|name| place.join(name));
        std::fs::write(&raw, [0; 4096]).unwrap();
        qcow2(&base, None);
        qcow2(&top, Some("base"));
        for (image, format) in [(&raw, None), (&raw, Some("raw")), (&top, None), (&top, Some("qcow2"))] {
            assert_eq!(followed(host, image, format), None, "{image:?} {format:?}");
        }
        for format in ["file", "host_device", "host_cdrom", "copy-on-read", "throttle"] {
            assert_eq!(followed(host, &raw, Some(format)), None, "{format}");
        }
        assert_eq!(followed(host, &top, Some("host_device")), None, "it is not opened as what it is");
        let elsewhere = place.join("elsewhere");
        qcow2(&elsewhere, Some("/elsewhere/base"));
        assert_eq!(followed(host, &elsewhere, Some("throttle")), Some("path-not-allowed"));
        assert_eq!(followed(host, &raw, Some("qcow2")), Some("disk-format"));
        assert_eq!(followed(host, &top, Some("luks")), Some("disk-format"));
        // An operator has said that it may be whatever it is.
        host.allow.disk_drivers = vec!["vpc".to_owned()];
        assert_eq!(followed(host, &raw, Some("vpc")), None);

        for written in [&raw, &base] {
            let argv = ["q", "-drive", &format!("file={},format=raw", written.display())];
            let argv = argv.map(str::to_owned).to_vec();
            let of = Record::new("web1".parse().unwrap(), Standing::own(), Origin::Run);
            host.journal.claim(Record { argv, ..of }).unwrap();
            let through = if written == &raw { &raw } else { &top };
            assert_eq!(followed(host, through, None), Some("disk-in-use"), "{written:?}");
            assert_eq!(followed(host, written, Some("raw")), None, "it names nothing, whatever is in it");
            host.journal.remove(&"web1".parse().unwrap(), None).unwrap();
        }
    }
}
