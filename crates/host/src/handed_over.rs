//! A mark in a QEMU that is about to be handed over and only stands.
//!
//! A QEMU that has migrated says so as long as it lives: a record that is older than that is seen not to be true. Of one whose devices were
//! saved alone it says `paused` and nothing more, so something is left in it: an object that nothing uses. It goes when the guest is let run
//! here again.

use qemu::{Qmp, QmpError};
use serde_json::json;
use uuid::Uuid;

/// What its id begins with; the session follows.
const MARK: &str = "vmirror-left-by-";
/// A kind of object that every QEMU has, and that does nothing by itself.
const KIND: &str = "throttle-group";

/// Marks it, before it is stopped.
///
/// # Errors
/// [`QmpError`]
pub async fn mark(qmp: &Qmp, session: Uuid) -> Result<(), QmpError> {
    let arguments = json!({ "qom-type": KIND, "id": format!("{MARK}{session}") });
    qmp.execute_raw("object-add", arguments).await.map(drop)
}

/// Whether it was marked, by whatever session.
///
/// # Errors
/// [`QmpError`]
pub async fn is_marked(qmp: &Qmp) -> Result<bool, QmpError> {
    Ok(!marks(qmp).await?.is_empty())
}

/// Takes every mark out of one that runs here.
///
/// # Errors
/// [`QmpError`]
pub async fn unmark(qmp: &Qmp) -> Result<(), QmpError> {
    for id in marks(qmp).await? {
        qmp.execute_raw("object-del", json!({ "id": id })).await?;
    }
    Ok(())
}

async fn marks(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    let objects = qmp.qom_list("/objects").await?;
    Ok(objects.into_iter().map(|object| object.name).filter(|id| id.starts_with(MARK)).collect())
}
