//! Machines that have left, and whose images are kept locked here.

use std::path::PathBuf;
use std::time::Duration;

use finding::Finding;
use host::Origin;
use host::fence::{KeptImage, Left, Seen};
use ownership::{Ownership, VmName};

use super::{Entry, Vms};
use crate::api::types::{EventKind, KeptImageView, KeptView, ReleaseReason, VmState, VmView};
use crate::error::AgentError;
use crate::findings;

/// How often it is looked whether the images are as they should be.
const LOOK: Duration = Duration::from_secs(3);

impl Vms {
    /// Keeps the images of machines that have left as they should be, for ever.
    pub(super) async fn keep_images(&self) {
        loop {
            for seen in self.host().fence.look().await {
                match seen {
                    Seen::Removed(vm, image) => {
                        tracing::info!(%vm, image = %image.display(), "was removed, and is not kept any more");
                        self.tell(&vm, EventKind::ImageReleased { image, reason: ReleaseReason::Removed });
                    }
                    Seen::Problem(vm, image, problem) => {
                        tracing::error!(%vm, image = %image.display(), "an image that was to be kept locked {problem}");
                        self.tell(&vm, EventKind::ImageNotKept { image, problem });
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Images of a machine that has left are not kept any more. Returns which they were.
    ///
    /// # Errors
    /// When there are none, or the machine is not known to have left for good; without `force` also when something may start it here
    /// again, or its record cannot be read.
    pub async fn forget_images(&self, name: &VmName, force: bool) -> Result<Vec<PathBuf>, AgentError> {
        self.open()?;
        let unreadable = match self.entries().get(name) {
            Some(Entry::Unreadable(why)) => Some(findings::unless_forced(why)),
            _ => None,
        };
        let second = self.inner.again.all().remove(name).or_else(|| self.host().left.starter_of(name));
        let second = second.filter(|_| self.host().fence.left().iter().any(|left| left.vm == *name));
        let against = unreadable.or_else(|| second.map(|found| findings::started_by(name, &found)));
        if let Some(why) = against.filter(|_| !force) {
            return Err(AgentError::Refused(why));
        }
        match self.host().journal.get(name).map(|record| record.ownership) {
            Some(Ownership::HandedOver { to, .. }) => {
                return Err(AgentError::Refused(Finding::new(
                    "not-settled",
                    format!(
                        "{name} was handed over to {to}, and it is not known whether it runs there: its images are kept"
                    ),
                    "wait until that is settled, or see `vmirror resolve`",
                )));
            }
            Some(Ownership::Incoming { from, .. }) => {
                return Err(AgentError::Refused(Finding::new(
                    "comes-back",
                    format!("{name} is on its way here from {from}, to the very images"),
                    "wait for the end of that, or cancel it there",
                )));
            }
            Some(Ownership::Owner) | None => {}
        }
        let images = self.host().fence.forget(name).await;
        if images.is_empty() {
            return Err(AgentError::Refused(Finding::new(
                "nothing-kept",
                format!("no image of {name} is kept locked here"),
                "see `vmirror list` for those that are",
            )));
        }
        for image in &images {
            tracing::warn!(vm = %name, image = %image.display(), "is not kept locked any more, as a person says");
            let image = image.clone();
            self.tell(name, EventKind::ImageReleased { image, reason: ReleaseReason::Forgotten });
        }
        Ok(images)
    }

    /// With what is kept of its images here.
    pub(super) fn with_kept(&self, views: Vec<VmView>) -> Vec<VmView> {
        let mut views = views;
        for left in self.host().fence.left() {
            let kept = Some(kept(&left));
            match views.iter_mut().find(|view| view.name == left.vm.as_ref()) {
                Some(view) => view.kept = kept,
                None => views.push(VmView { kept, ..view(&left.vm) }),
            }
        }
        for (name, why) in self.inner.again.all() {
            let problem = Some(why);
            match views.iter_mut().find(|view| view.name == name.as_ref()) {
                Some(view) => view.problem = problem,
                None => views.push(VmView { problem, ..view(&name) }),
            }
        }
        views
    }

    /// A machine that has left.
    pub(super) fn left(&self, name: &VmName) -> Option<VmView> {
        let left = self.host().fence.left().into_iter().find(|left| left.vm == *name);
        let problem = self.inner.again.all().remove(name);
        if left.is_none() && problem.is_none() {
            return None;
        }
        Some(VmView { kept: left.as_ref().map(kept), problem, ..view(name) })
    }
}

fn kept(left: &Left) -> KeptView {
    let image =
        |image: &KeptImage| KeptImageView { path: image.path.clone(), problem: image.problem.clone() };
    KeptView {
        to: left.to.clone(),
        since_unix_ms: crate::events::unix_ms_of(left.at),
        images: left.images.iter().map(image).collect(),
    }
}

fn view(name: &VmName) -> VmView {
    VmView {
        name: name.to_string(),
        state: VmState::Left,
        qemu_status: None,
        origin: Origin::Arrived,
        generation: 0,
        pid: None,
        memory: 0,
        qmp_socket: PathBuf::new(),
        argv: Vec::new(),
        files: Vec::new(),
        log: None,
        taps: Vec::new(),
        session: None,
        doubt: None,
        problem: None,
        warnings: Vec::new(),
        forward: None,
        network_of: None,
        kept: None,
    }
}
