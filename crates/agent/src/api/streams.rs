//! Server-sent events: of one session, and of the whole host.

use std::convert::Infallible;
use std::sync::Arc;

use async_stream::stream;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::sse::{Event as Sse, KeepAlive, Sse as SseStream};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::refusal::{InPath, InQuery, Refusal};
use super::sessions::ended;
use super::state::Api;
use crate::sessions::Active;

/// `GET /v1/sessions/{id}/events`: `progress` until the `report`, which is the last.
pub(super) async fn session(
    State(api): State<Api>,
    InPath(id): InPath<Uuid>,
) -> Result<impl IntoResponse, Refusal> {
    let active = api.vms.session(id);
    // Asked only where it is not under way: a session ends by entering the history first.
    let past = if active.is_none() { Some(ended(&api, id).await?) } else { None };
    let stream = stream! {
        if let Some(active) = active {
            let mut ended = active.ended();
            let mut progress = active.session.progress();
            loop {
                // Taken before anything is awaited: what is borrowed here may not be held meanwhile.
                let report = ended.borrow_and_update().clone();
                let now = sse("progress", &*progress.borrow_and_update());
                yield now;
                if let Some(report) = report {
                    yield sse("report", &*report);
                    return;
                }
                next(&active, &mut progress, &mut ended).await;
            }
        }
        if let Some(report) = past {
            yield sse("report", &report);
        }
    };
    Ok(SseStream::new(stream).keep_alive(KeepAlive::default()))
}

/// Waits for progress or the end. After the controller has ended its progress stands still, and the end is
/// all that can come.
async fn next(
    active: &Active,
    progress: &mut tokio::sync::watch::Receiver<session::Progress>,
    ended: &mut tokio::sync::watch::Receiver<Option<Arc<session::Report>>>,
) {
    if progress.has_changed().is_err() || active.session.report().is_some() {
        // The sender of `ended` lives in `active`.
        let _ = ended.changed().await;
        return;
    }
    tokio::select! {
        _ = progress.changed() => {}
        _ = ended.changed() => {}
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct From {
    /// Begin after the event of this number.
    after: Option<u64>,
    /// Whether to wait for more once all that is kept has been sent; it is the default.
    follow: Option<bool>,
}

/// `GET /v1/events`: what is kept, then what comes.
pub(super) async fn events(
    State(api): State<Api>,
    InQuery(from): InQuery<From>,
    headers: HeaderMap,
) -> impl IntoResponse {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()).and_then(|id| id.parse().ok());
    let after = from.after.or(last).unwrap_or(0);
    let follow = from.follow.unwrap_or(true);
    let stream = stream! {
        if !follow {
            for event in api.vms.events().since(after) {
                yield sse("event", &event).map(|sse| sse.id(event.seq.to_string()));
            }
            return;
        }
        let mut follower = api.vms.events().follow(after);
        loop {
            let events = tokio::select! {
                events = follower.next() => events,
                () = api.closing.cancelled() => return,
            };
            for event in events {
                yield sse("event", &event).map(|sse| sse.id(event.seq.to_string()));
            }
        }
    };
    SseStream::new(stream).keep_alive(KeepAlive::default())
}

fn sse(name: &str, data: &impl Serialize) -> Result<Sse, Infallible> {
    let event = Sse::default().event(name);
    // Our own types have no maps with keys other than strings, the one thing JSON cannot hold.
    let data = serde_json::to_string(data).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    Ok(event.data(data))
}
