//! What can be told of a reservation without starting anything.

use std::path::{Component, Path, PathBuf};

use qemu::spec::{FilePurpose, ram_place};

use super::allowed::{allowed, creatable, outside};
use super::{Request, file_name, mib};
use crate::images::Planned;
use finding::Finding;
use host::Host;
use host::Record;
use host::firewall;
use host::images;
use host::paths;
use host::room;
use movable::compatibility::unmovable;
use ownership::{self, Effect, OnRecord as _, Why};

/// Where systemd mounts huge pages of the default size.
const USUAL_HUGE_PAGES: &str = "/dev/hugepages";

impl Request {
    /// Everything that can be told without starting anything.
    pub(super) async fn examine(
        &self,
        host: &Host,
        peer: &str,
    ) -> (Option<PathBuf>, Vec<Planned>, Vec<Finding>) {
        let mut findings = Vec::new();
        if peer == host.name {
            findings.push(Finding::new(
                "same-host",
                format!("{peer} is both source and destination"),
                "name another host's agent with --to",
            ));
            return (None, Vec::new(), findings);
        }
        if let Some(record) = host.journal.get(&self.name) {
            let effects = ownership::on(Some(&record.standing()), self.event(peer)).effects;
            findings.push(if effects == [Effect::Refuse(Why::CopyWaits)] {
                copy_waits(host, &record, peer)
            } else {
                name_taken(host, &record)
            });
        }
        findings.extend(paths::fits(host, &self.name).err().map(|e| {
            let hint = format!("adopt it under a shorter name, or give {} a shorter run_dir", host.name);
            Finding::new("name-too-long", format!("on {}: {e}", host.name), hint)
        }));
        let macs = || self.taps.iter().map(|tap| tap.mac.as_str());
        if let Some(other) = host.forwards.of(&self.name).filter(|forward| !forward.macs.iter().eq(macs())) {
            findings.push(Finding::new(
                "name-forwarded",
                format!(
                    "what comes on {} for another VM named {} is forwarded to {}",
                    host.name, self.name, other.to
                ),
                "end that with `vmirror release` there, or adopt this one under another name",
            ));
        }
        let binary = self.binary(host);
        if binary.is_none() {
            findings.push(Finding::new(
                "qemu-not-allowed",
                format!("{} allows no {}", host.name, file_name(self.spec.binary())),
                format!("add one to [allow] qemu in the configuration of {}", host.name),
            ));
        }
        self.examine_consistency(&mut findings);
        self.examine_arguments(host, &mut findings);
        let chains_at = findings.len();
        self.examine_user(host, &mut findings);
        self.examine_memory(host, &mut findings);
        self.examine_files(host, &mut findings);
        let planned = self.examine_disks(host, &mut findings);
        let chained = self.examine_chains(host, &findings);
        findings.splice(chains_at..chains_at, chained);
        self.examine_taps(host, &mut findings).await;
        findings.extend(firewall::examine(host, &self.nft));
        findings.extend(host.hooks.examine().map(|error| error.finding(&host.name)));
        findings.extend(self.examine_limits(host));
        (binary, planned, findings)
    }

    /// The allowed QEMU that comes nearest to the source's: the same path, else the same name.
    fn binary(&self, host: &Host) -> Option<PathBuf> {
        let wanted = self.spec.binary();
        let same_name = |allowed: &&PathBuf| file_name(allowed) == file_name(wanted);
        let allowed = &host.allow.qemu;
        allowed.iter().find(|path| *path == wanted).or_else(|| allowed.iter().find(same_name)).cloned()
    }

    /// What the source lists must be what the command line has: it is the command line that is run.
    fn examine_consistency(&self, findings: &mut Vec<Finding>) {
        findings.extend(unmovable(&self.spec, self.accept_disconnect));
        let listed = |path: &Path| self.disks.iter().any(|disk| Path::new(&disk.path) == path);
        for (path, ..) in images::of(&self.spec) {
            if !listed(&path) {
                let message = format!("disk {} is on the command line and was not announced", path.display());
                findings.push(Finding::new(
                    "protocol",
                    message,
                    "see whether both agents are of the same version",
                ));
            }
        }
        for nic in self.spec.nics() {
            let is_tap = matches!(nic.kind, qemu::NicKind::Tap { .. } | qemu::NicKind::Bridge { .. });
            if is_tap && !self.taps.iter().any(|tap| tap.netdev == nic.netdev) {
                let message = format!("network {} is on the command line and was not announced", nic.netdev);
                findings.push(Finding::new(
                    "protocol",
                    message,
                    "see whether both agents are of the same version",
                ));
            }
        }
    }

