//! `/v1/vms`: the machines of this host.

use std::future::Future;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use migration::release::Released;

use super::refusal::{Body, InPath, Refusal, vm_name};
use super::state::Api;
use super::types::{
    AdoptRequest, ForgetImagesReply, ForgetImagesRequest, ReleaseReply, ReleaseRequest, ResolveReply,
    ResolveRequest, RunRequest, StopRequest, VmView,
};
use crate::error::AgentError;

pub(super) async fn list(State(api): State<Api>) -> Json<Vec<VmView>> {
    Json(api.vms.views().await)
}

pub(super) async fn show(
    State(api): State<Api>,
    InPath(name): InPath<String>,
) -> Result<Json<VmView>, Refusal> {
    Ok(Json(api.vms.view(&vm_name(&name)?).await?))
}

pub(super) async fn run(
    State(api): State<Api>,
    Body(request): Body<RunRequest>,
) -> Result<(StatusCode, Json<VmView>), Refusal> {
    let vms = api.vms.clone();
    let name = request.name.clone();
    let RunRequest { name: asked, argv, directory, stale_disks } = request;
    to_the_end(async move { vms.run(asked, &argv, &directory, stale_disks).await }).await?;
    Ok((StatusCode::CREATED, Json(api.vms.view(&name).await?)))
}

pub(super) async fn adopt(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<AdoptRequest>,
) -> Result<(StatusCode, Json<VmView>), Refusal> {
    let name = vm_name(&name)?;
    if request.qmp.is_relative() {
        let message = format!("{} is not an absolute path", request.qmp.display());
        return Err(AgentError::BadRequest(message).into());
    }
    let (vms, adopted) = (api.vms.clone(), name.clone());
    to_the_end(async move { vms.adopt(adopted, &request.qmp).await }).await?;
    Ok((StatusCode::CREATED, Json(api.vms.view(&name).await?)))
}

pub(super) async fn stop(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<StopRequest>,
) -> Result<StatusCode, Refusal> {
    let name = vm_name(&name)?;
    to_the_end(async move { api.vms.stop(&name, request.force).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn release(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<ReleaseRequest>,
) -> Result<Json<ReleaseReply>, Refusal> {
    let name = vm_name(&name)?;
    let vm = name.to_string();
    let released = to_the_end(async move { api.vms.release(&name, request.force).await }).await?;
    let untold = match released {
        Released::Whole => None,
        Released::Here(other) => Some(other),
    };
    Ok(Json(ReleaseReply { vm, untold }))
}

pub(super) async fn resolve(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<ResolveRequest>,
) -> Result<Json<ResolveReply>, Refusal> {
    let name = vm_name(&name)?;
    let vm = name.to_string();
    let resolved = async move { api.vms.resolve(&name, request.decision, request.force).await };
    let images = to_the_end(resolved).await?;
    Ok(Json(ResolveReply { vm, images }))
}

pub(super) async fn forget(
    State(api): State<Api>,
    InPath(name): InPath<String>,
) -> Result<StatusCode, Refusal> {
    let name = vm_name(&name)?;
    to_the_end(async move { api.vms.forget(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn forget_images(
    State(api): State<Api>,
    InPath(name): InPath<String>,
    Body(request): Body<Option<ForgetImagesRequest>>,
) -> Result<Json<ForgetImagesReply>, Refusal> {
    let name = vm_name(&name)?;
    let vm = name.to_string();
    // Earlier versions say nothing more.
    let ForgetImagesRequest { force } = request.unwrap_or_default();
    let images = to_the_end(async move { api.vms.forget_images(&name, force).await }).await?;
    Ok(Json(ForgetImagesReply { vm, images }))
}

/// Does something to its end even if the client that asked for it goes away.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, AgentError>> + Send + 'static,
) -> Result<T, AgentError> {
    match tokio::spawn(work).await {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(AgentError::ShuttingDown),
        },
    }
}
