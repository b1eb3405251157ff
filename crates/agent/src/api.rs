//! The agent's API: HTTP and JSON with server-sent events on a unix socket. `docs/api.md` describes it.
//!
//! Handlers translate; what they do is done by [`Vms`](crate::vms::Vms). Work that changes a machine runs in a
//! task of its own, so that a client that goes away does not leave it half done.

mod history;
mod refusal;
mod sessions;
mod state;
mod streams;
pub mod types;
mod vms;

use axum::Router;
use axum::routing::{get, post};

use crate::api::types::AgentInfo;
pub(crate) use state::Api;

/// Largest request body, in bytes: a command line of the length that Linux allows, in JSON.
const LARGEST_REQUEST: usize = 4 << 20;

/// All routes.
pub(crate) fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/agent", get(agent))
        .route("/v1/vms", get(vms::list).post(vms::run))
        .route("/v1/vms/{name}", get(vms::show))
        .route("/v1/vms/{name}/adopt", post(vms::adopt))
        .route("/v1/vms/{name}/stop", post(vms::stop))
        .route("/v1/vms/{name}/release", post(vms::release))
        .route("/v1/vms/{name}/resolve", post(vms::resolve))
        .route("/v1/vms/{name}/forget", post(vms::forget))
        .route("/v1/vms/{name}/forget-images", post(vms::forget_images))
        .route("/v1/vms/{name}/check", post(sessions::check))
        .route("/v1/vms/{name}/migrate", post(sessions::migrate))
        .route("/v1/vms/{name}/mirror", post(sessions::mirror))
        .route("/v1/vms/{name}/switch", post(sessions::switch))
        .route("/v1/vms/{name}/verify", post(sessions::verify))
        .route("/v1/vms/{name}/cancel", post(sessions::cancel))
        .route("/v1/vms/{name}/bandwidth", post(sessions::bandwidth))
        .route("/v1/sessions", get(sessions::list))
        .route("/v1/sessions/{id}", get(sessions::show))
        .route("/v1/sessions/{id}/events", get(streams::session))
        .route("/v1/history", get(history::list))
        .route("/v1/history/{id}", get(history::report))
        .route("/v1/events", get(streams::events))
        .fallback(refusal::no_such_path)
        .method_not_allowed_fallback(refusal::no_such_method)
        .layer(axum::extract::DefaultBodyLimit::max(LARGEST_REQUEST))
        .with_state(api)
}

async fn agent(axum::extract::State(api): axum::extract::State<Api>) -> axum::Json<AgentInfo> {
    axum::Json(AgentInfo {
        name: api.vms.host().name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        link: api.link.to_string(),
        started_unix_ms: api.started_unix_ms,
        vms: api.vms.count(),
        recovering: api.vms.recovering(),
        sessions: api.vms.sessions().len(),
        problems: api.vms.problems(),
    })
}

#[cfg(test)]
pub(crate) mod tests;
