//! Errors as the API tells them: an HTTP status, a name for scripts, words for people.

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use finding::Stage;
use serde::de::DeserializeOwned;
use session::OptionError;

use crate::api::types::{ErrorBody, ErrorDetail};
use crate::error::{AgentError, chain};
use crate::history::{self, HistoryError};

/// An error on its way to a client.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    detail: ErrorDetail,
}

impl Refusal {
    fn new(status: StatusCode, kind: &str, message: String, hint: &str) -> Refusal {
        let detail = ErrorDetail { kind: kind.to_owned(), message, hint: hint.to_owned(), more: Vec::new() };
        Refusal { status, detail }
    }
}

#[cfg(test)]
impl Refusal {
    pub(crate) fn into_parts(self) -> (StatusCode, ErrorDetail) {
        (self.status, self.detail)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody { error: self.detail })).into_response()
    }
}

impl From<AgentError> for Refusal {
    fn from(error: AgentError) -> Refusal {
        let message = chain(&error);
        let told = |status, kind, hint: &str| Refusal::new(status, kind, message.clone(), hint);
        match error {
            AgentError::Forwarded { vm, to } => told(
                StatusCode::CONFLICT,
                "forwarded",
                &format!("give the command on {to}; `vmirror release {vm}` ends the forwarding"),
            ),
            AgentError::HasLeft { to, .. } => told(
                StatusCode::CONFLICT,
                "has-left",
                &match to {
                    Some(to) => format!("give the command on {to}, or where it is by now"),
                    None => "give the command where it is by now".to_owned(),
                },
            ),
            AgentError::UnknownVm { .. } => told(
                StatusCode::NOT_FOUND,
                "unknown-vm",
                "start one with `vmirror run` or take one in with `vmirror adopt`",
            ),
            AgentError::BadName(_) => told(StatusCode::BAD_REQUEST, "bad-name", "choose another name"),
            AgentError::NameTaken(_) => {
                told(StatusCode::CONFLICT, "name-taken", "choose another name, or stop that VM first")
            }
            AgentError::InSession { vm, .. } => told(
                StatusCode::CONFLICT,
                "in-migration",
                &format!(
                    "wait for its end, or end it with `vmirror cancel {vm}`; a standing mirror is finished with `vmirror switch {vm}`; of its options only --bandwidth can be changed, by giving it alone"
                ),
            ),
            AgentError::Held { .. } => told(StatusCode::CONFLICT, "busy", "try again when that has ended"),
            AgentError::NoSession { vm, .. } => told(
                StatusCode::CONFLICT,
                "no-mirror",
                &format!("begin one with `vmirror mirror {vm} --to HOST:PORT`"),
            ),
            AgentError::NotStanding(vm) => told(
                StatusCode::CONFLICT,
                "no-mirror",
                &format!(
                    "follow it with `vmirror status {vm} --watch`, or end it with `vmirror cancel {vm}`"
                ),
            ),
            AgentError::SessionEnded(_) => {
                told(StatusCode::CONFLICT, "migration-ended", "see `vmirror history` for what came of it")
            }
            AgentError::Uncertain { vm, doubt } => told(
                StatusCode::CONFLICT,
                "uncertain",
                &match doubt.peer() {
                    Some(peer) => format!(
                        "bring {peer} back so that it can be asked, or find out yourself and say `vmirror resolve {vm}` \
                         with --run-here or --give-up"
                    ),
                    None => {
                        "see to the disk of state_dir: it goes on as soon as that can be written".to_owned()
                    }
                },
            ),
            AgentError::HandingOver(_) => told(
                StatusCode::CONFLICT,
                "handing-over",
                "wait for that; nothing is certain of it yet, neither here nor there",
            ),
            AgentError::NotUncertain(_) => {
                told(StatusCode::CONFLICT, "not-uncertain", "use `vmirror stop` to end it")
            }
            AgentError::BadRequest(_) => {
                told(StatusCode::BAD_REQUEST, "bad-request", "use the vmirror command of the agent's version")
            }
            AgentError::Option(error) => told(StatusCode::BAD_REQUEST, "bad-option", option_hint(&error)),
            AgentError::Address(_) => told(
                StatusCode::BAD_REQUEST,
                "bad-address",
                "give the destination agent's `listen` address as HOST:PORT",
            ),
            AgentError::UnknownSession(_) => {
                told(StatusCode::NOT_FOUND, "unknown-migration", "see `vmirror status` and `vmirror history`")
            }
            AgentError::ShuttingDown => told(
                StatusCode::SERVICE_UNAVAILABLE,
                "shutting-down",
                "start the agent again; VMs keep running",
            ),
            AgentError::Refused(finding) => {
                Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, &finding.kind, finding.message, &finding.hint)
            }
            AgentError::Migration(failure) => {
                let status = match failure.stage {
                    Stage::Refused => StatusCode::UNPROCESSABLE_ENTITY,
                    Stage::Failed | Stage::Cancelled | Stage::Uncertain => StatusCode::BAD_GATEWAY,
                };
                let finding = failure.finding;
                let mut refusal = Refusal::new(status, &finding.kind, finding.message, &finding.hint);
                refusal.detail.more = failure.more;
                refusal
            }
            AgentError::History(HistoryError::Unknown(_)) => {
                told(StatusCode::NOT_FOUND, "unknown-migration", "see `vmirror history` for the ids")
            }
            AgentError::History(HistoryError::Ambiguous { .. }) => {
                told(StatusCode::CONFLICT, "ambiguous-id", "give more of the id")
            }
            AgentError::History(HistoryError::Off(_)) => {
                told(StatusCode::SERVICE_UNAVAILABLE, "history-off", history::OFF)
            }
            AgentError::History(_) => told(
                StatusCode::INTERNAL_SERVER_ERROR,
                "history-unusable",
                "see the agent's log; the disk of state_dir may be full or damaged",
            ),
            AgentError::Journal(_) => told(
                StatusCode::INTERNAL_SERVER_ERROR,
                "journal-unusable",
                "see the agent's log; the disk of state_dir may be full or damaged",
            ),
        }
    }
}

