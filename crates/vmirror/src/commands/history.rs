//! `vmirror history` and `report`: migrations that have ended.

use std::path::Path;

use agent::api::types::HistoryEntry;
use ownership::VmName;
use readable::{bytes, moment, ms};
use serde::Serialize;
use session::{Outcome, Report};

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::html;
use crate::output::Output;
use crate::summary::{self, short};
use crate::table::Table;

pub(super) async fn list(
    client: &Client,
    vm: Option<&VmName>,
    limit: u32,
    output: &Output,
) -> Result<Exit, Failure> {
    let of = vm.is_some();
    let vm = vm.map(|vm| format!("&vm={vm}")).unwrap_or_default();
    let entries: Vec<HistoryEntry> = client.get(&format!("/v1/history?limit={limit}{vm}")).await?;
    output.result(&entries, |entries| match entries.is_empty() {
        true if of => "no migration of that VM has ended here".to_owned(),
        true => "no migration has ended here yet".to_owned(),
        false => table(entries),
    });
    Ok(Exit::Done)
}

fn table(entries: &[HistoryEntry]) -> String {
    let headings = ["ID", "WHEN", "VM", "TO", "OUTCOME", "DOWNTIME", "TOTAL", "SENT", "WHY"];
    let mut table = Table::new(&headings, &[5, 6, 7]);
    for entry in entries {
        let downtime = match entry.outcome {
            Outcome::Completed => ms(entry.downtime_ms),
            _ => "-".to_owned(),
        };
        table.row([
            short(&entry.id).to_owned(),
            moment(entry.started_unix_ms),
            entry.vm.clone(),
            entry.destination.clone(),
            summary::outcome(entry.outcome).to_owned(),
            downtime,
            ms(entry.total_ms),
            bytes(entry.wire_bytes),
            entry.error.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

/// Where a page was written to.
#[derive(Debug, Serialize)]
struct Written<'a> {
    id: &'a str,
    html: &'a Path,
}

pub(super) async fn report(
    client: &Client,
    id: &str,
    html: Option<&Path>,
    output: &Output,
) -> Result<Exit, Failure> {
    let report: Report = client.get(&format!("/v1/history/{id}")).await?;
    let Some(path) = html else {
        output.result(&report, summary::in_full);
        return Ok(Exit::Done);
    };
    std::fs::write(path, html::page(&report)).map_err(|error| {
        let message = format!("{} cannot be written: {error}", path.display());
        Failure::refused("write", message, "choose a file in a directory that this user may write to")
    })?;
    if output.is_json() {
        // The report itself is what scripts want, page or not.
        output.result(&report, summary::in_full);
    } else {
        output.done(&Written { id: &report.id, html: path }, |written| written.html.display().to_string());
    }
    Ok(Exit::Done)
}
