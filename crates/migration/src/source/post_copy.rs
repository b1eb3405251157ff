//! Post-copy at the source: the machine runs at the destination, and what its memory lacks is supplied from here.
//!
//! There is no way back in it: this host has memory that is nowhere else, and the destination the machine that needs it.
//! So it has no deadline. When the link is lost it is made again, as often as that takes, and the destination says what
//! it still lacks; when this agent ends, the next one goes on ([`supply`]).

use std::sync::Arc;
use std::time::Instant;

use link::Bandwidth;
use mirror::hash::Secret;
use mirror::layout::{Layout, PAGE_SIZE};
use mirror::memory::Ram;
use mirror::memory::pages::PageSet;
use mirror::memory::post_copy::PostCopySource;
use qemu::Spec;

use super::held::{Controller, chosen_streams};
use super::peer::{Destination, about, violation};
use super::stop::{Stop, nothing_held};
use super::supplying::{Streams, Supplying};
use crate::linked::LinkedHost;
use finding::{Failure, Finding, Stage, chain, kind};
use host::Record;
use ownership::Event;
use ownership::Ownership;
use protocol::deadlines::{LINK_AGAIN, POST_COPY_READY};
use protocol::wire::{self, Reply, Request};
use session::report::{self, Counted};

/// A destination that was connected to again.
enum Again {
    /// It lacks these.
    Lacks(Box<Destination>, PageSet),
    /// There is nothing to supply any more, for this reason.
    Ended(wire::Running),
}

/// A link that was made again.
enum Relinked {
    /// So many pages are supplied over it.
    Supplying(Destination, Supplying, u64),
    /// There is nothing to supply any more, for this reason.
    Ended(wire::Running),
}

/// How the machine came to have everything, if it did: that it does not ask any more says nothing yet. `said` is what
/// the destination has said of a failure before.
fn had_everything(
    running: wire::Running,
    to: &str,
    said: Option<Finding>,
) -> Result<wire::Supplied, Finding> {
    let why = said.map(|said| format!(": {}", said.message)).unwrap_or_default();
    match running {
        wire::Running { supplied: Some(supplied), .. } => Ok(supplied),
        wire::Running { lacked: true, .. } => Err(Finding::new(
            kind::ENDED_THERE,
            format!("the VM was handed over to {to} and has ended there while it lacked memory{why}"),
            "see the VM's log there; it does not run any more, start it again from its disks",
        )),
        wire::Running { .. } => Err(Finding::new(
            kind::POST_COPY,
            format!("{to} has not said that the VM's memory became complete{why}"),
            "see the VM there, and the agents' logs",
        )),
    }
}

/// Connects again, and hears what is still missing.
async fn connect_again(
    host: &LinkedHost,
    record: &Record,
    secret: &Secret,
    layout: &Layout,
) -> Result<Again, Stop> {
    let Ownership::HandedOver { session, to, address, .. } = &record.ownership else {
        return Err(nothing_held());
    };
    let mut destination = Destination::connect(host, address).await.map_err(Stop::Failed)?;
    if destination.name() != to {
        let message = format!("{} answers at {address}, not {to}", destination.name());
        return Err(Stop::Failed(Finding::new("other-agent", message, "see to the address")));
    }
    let commit = about(session, record);
    let secret = secret.as_bytes().to_vec();
    destination.send(Request::Resume(wire::Resume { commit: Some(commit), secret })).await?;
    let mut missing = PageSet::new(layout.end());
    let mut told = 0u64;
    loop {
        match destination.receive_within(POST_COPY_READY, "say what the VM lacks").await? {
            Reply::Missing(part) => {
                // Each part is of pages of its own.
                told += part.bits.len() as u64 * 8;
                if !part.add_to(&mut missing)
                    || told > layout.end() + 64
                    || (part.more && part.bits.is_empty())
                {
                    return Err(violation("lacks pages that the VM does not have"));
                }
                if !part.more {
                    return Ok(Again::Lacks(Box::new(destination), missing));
                }
            }
            Reply::Running(running) => return Ok(Again::Ended(running)),
            other => return Err(violation(&format!("said {other} instead of what it lacks"))),
        }
    }
}

