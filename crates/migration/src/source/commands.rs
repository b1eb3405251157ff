//! What the operator commands while a migration is under way.

use std::sync::Arc;

use link::Bandwidth;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use finding::Finding;
use session::Command;
use session::report::Verification;

/// What the operator has commanded, as the controller looks at it.
pub(super) struct Commands {
    pub(super) cancel: CancellationToken,
    pub(super) switch: CancellationToken,
    pub(super) verify: tokio::sync::mpsc::UnboundedReceiver<oneshot::Sender<Result<Verification, Finding>>>,
    pub(super) bandwidth: Arc<Bandwidth>,
}

impl Commands {
    /// Follows a session's commands; the task ends with the controller.
    pub(super) fn follow(
        mut commands: tokio::sync::mpsc::Receiver<Command>,
        bandwidth: Arc<Bandwidth>,
    ) -> (Commands, tokio::task::JoinHandle<()>) {
        let (cancel, switch) = (CancellationToken::new(), CancellationToken::new());
        let (tell, verify) = tokio::sync::mpsc::unbounded_channel();
        let followed = Commands {
            cancel: cancel.clone(),
            switch: switch.clone(),
            verify,
            bandwidth: Arc::clone(&bandwidth),
        };
        let task = tokio::spawn(async move {
            while let Some(command) = commands.recv().await {
                match command {
                    Command::Cancel => cancel.cancel(),
                    Command::Switch => switch.cancel(),
                    Command::Verify(answer) => drop(tell.send(answer)),
                    Command::Bandwidth(limit) => bandwidth.set(limit),
                }
            }
        });
        (followed, task)
    }
}
