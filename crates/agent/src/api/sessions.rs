//! `/v1/sessions`, and what begins and steers one.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use session::report::Verification;
use session::{Goal, Progress};
use uuid::Uuid;

use super::history::of_history;
use super::refusal::{Body, InPath, Refusal, vm_name};
use super::state::Api;
use super::types::{BandwidthRequest, CheckReply, MigrateRequest, SessionRef, SessionView};
use super::vms::to_the_end;
use crate::error::AgentError;
use crate::history::HistoryError;

pub(super) async fn check(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<MigrateRequest>,
) -> Result<Json<CheckReply>, Refusal> {
    let name = vm_name(&name)?;
    let (vms, vm) = (api.vms.clone(), name.clone());
    let readiness = to_the_end(async move { vms.check(&vm, &request.to, &request.options).await }).await?;
    let session::Readiness { destination, findings, disks, warnings } = readiness;
    Ok(Json(CheckReply { vm: name.into(), destination, findings, disks, warnings }))
}

pub(super) async fn migrate(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<MigrateRequest>,
) -> Result<(StatusCode, Json<SessionRef>), Refusal> {
    begin(&api, &name, Goal::Migrate, request)
}

pub(super) async fn mirror(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<MigrateRequest>,
) -> Result<(StatusCode, Json<SessionRef>), Refusal> {
    begin(&api, &name, Goal::Mirror, request)
}

fn begin(
    api: &Api,
    name: &str,
    goal: Goal,
    request: MigrateRequest,
) -> Result<(StatusCode, Json<SessionRef>), Refusal> {
    let id = api.vms.migrate(&vm_name(name)?, goal, &request.to, request.options)?;
    Ok((StatusCode::ACCEPTED, Json(SessionRef { id })))
}

pub(super) async fn switch(
    State(api): State<Api>,
    InPath(name): InPath<String>,
) -> Result<(StatusCode, Json<SessionRef>), Refusal> {
    let id = api.vms.switch(&vm_name(&name)?).await?;
    Ok((StatusCode::ACCEPTED, Json(SessionRef { id })))
}

pub(super) async fn cancel(
    State(api): State<Api>,
    InPath(name): InPath<String>,
) -> Result<(StatusCode, Json<SessionRef>), Refusal> {
    let id = api.vms.cancel(&vm_name(&name)?).await?;
    Ok((StatusCode::ACCEPTED, Json(SessionRef { id })))
}

pub(super) async fn verify(
    State(api): State<Api>,
    InPath(name): InPath<String>,
) -> Result<Json<Verification>, Refusal> {
    Ok(Json(api.vms.verify(&vm_name(&name)?).await?))
}

pub(super) async fn bandwidth(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<BandwidthRequest>,
) -> Result<(StatusCode, Json<SessionRef>), Refusal> {
    let id =
        api.vms.bandwidth(&vm_name(&name)?, request.bandwidth, request.to.as_deref(), request.goal).await?;
    Ok((StatusCode::ACCEPTED, Json(SessionRef { id })))
}

pub(super) async fn list(State(api): State<Api>) -> Json<Vec<Progress>> {
    let sessions = api.vms.sessions();
    Json(sessions.iter().map(|active| active.session.progress().borrow().clone()).collect())
}

pub(super) async fn show(
    State(api): State<Api>,
    InPath(id): InPath<Uuid>,
) -> Result<Json<SessionView>, Refusal> {
    if let Some(active) = api.vms.session(id) {
        let progress = Box::new(active.session.progress().borrow().clone());
        return Ok(Json(SessionView::Active { progress }));
    }
    let report = Box::new(ended(&api, id).await?);
    Ok(Json(SessionView::Ended { report }))
}

/// The report of a session that is not under way any more.
pub(super) async fn ended(api: &Api, id: Uuid) -> Result<session::Report, AgentError> {
    match of_history(api, move |history| history.report(&id.to_string())).await {
        Err(AgentError::History(HistoryError::Unknown(_))) => Err(AgentError::UnknownSession(id)),
        other => other,
    }
}