impl Controller {
    /// Makes both sides ready: QEMU there waits for what is missing, the streams for it are open.
    pub(super) async fn prepare_post_copy(&mut self) -> Result<Streams, Stop> {
        let streams = self.streams();
        let (endpoint, session) = (self.host.endpoint.clone(), self.id);
        let bandwidth = Arc::clone(&self.commands.bandwidth);
        let throughput = self.rounds()?.estimate.wire_rate;
        let destination = self.destination()?;
        destination.prepare_post_copy().await?;
        let address = destination.address().to_owned();
        Streams::open(&endpoint, &address, session, streams, &bandwidth, throughput).await
    }

    /// Supplies what the machine lacks, for as long as it takes, over as many links as it takes.
    pub(super) async fn supply_rest(&mut self) -> Result<(), Stop> {
        let Some(first) = self.held.supplying.take() else { return Ok(()) };
        let (begin, mut links) = (Instant::now(), 0);
        let supplied = self.supply_all(first, &mut links).await;
        let rounds = self.rounds()?;
        let (sums, pages) = (rounds.sums_now(), rounds.withheld);
        let ms = |us: u64| us as f64 / 1e3;
        let stats = supplied.clone().unwrap_or_default();
        self.report.post_copy = Some(report::PostCopy {
            pages,
            faults: stats.faults,
            longest_fault_ms: ms(stats.longest_us),
            mean_fault_ms: if stats.faults == 0 { 0.0 } else { ms(stats.total_us) / stats.faults as f64 },
            duration_ms: begin.elapsed().as_secs_f64() * 1e3,
            links,
            counted: match &supplied {
                Ok(supplied) if supplied.taken_over => Counted::Part,
                Ok(_) => Counted::All,
                Err(_) => Counted::Nothing,
            },
        });
        if let Err(e) = self.host.journal.on(&mut self.vm.record, Event::Supplied, |_| {}) {
            tracing::error!(vm = %self.vm.record.name, error = chain(&e), "the journal cannot be written");
        }
        match supplied {
            // Each page was checked as it came; an agent that has taken over there has no sums of all.
            Ok(wire::Supplied { sums: there, .. }) if !there.is_empty() && there != sums => {
                Err(Stop::Uncertain(Finding::new(
                    kind::POST_COPY,
                    "the memory at the destination is not what was supplied",
                    "do not trust the VM; report this with the agents' logs",
                )))
            }
            Ok(_) => Ok(()),
            Err(finding) => Err(Stop::Uncertain(finding)),
        }
    }

    /// Returns how it went, or why nobody can say that the machine has everything.
    async fn supply_all(&mut self, first: Supplying, links: &mut u32) -> Result<wire::Supplied, Finding> {
        let (progress, name) = (self.progress.clone(), self.vm.record.name.clone());
        let left = |pages: u64| {
            progress.send_modify(|progress| progress.remaining_bytes = pages * PAGE_SIZE as u64);
        };
        let warn = |warning| progress.send_modify(|progress| progress.warning = warning);
        let (mut supplying, mut said) = (Some(first), None);
        let (mut wait, longest) = LINK_AGAIN;
        let mut lacked = u64::MAX;
        loop {
            if let (Some(mut supplying), Some(destination)) = (supplying.take(), &mut self.held.destination) {
                *links += 1;
                match supplying.push(destination, left).await {
                    Ok(supplied) => {
                        warn(None);
                        return Ok(supplied);
                    }
                    Err(stop) => {
                        tracing::warn!(vm = %name, ?stop, "the link was lost while memory was supplied");
                        warn(why(&stop, &mut said));
                    }
                }
            }
            self.held.destination = None;
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(longest);
            match self.again().await {
                Ok(Relinked::Supplying(destination, streams, missing)) => {
                    // A link by which nothing got through is no reason for haste: there may be no room for it there.
                    if missing < lacked {
                        wait = LINK_AGAIN.0;
                    }
                    lacked = missing;
                    warn(None);
                    self.held.destination = Some(destination);
                    supplying = Some(streams);
                }
                Ok(Relinked::Ended(running)) => {
                    match had_everything(running, &self.report.destination, said.clone()) {
                        // What is here may be all there is of it: nothing is let go of on such a word.
                        Err(finding) if finding.kind == kind::POST_COPY => {
                            tracing::error!(vm = %name, "{}", finding.message);
                            warn(Some(format!("{}; it is asked again", finding.message)));
                        }
                        told => return told,
                    }
                }
                Err(stop) => {
                    // Each reason once: it is tried again for as long as the destination's host may be down.
                    let now = why(&stop, &mut said);
                    if now.is_some() && now != progress.borrow().warning {
                        tracing::warn!(vm = %name, ?stop, "what the machine lacks cannot be supplied");
                    }
                    warn(now);
                }
            }
        }
    }

