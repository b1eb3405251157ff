//! Taking out of a QEMU, and off this host, what its disks' mirrors have put there.

use std::path::{Path, PathBuf};

use mirror::storage::layout::MAX_DISKS;
use qemu::{Qmp, QmpError};

use super::super::resume::resume_here;
use super::super::stop::Stop;
use super::{NAME, NOT_RESUMED, Places, place};
use host::Host;
use host::paths::{self, Paths};
use ownership::VmName;

/// Whether there are jobs of ours, for whose end the guest is stopped: to be on record before.
pub(crate) async fn has_jobs(qmp: &Qmp) -> bool {
    // Where nobody can say, as if there were.
    qmp.block_jobs().await.map_or(true, |jobs| jobs.iter().any(|job| job.id.starts_with(NAME)))
}

/// What could not be taken out of a QEMU's block graph.
pub(crate) enum Uncleared {
    /// Something of ours is there.
    There(QmpError),
    /// The guest was stopped for it, and could not be resumed.
    Stopped(QmpError),
}

impl Uncleared {
    /// For the report.
    pub(in crate::source) fn stop(self) -> Stop {
        match self {
            Uncleared::There(e) => Stop::qemu(e),
            Uncleared::Stopped(e) => Stop::because(NOT_RESUMED, &e, "see the VM's log on the source"),
        }
    }
}

/// Takes everything of ours out of a QEMU's block graph: jobs, exports and their server, targets. Nothing of the user's is touched. The
/// guest stands still while jobs are given up: where there [are](has_jobs), the machine's record must say so before.
pub(crate) async fn clear(qmp: &Qmp, read: &Path) -> Result<(), Uncleared> {
    let (qmp, read) = (qmp.clone(), read.to_owned());
    // By itself: whoever asked for it may not wait for it, and the guest must not be left stopped.
    let cleared = tokio::spawn(async move { clear_now(&qmp, &read).await });
    cleared.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
}

async fn clear_now(qmp: &Qmp, read: &Path) -> Result<(), Uncleared> {
    let ours = |name: &str| name.starts_with(NAME);
    let mut jobs = qmp.block_jobs().await.map_err(Uncleared::There)?;
    jobs.retain(|job| ours(&job.id));
    if !jobs.is_empty() {
        let runs = qmp.status().await.map_err(Uncleared::There)?.running;
        let given_up = async {
            if runs {
                qmp.stop().await?;
            }
            for job in &jobs {
                qmp.end_mirror(&job.id, true).await?;
            }
            Ok(())
        };
        let given_up: Result<(), QmpError> = given_up.await;
        if runs {
            // Also where it was not seen to stop: that may have come later.
            resume_here(qmp, false).await.map_err(Uncleared::Stopped)?;
        }
        given_up.map_err(Uncleared::There)?;
    }
    let rest = async {
        for export in qmp.exports().await?.into_iter().filter(|export| ours(export)) {
            qmp.end_export(read, &export).await?;
        }
        qmp.end_nbd_server(read).await?;
        for node in qmp.node_names().await?.into_iter().filter(|node| ours(node)) {
            qmp.remove_node(&node).await?;
        }
        Ok(())
    };
    rest.await.map_err(Uncleared::There)
}

/// Takes out of a machine's QEMU, and off this host, what a mirror has left that ended with its agent: copy jobs, and sockets.
pub(crate) async fn clear_after(host: &Host, name: &VmName, qmp: &Qmp) -> Result<(), Uncleared> {
    let (directory, private) = (Paths::of(host, name).own, host.run_dir.clone());
    let places = Places { directory, private, machine: name.to_string(), binary: PathBuf::new() };
    clear(qmp, &places.read()).await?;
    let _ = std::fs::remove_file(places.read());
    let _ = std::fs::remove_file(Paths::of(host, name).device);
    let _ = std::fs::remove_dir_all(places.storage());
    for disk in 0..MAX_DISKS {
        let _ = std::fs::remove_file(place(&places, disk).0);
    }
    paths::part(host, name);
    Ok(())
}