    fn examine_memory(&self, host: &Host, findings: &mut Vec<Finding>) {
        let (in_use, limit) = (room::in_use(host), host.allow.max_memory);
        if in_use.saturating_add(self.memory) > limit {
            findings.push(Finding::new(
                "memory-limit",
                format!(
                    "the VM has {} of RAM; {} allows {}, of which {} are taken",
                    mib(self.memory),
                    host.name,
                    mib(limit),
                    mib(in_use)
                ),
                format!("raise [allow] max_memory in the configuration of {}", host.name),
            ));
        }
        let bytes =
            |pages: &std::ops::Range<u64>| (pages.end - pages.start) * mirror::layout::PAGE_SIZE as u64;
        let demand = |block: &mirror::layout::Block| {
            let directory = self.huge_directory(host, &block.id).unwrap_or_else(|| host.ram_dir.clone());
            (directory, bytes(&block.pages))
        };
        let demands: Vec<room::Demand> = self.layout.blocks().iter().map(demand).collect();
        for short in room::shortages(host, &demands) {
            findings.push(Finding::new("no-room", short.to_string(), short.hint()));
        }
    }

    /// Where RAM in huge pages goes here: to `ram_dir` if that has pages of their size, else to the directory where the
    /// source has it. None where neither has. RAM without a path, a memfd's, could be where systemd mounts them.
    fn huge_directory(&self, host: &Host, id: &str) -> Option<PathBuf> {
        let (_, page_size) = self.huge.iter().find(|(huge, _)| huge == id)?;
        let backend = self.spec.ram_backends().into_iter().find(|backend| backend.id == id)?;
        let path = backend.mem_path.unwrap_or_else(|| USUAL_HUGE_PAGES.into());
        [Some(host.ram_dir.as_path()), Some(&path), ram_place(&path)]
            .into_iter()
            .flatten()
            .find(|directory| directory.is_dir() && qemu::huge_page_size(directory) == Some(*page_size))
            .map(Path::to_owned)
    }

    /// [`Request::huge_directory`] of every block that needs one.
    pub(super) fn huge_directories(
        &self,
        host: &Host,
        findings: &mut Vec<Finding>,
    ) -> Vec<(String, PathBuf)> {
        let mut directories = Vec::new();
        for (id, page_size) in &self.huge {
            if let Some(directory) = self.huge_directory(host, id) {
                directories.push((id.clone(), directory));
                continue;
            }
            let source = self.spec.ram_backends().into_iter().find(|backend| backend.id == *id);
            let source =
                source.and_then(|backend| backend.mem_path).unwrap_or_else(|| USUAL_HUGE_PAGES.into());
            findings.push(Finding::new(
                "huge-pages",
                format!(
                    "RAM block {id} has huge pages of {} KiB; on {} neither {} nor the directory of {} has such",
                    page_size >> 10,
                    host.name,
                    host.ram_dir.display(),
                    source.display()
                ),
                "mount a hugetlbfs there, under the same path as at the source or as ram_dir, with pages enough",
            ));
        }
        directories
    }

    fn examine_files(&self, host: &Host, findings: &mut Vec<Finding>) {
        for file in self.spec.files() {
            // Flash that can be written is among the disks.
            if file.purpose == FilePurpose::Flash && file.writable {
                continue;
            }
            // A bare name of firmware is looked up among QEMU's own files.
            let own = matches!(file.purpose, FilePurpose::Firmware | FilePurpose::Rom);
            if own && matches!(file.path.components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
                continue;
            }
            let is_listed = self.boot_files.iter().any(|listed| Path::new(&listed.path) == file.path);
            // It is shipped.
            if is_listed && !file.path.exists() && creatable(host, &file.path).is_ok() {
                continue;
            }
            if !file.path.exists() {
                findings.push(Finding::new(
                    "file-missing",
                    format!("{} does not exist on {}", file.path.display(), host.name),
                    "copy it there, under the same path",
                ));
            } else if !allowed(host, &file.path) {
                findings.push(outside(host, &file.path));
            }
        }
    }
}

fn name_taken(host: &Host, record: &Record) -> Finding {
    Finding::new(
        "name-taken",
        format!("{} already has a VM named {}", host.name, record.name),
        "stop that VM, or adopt this one under another name",
    )
}

fn copy_waits(host: &Host, record: &Record, peer: &str) -> Finding {
    let name = &record.name;
    Finding::new(
        "copy-waits",
        format!(
            "{} has a complete copy of VM {name} from {peer}, which may be all that there is of it: {peer} has it not on record as one that it has abandoned",
            host.name
        ),
        format!(
            "see which of the two is wanted; where it is the one on {peer}, `vmirror resolve {name} --give-up` on {}",
            host.name
        ),
    )
}
