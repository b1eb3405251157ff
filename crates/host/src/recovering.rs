//! Machines that an agent which has just started has not found again yet.
//!
//! It listens to its peers from the first moment on, as one machine's hung QEMU must not keep word of the others from it. What a peer
//! asks about a machine that is still looked for waits until it is found, and is refused as busy where
//! that takes long. It is never answered by what is not known yet.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use finding::{Finding, kind};
use ownership::VmName;

/// The machines that are still looked for. Clones are handles to the same.
#[derive(Debug, Clone)]
pub struct Recovering(Arc<watch::Sender<HashSet<VmName>>>);

impl Default for Recovering {
    fn default() -> Recovering {
        Recovering(Arc::new(watch::Sender::new(HashSet::new())))
    }
}

impl Recovering {
    /// These are to be found.
    pub fn begin(&self, names: impl IntoIterator<Item = VmName>) {
        self.0.send_modify(|all| all.extend(names));
    }

    /// This one has been found, or found to be gone.
    pub fn is_found(&self, name: &VmName) {
        self.0.send_modify(|all| {
            all.remove(name);
        });
    }

    /// Waits until all are found.
    pub async fn all_found(&self) {
        // The sender is held by this very value.
        let _ = self.0.subscribe().wait_for(HashSet::is_empty).await;
    }

    /// Waits until a machine is found, if it is looked for.
    ///
    /// # Errors
    /// After so long, what to tell whoever asks about it.
    pub async fn found(&self, name: &str, limit: Duration) -> Result<(), Finding> {
        // What is no name is no machine's.
        let Ok(name) = name.parse::<VmName>() else { return Ok(()) };
        let mut all = self.0.subscribe();
        let found = all.wait_for(|all| !all.contains(&name));
        match tokio::time::timeout(limit, found).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Finding::new(
                kind::BUSY,
                format!("the agent has just started, and still looks for VM {name}"),
                "ask again",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_asks_about_a_machine_waits_for_that_one_only() {
        let recovering = Recovering::default();
        let name = |name: &str| name.parse::<VmName>().unwrap();
        recovering.begin([name("a"), name("b")]);
        let limit = Duration::from_secs(8);
        let begin = tokio::time::Instant::now();
        recovering.found("c", limit).await.unwrap();
        recovering.found("no/name", limit).await.unwrap();
        assert!(begin.elapsed().is_zero());
        assert_eq!(recovering.found("a", limit).await.unwrap_err().kind, kind::BUSY);
        assert_eq!(begin.elapsed(), limit);
        let asks = recovering.clone();
        let asked = tokio::spawn(async move { asks.found("a", limit).await });
        tokio::task::yield_now().await;
        recovering.is_found(&name("a"));
        asked.await.unwrap().unwrap();
        recovering.is_found(&name("b"));
        recovering.all_found().await;
        assert_eq!(begin.elapsed(), limit);
    }
}
