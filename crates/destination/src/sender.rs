//! The way to the source, for several tasks.

use std::sync::Arc;

use link::ControlSender;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use protocol::deadlines::WORKING;
use protocol::wire::{self, Reply, ToSource};

/// The way to the source, for several tasks. A message is sent whole, one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Sender(pub(crate) Arc<Mutex<ControlSender>>);

impl Sender {
    pub(crate) async fn send(&self, reply: Reply) -> Result<(), link::LinkError> {
        self.0.lock().await.send(&ToSource::from(reply)).await
    }

    pub(crate) fn say_that_it_is_worked_on(&self) -> AbortOnDropHandle<()> {
        let sender = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                tokio::time::sleep(WORKING).await;
                if sender.send(Reply::Working(wire::Nothing {})).await.is_err() {
                    return;
                }
            }
        }))
    }
}
