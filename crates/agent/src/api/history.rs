//! `/v1/history`: migrations that have ended.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use session::Report;

use super::refusal::{InPath, InQuery, Refusal};
use super::state::Api;
use super::types::HistoryEntry;
use super::vms::to_the_end;
use crate::error::AgentError;
use crate::history::{History, HistoryError, KEPT};

/// How many entries a list has when nobody says.
const USUAL: u32 = 100;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Of this machine only.
    vm: Option<String>,
    /// At most this many.
    limit: Option<u32>,
}

pub(super) async fn list(
    State(api): State<Api>,
    InQuery(wanted): InQuery<Wanted>,
) -> Result<Json<Vec<HistoryEntry>>, Refusal> {
    let limit = wanted.limit.unwrap_or(USUAL).min(KEPT);
    let entries = of_history(&api, move |history| history.list(wanted.vm.as_deref(), limit)).await?;
    Ok(Json(entries))
}

pub(super) async fn report(
    State(api): State<Api>,
    InPath(id): InPath<String>,
) -> Result<Json<Report>, Refusal> {
    Ok(Json(of_history(&api, move |history| history.report(&id)).await?))
}

/// Asks the history, on a thread that may wait for the disk.
pub(super) async fn of_history<T: Send + 'static>(
    api: &Api,
    question: impl FnOnce(History) -> Result<T, HistoryError> + Send + 'static,
) -> Result<T, AgentError> {
    let history = api.vms.history().clone();
    to_the_end(async move {
        let answer = tokio::task::spawn_blocking(move || question(history)).await;
        Ok(answer.map_err(|_| AgentError::ShuttingDown)??)
    })
    .await
}
