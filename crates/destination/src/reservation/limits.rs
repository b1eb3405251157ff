//! Limits of a machine that is to come: whether they can be kept here, and the cgroups that keep them.

use super::Request;
use cgroup::CgroupError;
use cgroup::make::Plan;
use finding::{Finding, chain};
use host::Host;
use host::Record;

impl Request {
    /// Why the machine's limits cannot be kept here, as far as that can be told without making anything.
    pub(super) fn examine_limits(&self, host: &Host) -> Option<Finding> {
        if self.limits.are_none() {
            return None;
        }
        let Some(parent) = &host.allow.cgroup else {
            return Some(Finding::new(
                "cgroup-not-allowed",
                format!("the VM has limits of CPU or memory, and {} allows no cgroup for such", host.name),
                format!(
                    "set [allow] cgroup in the configuration of {}, or take the limits off the VM",
                    host.name
                ),
            ));
        };
        Plan::new(self.limits, parent, self.name.as_ref()).err().map(|e| failed(host, &e))
    }

    /// Makes the cgroups that its limits need.
    pub(super) fn make_cgroups(&self, host: &Host, record: &mut Record) -> Result<(), Finding> {
        let Some(parent) = host.allow.cgroup.as_ref().filter(|_| !self.limits.are_none()) else {
            return Ok(());
        };
        let plan = Plan::new(self.limits, parent, self.name.as_ref()).map_err(|e| failed(host, &e))?;
        // On record before they exist: a crash in between leaves nothing that nobody knows of.
        let unrecorded = |e| Finding::new("journal", chain(&e), "see to the destination's state_dir");
        let directories = plan.directories();
        host.journal.amend(record, |now| now.made.cgroups = directories).map_err(unrecorded)?;
        plan.make().map_err(|e| failed(host, &e))
    }
}

pub(super) fn failed(host: &Host, error: &CgroupError) -> Finding {
    Finding::new("cgroup", format!("on {}: {}", host.name, chain(error)), error.hint())
}
