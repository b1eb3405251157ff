//! What a machine's QEMU has to open here as another user than the agent.

use std::path::Path;

use qemu::User;
use qemu::spec::FilePurpose;
use qemu::spec::render::{Purpose, Rendering};

use super::Request;
use finding::Finding;
use host::Host;
use host::images;
use host::paths::Paths;

impl Request {
    /// Finds what that user could not open: it is told before anything is copied.
    pub(super) fn examine_user(&self, host: &Host, findings: &mut Vec<Finding>) {
        let Some(user) = host.allow.other_user() else { return };
        let Paths { own, .. } = Paths::of(host, &self.name);
        let mut out_of_reach: Vec<(&Path, &str)> = Vec::new();
        if !user.may_reach(&own) {
            out_of_reach.push((&host.run_dir, "go through"));
        }
        if !user.may_reach(&host.ram_dir.join("vmirror")) {
            out_of_reach.push((&host.ram_dir, "go through"));
        }
        findings.extend(out_of_reach.into_iter().map(|(path, what)| cannot(host, user, path, what)));
        let drives = self.spec.disks();
        let is_read = |path: &Path| {
            let mut of_it = drives.iter().filter(|disk| disk.path == path).peekable();
            of_it.peek().is_some() && of_it.all(|disk| disk.read_only || disk.is_backing)
        };
        for (path, ..) in images::of(&self.spec) {
            // What is made here, or was, is made that user's.
            let ours = !path.exists() || host.left.is_left_by(&self.name, &path);
            let (can, what) = match (ours, is_read(&path)) {
                (true, _) => (user.may_reach(&path), "reach"),
                (false, true) => (user.may_open(&path, false), "read"),
                (false, false) => (user.may_open(&path, true), "write"),
            };
            findings.extend((!can).then(|| cannot(host, user, &path, what)));
        }
        for file in self.spec.files() {
            let other = file.path.is_relative() || file.purpose == FilePurpose::Flash && file.writable;
            if !other && file.path.exists() && !user.may_open(&file.path, false) {
                findings.push(cannot(host, user, &file.path, "read"));
            }
        }
        let tun = Path::new("/dev/net/tun");
        if !self.spec.taps().is_empty() && tun.exists() && !user.may_open(tun, true) {
            findings.push(cannot(host, user, tun, "open"));
        }
        // Of a rehearsal also what it does not try.
        let permissions = host.allow.permissions();
        let how = Rendering { permissions: &permissions, directory: &own, purpose: Purpose::Machine };
        let made = self.spec.without_incoming().render(&how).map(|rendered| rendered.spec.files_made());
        let outputs = made.unwrap_or_default();
        for file in outputs.iter().filter(|file| !file.starts_with(&own) && !user.may_open(file, true)) {
            findings.push(cannot(host, user, file, "write"));
        }
    }
}

fn cannot(host: &Host, user: &User, path: &Path, what: &str) -> Finding {
    Finding::new(
        "user-permission",
        format!("user {user}, as whom {} runs QEMU, cannot {what} {}", host.name, path.display()),
        format!(
            "let it, by owner, group or mode there; or name another [allow] user in the configuration of {}",
            host.name
        ),
    )
}
