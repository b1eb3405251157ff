//! A guest that is stopped for a moment, and whose that stop is.
//!
//! QEMU tells a STOP when a guest that runs is stopped, once; a `stop` of one that stands already tells nothing. So where somebody else stops
//! the guest between our look and our own `stop`, there is a STOP as well, and only when it came tells that it was not ours. A guest that
//! somebody else has stopped must not be let go on by us.

use super::connection::Qmp;
use super::error::QmpError;

impl Qmp {
    /// Stops the guest's CPUs for a moment, with all I/O drained: no device writes its memory from when this returns until
    /// [`Qmp::unquiesce`]. Returns false where it does not run, or where it is not certain that this is what has stopped it: it is then not
    /// ours to let go on.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; the guest may be stopped or not.
    pub async fn quiesce(&self) -> Result<bool, QmpError> {
        if !self.status().await?.running {
            return Ok(false);
        }
        self.bring_about("stop", "STOP").await
    }

    /// Lets a guest go on that [`Qmp::quiesce`] has stopped.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn unquiesce(&self) -> Result<(), QmpError> {
        self.bring_about("cont", "RESUME").await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::serve;
    use super::*;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, SystemTime};

    /// A STOP that happened so long ago.
    fn stop(ago: Duration) -> String {
        let at = (SystemTime::now() - ago).duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let (seconds, microseconds) = (at.as_secs(), at.subsec_micros());
        format!(
            "{{\"event\":\"STOP\",\"timestamp\":{{\"seconds\":{seconds},\"microseconds\":{microseconds}}}}}\n"
        )
    }

    /// What quiescing a guest comes to whose QEMU says these things right before and right after it answers `query-status`, and before it
    /// answers `stop`; whether each STOP was told as ours; and the commands that QEMU got.
    async fn quiesced(
        script: impl Fn(&str) -> (String, String) + Send + Sync + 'static,
    ) -> (bool, Vec<bool>, Vec<String>) {
        let commands = Arc::new(Mutex::new(Vec::new()));
        let got = Arc::clone(&commands);
        let (_directory, socket) = serve(move |name, id| {
            got.lock().unwrap().push(name.to_owned());
            let (before, after) = script(name);
            let answer = match name {
                "query-status" => "{\"status\":\"running\",\"running\":true}",
                _ => "{}",
            };
            format!("{before}{{\"return\":{answer},\"id\":{id}}}\n{after}")
        });
        let qmp = Qmp::connect(&socket).await.unwrap();
        let mut events = qmp.events();
        let ours = qmp.quiesce().await.unwrap();
        let told = std::iter::from_fn(|| events.try_recv().ok()).map(|event| event.ours).collect();
        let commands = commands.lock().unwrap().clone();
        (ours, told, commands)
    }

    #[tokio::test]
    async fn a_stop_that_is_ours_is_taken_back() {
        let now = |name: &str| match name {
            "stop" => (stop(Duration::ZERO), String::new()),
            _ => Default::default(),
        };
        let (ours, told, commands) = quiesced(now).await;
        assert!(ours);
        assert_eq!((told, commands), (vec![true], vec!["query-status".to_owned(), "stop".to_owned()]));
    }

    #[tokio::test]
    async fn a_stop_by_somebody_else_between_our_look_and_our_stop_is_not_taken_for_ours() {
        // It is read before our command is written, …
        let early = |name: &str| match name {
            "query-status" => (stop(Duration::ZERO), String::new()),
            _ => Default::default(),
        };
        // … or was still on its way when that was.
        let late = |name: &str| match name {
            "stop" => (stop(Duration::from_millis(300)), String::new()),
            _ => Default::default(),
        };
        for (ours, told, commands) in [quiesced(early).await, quiesced(late).await] {
            assert!(!ours, "the guest would be let go on that somebody has stopped");
            assert_eq!(told, [false], "it is told as what somebody else has done");
            assert!(!commands.iter().any(|command| command == "cont"), "{commands:?}");
        }
    }

    #[tokio::test]
    async fn where_nothing_is_told_the_guest_stays_as_it_is() {
        let (ours, told, commands) = quiesced(|_| Default::default()).await;
        assert!(!ours && told.is_empty());
        assert_eq!(commands, ["query-status", "stop"]);
    }
}
