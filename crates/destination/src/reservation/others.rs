//! Images that other machines of this host have: what one of them writes no other opens in a format that can name files, and what one of
//! them opens is overwritten for no other.

use std::path::{Path, PathBuf};

use qemu::{Image, Spec};

use host::Host;
use host::Record;
use host::drives::same_file;
use host::images;
use ownership::{Ownership, VmName};

/// How many images may be based on each other.
pub(super) const LONGEST: usize = 64;

/// The other machine on this host that writes an image, or will.
pub(super) fn writer(host: &Host, name: &VmName, image: &Path) -> Option<VmName> {
    let written = |record: &Record, spec: &Spec| {
        let made = record.made.images.iter().map(|made| made.path.clone());
        images::written(spec).into_iter().chain(made).collect()
    };
    one_with(host, name, image, written)
}

/// The other machine on this host that has an image open, or will.
pub(super) fn user(host: &Host, name: &VmName, image: &Path) -> Option<VmName> {
    let used = |record: &Record, spec: &Spec| {
        let named: Vec<PathBuf> = images::of(spec).into_iter().map(|(path, _)| path).collect();
        let mut used: Vec<PathBuf> = record.made.images.iter().map(|made| made.path.clone()).collect();
        // Of one that runs QEMU has its locks on all of them.
        if matches!(record.ownership, Ownership::Incoming { .. }) {
            used.extend(named.iter().flat_map(|image| bases(image)));
        }
        used.extend(named);
        used
    };
    one_with(host, name, image, used)
}

fn one_with(
    host: &Host,
    name: &VmName,
    image: &Path,
    images: impl Fn(&Record, &Spec) -> Vec<PathBuf>,
) -> Option<VmName> {
    let has_it = |record: &Record| {
        let spec = Spec::parse(&record.argv);
        spec.is_ok_and(|spec| images(record, &spec).iter().any(|other| same_file(other, image)))
    };
    // What has left is kept locked, and is asked for in its own way.
    let stays = |record: &Record| !matches!(record.ownership, Ownership::HandedOver { .. });
    let others = host.journal.all().into_iter().filter(|record| record.name != *name && stays(record));
    others.into_iter().find(has_it).map(|record| record.name)
}

/// What an image is based on, as it says itself.
fn bases(image: &Path) -> Vec<PathBuf> {
    let mut bases: Vec<PathBuf> = Vec::new();
    while bases.len() < LONGEST {
        let path = bases.last().map_or(image, PathBuf::as_path);
        let Ok(Image::Qcow2(header)) = qemu::probe_format(path) else { break };
        let Some(backing) = header.backing else { break };
        bases.push(base_of(path, &backing));
    }
    bases
}

/// Where the base of an image is, which that may name from where it is itself.
pub(super) fn base_of(image: &Path, backing: &Path) -> PathBuf {
    let real = std::fs::canonicalize(image).ok();
    real.as_deref().and_then(Path::parent).unwrap_or(Path::new("/")).join(backing)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::reservation::chains::tests::qcow2;
    use host::Origin;
    use ownership::Standing;
    use testing::Hosts;

    #[tokio::test]
    async fn what_another_machine_writes_or_reads_is_known_by_whatever_path() {
        let hosts = Hosts::new().await;
        let place = hosts.directory.path();
        let at = |name: &str| place.join(name);
        for (image, backing) in
            [("disk", None), ("cd", None), ("base", None), ("top", Some("base")), ("thrown", None)]
        {
            qcow2(&at(image), backing);
        }
        std::os::unix::fs::symlink(at("disk"), at("link")).unwrap();
        let drive = |image: &str, more: &str| format!("file={},format=qcow2{more}", at(image).display());
        let argv = ["q", "-drive", &drive("disk", ""), "-drive", &drive("cd", ",read-only=on")];
        let more = ["-drive", &drive("top", ""), "-drive", &drive("thrown", ",snapshot=on")];
        let argv = argv.iter().copied().chain(more).map(str::to_owned).collect();
        let ownership = Ownership::Incoming { session: Uuid::nil(), from: "host-c".to_owned(), ready: false };
        let standing = Standing { ownership, ..Standing::own() };
        let [one, other] = ["web1", "web2"].map(|name| name.parse::<VmName>().unwrap());
        let record = Record { argv, ..Record::new(one.clone(), standing, Origin::Arrived) };
        hosts.b.journal.claim(record).unwrap();
        let known = |image: &str| {
            let [writer, user] = [writer, user].map(|of| of(&hosts.b, &other, &at(image)));
            assert!([&writer, &user].iter().all(|found| found.as_ref().is_none_or(|found| *found == one)));
            (writer.is_some(), user.is_some())
        };
        assert_eq!(known("disk"), (true, true));
        assert_eq!(known("link"), (true, true));
        assert_eq!(known("cd"), (false, true));
        assert_eq!(known("base"), (false, true));
        assert_eq!(known("thrown"), (false, true));
        assert_eq!(known("another"), (false, false));
        assert_eq!(writer(&hosts.b, &one, &at("disk")), None, "its own");
    }
}