fn option_hint(error: &OptionError) -> &'static str {
    match error {
        OptionError::MaxBelowAsked { .. } => "raise --max-downtime or lower --downtime",
        OptionError::TooLong { .. } => "give less",
        OptionError::StrictPostCopy => "choose one of them",
        OptionError::Timeout(_) => "give at least 1s",
        OptionError::Bandwidth(_) => "give a higher limit, such as 100MiB/s",
        OptionError::Streams(_) => "give fewer streams, or leave --streams out",
        _ => "see `vmirror migrate --help`",
    }
}

pub(crate) async fn no_such_path(uri: Uri) -> Refusal {
    let message = format!("the API has no {}", uri.path());
    Refusal::new(
        StatusCode::NOT_FOUND,
        "no-such-path",
        message,
        "see docs/api.md, and that both are of one version",
    )
}

pub(crate) async fn no_such_method(method: Method, uri: Uri) -> Refusal {
    let message = format!("{method} is not possible on {}", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "no-such-method", message, "see docs/api.md")
}

/// A request body; what is wrong with it is told as every other error.
#[derive(Debug)]
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let bytes = axum::body::Bytes::from_request(request, state).await;
        let bytes = bytes.map_err(|error: BytesRejection| {
            Refusal::new(error.status(), "bad-request", error.body_text(), "send a smaller request")
        })?;
        let read = serde_json::from_slice(&bytes);
        read.map(Body).map_err(|error| {
            AgentError::BadRequest(format!("the request is not as expected: {error}")).into()
        })
    }
}

/// What the path names.
#[derive(Debug)]
pub(crate) struct InPath<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for InPath<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        let path = path.map_err(|error: PathRejection| AgentError::BadRequest(error.body_text()))?;
        Ok(InPath(path.0))
    }
}

/// What stands behind the question mark.
#[derive(Debug)]
pub(crate) struct InQuery<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for InQuery<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        let query = query.map_err(|error: QueryRejection| AgentError::BadRequest(error.body_text()))?;
        Ok(InQuery(query.0))
    }
}

/// A machine's name from the path.
pub(crate) fn vm_name(text: &str) -> Result<ownership::VmName, AgentError> {
    Ok(text.parse()?)
}
