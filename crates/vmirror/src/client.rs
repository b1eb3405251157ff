//! The local agent's API, as a client sees it.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use agent::api::types::{ErrorBody, Event, SessionEvent};
use agent::error::chain;
use eventsource_stream::Eventsource as _;
use futures::{Stream, StreamExt as _};
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::failure::{Exit, Failure};

/// A connection to the agent of this host.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Result<Client, Failure> {
        let built = reqwest::Client::builder().unix_socket(socket).build();
        let http = built.map_err(|error| {
            let message = format!("no client for {} can be made: {}", socket.display(), chain(&error));
            Failure::refused("client", message, "see --agent")
        })?;
        Ok(Client { http, socket: socket.to_owned() })
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.read(self.send(Method::GET, path, None::<&()>).await?).await
    }

    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, Failure> {
        self.read(self.send(Method::POST, path, Some(body)).await?).await
    }

    /// Where the answer has no content.
    pub(crate) async fn tell<B: Serialize>(&self, path: &str, body: &B) -> Result<(), Failure> {
        self.send(Method::POST, path, Some(body)).await?;
        Ok(())
    }

    /// One migration's progress, and last its report.
    pub(crate) async fn follow(
        &self,
        id: Uuid,
    ) -> Result<impl Stream<Item = Result<SessionEvent, Failure>> + Unpin + use<>, Failure> {
        let response = self.send(Method::GET, &format!("/v1/sessions/{id}/events"), None::<&()>).await?;
        let socket = self.socket.clone();
        let events = response.bytes_stream().eventsource().filter_map(move |event| {
            let read = event.map_err(|error| lost(&socket, &error.to_string())).and_then(|event| {
                let damaged = |error: serde_json::Error| not_understood(&error.to_string());
                match event.event.as_str() {
                    "progress" => serde_json::from_str(&event.data)
                        .map(SessionEvent::Progress)
                        .map(Some)
                        .map_err(damaged),
                    "report" => {
                        serde_json::from_str(&event.data).map(SessionEvent::Report).map(Some).map_err(damaged)
                    }
                    // A later agent may tell more.
                    _ => Ok(None),
                }
            });
            futures::future::ready(read.transpose())
        });
        Ok(Box::pin(events))
    }

    /// What happened on this host, and with `follow` what will.
    pub(crate) async fn events(
        &self,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<Event, Failure>> + Unpin + use<>, Failure> {
        let response = self.send(Method::GET, &format!("/v1/events?follow={follow}"), None::<&()>).await?;
        let socket = self.socket.clone();
        let events = response.bytes_stream().eventsource().map(move |event| {
            let event = event.map_err(|error| lost(&socket, &error.to_string()))?;
            serde_json::from_str(&event.data).map_err(|error| not_understood(&error.to_string()))
        });
        Ok(Box::pin(events))
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Response, Failure> {
        // The socket decides who answers; the host name is only there because HTTP wants one.
        let mut request = self.http.request(method, format!("http://agent{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let exit = if status.is_client_error() { Exit::Refused } else { Exit::Failed };
        match response.json::<ErrorBody>().await {
            Ok(body) => Err(Failure::answered(exit, body.error)),
            Err(error) => Err(not_understood(&format!("{status}: {}", chain(&error)))),
        }
    }

    async fn read<T: DeserializeOwned>(&self, response: Response) -> Result<T, Failure> {
        let is_empty = response.status() == StatusCode::NO_CONTENT;
        let bytes = response.bytes().await.map_err(|error| lost(&self.socket, &chain(&error)))?;
        // What an agent of an earlier version has done is done, though it has nothing to tell.
        let text: &[u8] = if is_empty { b"{}" } else { &bytes };
        serde_json::from_slice(text).map_err(|error| not_understood(&error.to_string()))
    }

    /// The agent could not be asked. Why is in the innermost error, which is the operating system's.
    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut source = error.source();
        let mut kind = None;
        while let Some(cause) = source {
            kind = cause.downcast_ref::<io::Error>().map(io::Error::kind).or(kind);
            source = cause.source();
        }
        let socket = self.socket.display();
        let start =
            "start it with `vmirror agent --config FILE`, or name its socket with --agent or VMIRROR_AGENT";
        match kind {
            Some(io::ErrorKind::NotFound) => Failure::refused(
                "agent-not-running",
                format!("no agent is running: {socket} does not exist"),
                start,
            ),
            Some(io::ErrorKind::ConnectionRefused) => Failure::refused(
                "agent-not-running",
                format!("no agent is running: nobody answers at {socket}"),
                start,
            ),
            Some(io::ErrorKind::PermissionDenied) => Failure::refused(
                "agent-forbidden",
                format!("the agent's socket {socket} may not be used by this user"),
                "use the account that the agent runs under, such as with sudo",
            ),
            _ if error.is_connect() => Failure::refused(
                "agent-unreachable",
                format!("the agent at {socket} cannot be reached: {}", chain(error)),
                start,
            ),
            _ => lost(&self.socket, &chain(error)),
        }
    }
}

/// The agent went away in the middle: what it was asked may or may not be done.
fn lost(socket: &Path, why: &str) -> Failure {
    Failure::new(
        Exit::Uncertain,
        "agent-lost",
        format!("the agent at {} went away before it had answered: {why}", socket.display()),
        "see its log; once it runs again, `vmirror list` and `vmirror history` tell what became of this",
    )
}

fn not_understood(why: &str) -> Failure {
    Failure::new(
        Exit::Failed,
        "bad-answer",
        format!("the agent's answer cannot be understood: {why}"),
        "use the vmirror command of the agent's version",
    )
}

#[cfg(test)]
mod tests {
    use agent::api::types::{Decision, ResolveReply, ResolveRequest};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn what_an_earlier_agent_has_done_is_done_though_it_says_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        };
        let client = Client::new(&socket).unwrap();
        let request = ResolveRequest { decision: Decision::RunHere, force: true };
        let asked = client.post::<_, ResolveReply>("/v1/vms/web1/resolve", &request);
        let ((), reply) = tokio::join!(agent, asked);
        assert_eq!(reply.unwrap(), ResolveReply::default());
    }
}
