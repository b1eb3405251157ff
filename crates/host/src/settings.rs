//! What QEMU's own migration is set to: capabilities and parameters, which outlive the migration that they were set for.
//!
//! Another tool, or an attempt of its that failed, may have left some behind (`multifd`, `postcopy-ram`, a `max-bandwidth` of some kilobytes,
//! TLS), and with these our stream would fail or crawl while the guest is paused. So for a migration of ours everything is set to what it depends on, and
//! to QEMU's defaults otherwise; a QEMU that stays gets back what it had.

use std::collections::BTreeMap;

use qemu::{Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::vm::{Journal, Record};
use finding::chain;

/// What QEMU's migration is set to, as far as we set it to something else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// All capabilities that QEMU knows.
    pub(crate) capabilities: BTreeMap<String, bool>,
    /// The parameters that change.
    pub(crate) parameters: Map<String, Value>,
}

/// Parameters on which a stream to a socket of this host depends, and what they are to be. Those of what no capability asks for
/// (`multifd-channels`, `xbzrle-cache-size`, …) are as good as any.
fn neutral() -> Map<String, Value> {
    let neutral = json!({
        "max-bandwidth": 0,
        "avail-switchover-bandwidth": 0,
        "mode": "normal",
        "tls-creds": "",
        "tls-hostname": "",
        "tls-authz": "",
    });
    match neutral {
        Value::Object(parameters) => parameters,
        _ => Map::new(),
    }
}

/// Gives a machine's QEMU back what it had, if that is on record, and takes it off that.
pub async fn give_back(journal: &Journal, record: &mut Record, qmp: &Qmp) {
    let Some(before) = record.settings.clone() else { return };
    before.restore(qmp).await;
    if let Err(e) = journal.amend(record, |now| now.settings = None) {
        tracing::error!(vm = %record.name, error = chain(&e), "the journal cannot be written");
    }
}

impl Settings {
    /// What a QEMU is set to.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn of(qmp: &Qmp) -> Result<Settings, QmpError> {
        let capabilities = qmp.capabilities().await?.into_iter().collect();
        let all = qmp.migrate_parameters().await?;
        let mut parameters = Map::new();
        for name in neutral().keys().map(String::as_str).chain(["downtime-limit"]) {
            // One that this version does not have is nothing to be set, or put back.
            if let Some(value) = all.get(name) {
                parameters.insert(name.to_owned(), value.clone());
            }
        }
        Ok(Settings { capabilities, parameters })
    }

    /// Sets a QEMU that has these settings up for a migration of ours: with these capabilities and no other, and with these parameters
    /// besides what is neutral.
    ///
    /// # Errors
    /// If it refuses.
    pub async fn replace(&self, qmp: &Qmp, on: &[&str], parameters: Value) -> Result<(), QmpError> {
        let off = self.capabilities.iter().filter(|(name, state)| **state && !on.contains(&name.as_str()));
        let capabilities: Vec<(&str, bool)> =
            off.map(|(name, _)| (name.as_str(), false)).chain(on.iter().map(|name| (*name, true))).collect();
        qmp.set_capabilities(&capabilities).await?;
        let mut wanted: Map<String, Value> =
            neutral().into_iter().filter(|(name, _)| self.parameters.contains_key(name)).collect();
        if let Value::Object(more) = parameters {
            wanted.extend(more);
        }
        qmp.set_parameters(Value::Object(wanted)).await
    }

    /// Gives a QEMU back what it had.
    pub async fn restore(&self, qmp: &Qmp) {
        let all: Vec<(&str, bool)> =
            self.capabilities.iter().map(|(name, state)| (name.as_str(), *state)).collect();
        if let Err(e) = qmp.set_capabilities(&all).await {
            tracing::warn!(error = chain(&e), "QEMU keeps capabilities of a migration of ours");
        }
        if let Err(e) = qmp.set_parameters(Value::Object(self.parameters.clone())).await {
            tracing::warn!(error = chain(&e), "QEMU keeps parameters of a migration of ours");
        }
    }
}