    /// Another link, after one was lost.
    async fn again(&mut self) -> Result<Relinked, Stop> {
        let rounds = self.rounds()?;
        let (secret, layout) = rounds.identity().ok_or_else(nothing_held)?;
        let throughput = rounds.estimate.wire_rate;
        let again = connect_again(&self.host, &self.vm.record, &secret, &layout).await?;
        let (destination, missing) = match again {
            Again::Lacks(destination, missing) => (destination, missing),
            Again::Ended(running) => return Ok(Relinked::Ended(running)),
        };
        let bandwidth = Arc::clone(&self.commands.bandwidth);
        let streams = Streams::open(
            &self.host.endpoint,
            destination.address(),
            self.id,
            layout.streams(),
            &bandwidth,
            throughput,
        )
        .await?;
        let rounds = self.rounds()?;
        let lacked = missing.len();
        let supplying = streams.supply(|urgent, bulk| rounds.supply(Some(missing), urgent, bulk))?;
        Ok(Relinked::Supplying(*destination, supplying, lacked))
    }
}

/// What to tell of a link that was lost; what the destination itself has `said` is kept.
fn why(stop: &Stop, said: &mut Option<Finding>) -> Option<String> {
    let Stop::Failed(finding) = stop else { return None };
    if finding.kind == kind::POST_COPY {
        *said = Some(finding.clone());
    }
    Some(format!("memory is not supplied: {}; it is tried again", finding.message))
}

/// Goes on for an agent that has ended: supplies what the machine that was handed over still lacks. Returns when it lacks
/// nothing, or, with what became of it, when it has ended while it did.
///
/// # Errors
/// [`Failure`] when the link is lost, the memory cannot be read, or nobody says that all of it has arrived: to be tried again.
pub async fn supply(host: &LinkedHost, record: &Record) -> Result<Option<Finding>, Failure> {
    let failed = |stop: Stop| stop.into_failure(Stage::Failed);
    let gone =
        |e: &dyn std::error::Error| failed(Stop::because("ram", e, "see what became of its QEMU here"));
    let Ownership::HandedOver { session, to, .. } = &record.ownership else { return Ok(None) };
    let Some(process) = &record.process else { return Ok(None) };
    let spec = Spec::parse(&record.argv).map_err(|e| gone(&e))?;
    let blocks = qemu::ram_blocks(process, &spec, &record.ram).map_err(|e| gone(&e))?;
    let streams = chosen_streams();
    let layout = Layout::new(blocks.iter().map(|block| (block.id.as_str(), block.size)), streams)
        .map_err(|e| gone(&e))?;
    let files = blocks.into_iter().map(|block| movable::ram::file_of(block, process.pid));
    let ram = Arc::new(Ram::new(layout.clone(), files.collect()).map_err(|e| gone(&e))?);
    let secret = Secret::random().map_err(|e| gone(&e))?;
    let again = connect_again(host, record, &secret, &layout).await.map_err(failed)?;
    let (mut destination, missing) = match again {
        Again::Lacks(destination, missing) => (destination, missing),
        Again::Ended(running) => {
            return match had_everything(running, to, None) {
                Ok(_) => {
                    tracing::info!(vm = %record.name, "nothing is missing any more");
                    Ok(None)
                }
                Err(finding) if finding.kind == kind::ENDED_THERE => Ok(Some(finding)),
                // What is here may be all there is of it.
                Err(finding) => Err(failed(Stop::Failed(finding))),
            };
        }
    };
    let bandwidth = Bandwidth::within(&host.bandwidth, None);
    let opened =
        Streams::open(&host.endpoint, destination.address(), *session, streams, &bandwidth, None).await;
    let supplying = opened.and_then(|streams| {
        streams.supply(|urgent, bulk| {
            PostCopySource::start(ram, secret, missing, |_| 0, urgent, bulk)
                .map_err(|e| Stop::because("mirror", &e, "see the source agent's log"))
        })
    });
    let supplied = supplying.map_err(failed)?.push(&mut destination, |_| {}).await.map_err(failed)?;
    tracing::info!(vm = %record.name, faults = supplied.faults, "nothing is missing any more");
    Ok(None)
}
