//! From a copy that is ready to a machine of this host: the commit, and the settlement of one that was not heard of.

use std::sync::Arc;
use std::time::Duration;

use qemu::{Process, Qmp, QmpError, Spec};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::timeout;
use uuid::Uuid;

use crate::end::{End, failed, no_copy, qemu_gone, unknown_copy, violation};
use crate::health;
use crate::network::{self, Interfaces, Known};
use crate::receiving::ReceivingHost;
use crate::source::Source;
use finding::{Finding, chain, kind};
use host::Host;
use host::KILL_GRACE;
use host::guest_addresses::Neighbour;
use host::hooks::{self, Hook};
use host::lifecycle;
use host::places;
use host::settings;
use host::vm::{MadeImage, Record, Vm};
use ownership::concerned;
use ownership::{self, Effect, Event, Mark, OnRecord as _, Response, SourceSays};
use ownership::{Ownership, VmName};
use protocol::deadlines::{FIRST_REQUEST, REDIRECT};
use protocol::wire::{self, Reply, Request as Asked};
use session::points::{self, Point};

/// Between attempts to put on record that a machine runs.
const AGAIN: Duration = Duration::from_secs(5);
/// How long after a copy is ready its images are locked by a process of their own.
const POST: Duration = Duration::from_secs(1);
/// Words that have no meaning for a copy that is ready, until nothing more is heard of who says them.
const MOST_UNEXPECTED: usize = 16;
impl Source {
    /// The copy is ready. From here on only the source's word, or a person's, decides what becomes of it.
    pub(super) async fn await_commit(
        &mut self,
        record: Record,
        spec: Spec,
        qmp: Qmp,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        let mut events = qmp.events();
        if let Err(finding) = hooks::run(&self.host, Hook::Up, &record, false).await {
            lifecycle::forget(&self.host, &record, Some(&qmp)).await.kept_on_record();
            return Err(End::Failed(vec![finding]));
        }
        self.reply(Reply::Ready(wire::Nothing {})).await?;
        tracing::info!(vm = %record.name, "the copy is ready, and waits for the source's word");
        let mut interfaces = match self.interfaces.take() {
            Some(looked_for) => looked_for.await.ok(),
            None => None,
        };
        let mut known = Known::default();
        let mut posted = false;
        let mut unexpected = 0;
        loop {
            let asked = tokio::select! {
                // First of all: of a QEMU that has ended before it was told to run it is certain that it has not.
                biased;
                event = events.recv() => {
                    if let Err(RecvError::Closed) = event {
                        // If its QEMU has ended it has never run, and never will.
                        lifecycle::ended(&self.host, &record).await;
                        return Err(qemu_gone());
                    }
                    continue;
                }
                // It waits for longer than usual: its images are kept from others whatever becomes of this agent.
                () = tokio::time::sleep(POST), if !posted => {
                    self.host.fence.post(&record.name).await;
                    posted = true;
                    continue;
                }
                asked = self.next_request() => asked?,
            };
            match asked {
                Asked::Commit(commit) if self.is_of(&commit, &record) => {
                    let network = interfaces.take().map(|interfaces| (interfaces, known.neighbours));
                    return self.become_owner(&commit, spec, qmp, network, arrived).await;
                }
                Asked::Known(part) => known.take(part, &self.host, &record.name).await,
                Asked::Cancel(_) => {
                    known.forget().await;
                    let session = record.arrived_by.unwrap_or_default();
                    return self.withdraw(&record.name, session, Some(&qmp)).await;
                }
                // Nothing else decides, so nothing else is followed; the copy waits on, if need be without this connection.
                other if unexpected < MOST_UNEXPECTED => {
                    unexpected += 1;
                    tracing::warn!(vm = %record.name, %other, "unexpected while ready");
                }
                other => {
                    return Err(violation(&format!("sent {other} again and again, and the copy is ready")));
                }
            }
        }
    }

    fn is_of(&self, commit: &wire::Commit, record: &Record) -> bool {
        Some(commit.generation) == record.generation.checked_add(1)
            && session_of(commit).is_ok_and(|session| record.arrived_by == Some(session))
    }

    /// The source has given the machine away: it is this host's, and runs.
    ///
    /// `Running` is said only when QEMU runs the machine. Where it cannot, the copy is ended, and only when it is certain that it has
    /// not run is the source told that there is none, which lets it run the machine itself.
    async fn become_owner(
        &mut self,
        commit: &wire::Commit,
        spec: Spec,
        qmp: Qmp,
        network: Option<(Interfaces, Vec<Neighbour>)>,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        points::reach(Point::CommitHeard).await;
        let (name, session) = (name_of(commit)?, session_of(commit)?);
        let host = Arc::clone(&self.host);
        let deciding = host.journal.decide(&name).await;
        let event = self.committed(commit, session)?;
        // Somebody else may have decided since: a person, or the source on another connection.
        let Some(mut record) = host.journal.get(&name) else {
            return self.say(said(&ownership::on(None, event).effects), &name).await;
        };
        let images = record.made.images.clone();
        let becomes = becomes(&record, &event);
        let gone = || record.process.as_ref().is_some_and(|process| process.look().is_gone());
        // One that is this host's already may have been told to run, by an agent that did not hear of it.
        let untold = matches!(record.ownership, Ownership::Incoming { .. });
        if becomes.contains(&Effect::Resume) && untold && gone() {
            // It has not been told to run, and so has never run.
            drop(deciding);
            lifecycle::ended(&host, &record).await;
            let response =
                if self.mark(session)? == Some(Mark::NeverRan) { Response::NoCopy } else { Response::NotNow };
            return self.say(response, &name).await;
        }
        if becomes.contains(&Effect::Resume) {
            // Before the record says so: what nobody remembers to be a remnant is never removed as one.
            lifecycle::own_disks(&host, &record);
        }
        // Before anything runs: after a crash this host knows that the machine is its own, and resumes it.
        let own = |now: &mut Record| {
            if now.resuming {
                lifecycle::has_own_disks(now);
            }
        };
        let effects = host.journal.on(&mut record, event, own).map_err(|e| failed("journal", &e))?;
        if !effects.contains(&Effect::Resume) {
            return self.say(said(&effects), &name).await;
        }
        points::reach(Point::Owned).await;
        if untold && record.process.as_ref().is_some_and(Process::is_ending) {
            // It has been killed while its monitor is still open, and is not told to run.
            let never_ran = is_ended(&record).await;
            let ending = QmpError::Gone { socket: record.qmp_socket.clone(), command: "cont" };
            return self.not_resumed(record, images, never_ran, &ending).await;
        }
        let mut events = qmp.events();
        // QEMU locks its images itself when it is told to run, and finds them free.
        let cont = || qmp.cont();
        // What the guest sends while its interfaces are down is lost.
        let resumed = match network {
            Some((mut interfaces, neighbours)) => {
                interfaces.hold_back(&self.frames);
                lifecycle::raise_taps(&record).await;
                let play = async { interfaces.are_up(&self.frames, &neighbours) };
                tokio::join!(host.fence.hand_to(&record.name, cont), play).0
            }
            None => {
                lifecycle::raise_taps(&record).await;
                host.fence.hand_to(&record.name, cont).await
            }
        };
        if let Err(e) = resumed {
            let never_ran = never_ran(&qmp, &mut events, &e).await && is_ended(&record).await;
            return self.not_resumed(record, images, never_ran, &e).await;
        }
        points::reach(Point::Resumed).await;
        self.reply(Reply::Running(wire::Running::default())).await.unwrap_or_else(|e| {
            tracing::warn!(vm = %record.name, ?e, "the source could not be told that its VM runs here");
        });
        if let Err(e) = host.journal.on(&mut record, Event::Resumed, |_| {}) {
            tracing::error!(vm = %record.name, error = chain(&e), "the journal still says that the VM is resuming");
            tokio::spawn(insist(Arc::clone(&host), record.clone()));
        }
        host.fence.taken(images.iter().map(|image| image.path.as_path()));
        // Those that it does not use any more are kept on.
        host.fence.take_again(&record.name).await;
        drop(deciding);
        tracing::info!(vm = %record.name, from = %self.peer, "a VM has arrived and runs");
        places::give(&host, &record);
        let process = record.process.clone();
        let has_network = !spec.nics().is_empty();
        settings::give_back(&host.journal, &mut record, &qmp).await;
        let owned = record.clone();
        host.guest_addresses.listen(&record, &spec);
        arrived(Vm { record, spec, qmp: qmp.clone() });
        if has_network && let Err(e) = qmp.announce_self().await {
            tracing::warn!(error = chain(&e), "QEMU did not announce the VM's new place");
        }
        let redirect = network::redirect(&host, owned.clone());
        let watch = async {
            if let Some(tail) = self.host.post_copies.get(session) {
                tail.monitor(qmp.clone());
            }
            self.supplied(session).await?;
            Ok::<_, End>(health::watch(&qmp, process.as_ref()).await)
        };
        let watched = watch.await;
        let played = std::mem::take(&mut self.frames).finish().await;
        tracing::info!(vm = %name, played.delivered, played.dropped, "what was on its way to the VM has reached it");
        let told = match watched {
            Ok(health) => {
                let redirected = timeout(REDIRECT, redirect).await;
                let problem =
                    redirected.map_or_else(|_| Some(still_redirecting(&host)), |ended| ended.ok()?.err());
                let problems = problem.into_iter().map(Into::into).collect();
                let frames_dropped = played.dropped;
                self.reply(Reply::Health(wire::Health { problems, frames_dropped, ..health })).await
            }
            Err(end) => Err(end),
        };
        network::is_home(&host, &owned).await;
        told?;
        // The source says so, or closes, when it has given everything back.
        if let Ok(Ok(Asked::Release(_))) = timeout(FIRST_REQUEST, self.next_request()).await {
            host.journal.released(session);
        }
        Ok(())
    }

    /// The machine is on record as this host's, but QEMU has not said that it runs it. Only if it is certain that it never ran, and
    /// cannot any more, is it said that there is no copy.
    async fn not_resumed(
        &mut self,
        mut record: Record,
        images: Vec<MadeImage>,
        never_ran: bool,
        error: &QmpError,
    ) -> Result<(), End> {
        let images_back = |now: &mut Record| {
            if never_ran {
                now.made.images = images;
            }
        };
        let event = Event::NotResumed { never_ran };
        let effects =
            self.host.journal.on(&mut record, event, images_back).map_err(|e| failed("journal", &e))?;
        for effect in effects {
            match effect {
                Effect::Discard(mark) => {
                    let gone = lifecycle::forget_decided(&self.host, &record, None, mark).await;
                    gone.map_err(|why| End::Failed(vec![why]))?;
                }
                Effect::Respond(Response::NoCopy) => {
                    tracing::error!(vm = %record.name, error = chain(error), "a VM could not be resumed here and goes back");
                    return Err(no_copy(record.name.as_ref()));
                }
                _ => {}
            }
        }
        tracing::error!(vm = %record.name, error = chain(error), "it is not certain whether a VM was resumed here");
        Err(failed("not-resumed", error))
    }

    /// A source that has handed a machine over, and does not know what became of it, asks again.
    pub(super) async fn settle(
        &mut self,
        commit: &wire::Commit,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        let (name, session) = (name_of(commit)?, session_of(commit)?);
        let event = self.committed(commit, session)?;
        let record = self.host.journal.get(&name);
        let effects = match &record {
            Some(record) => becomes(record, &event),
            None => ownership::on(None, event).effects,
        };
        let Some(record) = record.filter(|_| effects.contains(&Effect::Resume)) else {
            return self.say(said(&effects), &name).await;
        };
        let spec = Spec::parse(&record.argv).map_err(|e| failed("journal", &e))?;
        match Qmp::connect(&record.qmp_socket).await {
            Ok(qmp) => {
                tracing::info!(vm = %record.name, %session, "the source settles a hand-over: the VM is ours");
                let neighbours = self.host.guest_addresses.known(&record, &spec);
                let network = Some((Interfaces::to_announce(&record, &spec), neighbours));
                self.become_owner(commit, spec, qmp, network, arrived).await
            }
            // A ready copy whose QEMU is gone has never run.
            Err(_) if lifecycle::ended(&self.host, &record).await => {
                let mark = self.mark(session)?;
                let response = if mark == Some(Mark::NeverRan) { Response::NoCopy } else { Response::NotNow };
                self.say(response, &name).await
            }
            Err(e) => Err(failed("qemu", &e)),
        }
    }

    /// A source that has kept its machine wants no copy left here.
    pub(super) async fn abandon(&mut self, commit: &wire::Commit) -> Result<(), End> {
        let (name, session) = (name_of(commit)?, session_of(commit)?);
        self.withdraw(&name, session, None).await
    }

    /// Decides at once, and does what was decided: in between nobody makes the copy a machine of this host.
    async fn withdraw(&mut self, name: &VmName, session: Uuid, qmp: Option<&Qmp>) -> Result<(), End> {
        let _deciding = self.host.journal.decide(name).await;
        let event = Event::Cancelled { session, from: self.peer.name.clone(), mark: self.mark(session)? };
        let record = self.host.journal.get(name);
        let effects = match &record {
            Some(record) => becomes(record, &event),
            None => ownership::on(None, event).effects,
        };
        if let (Some(record), Some(Effect::Discard(mark))) = (&record, effects.first()) {
            // A source is told that nothing of the copy is left only when that is certain.
            let gone = lifecycle::forget_decided(&self.host, record, qmp, *mark).await;
            gone.map_err(|why| End::Failed(vec![why]))?;
            if self.host.journal.get(name).is_some_and(|now| now.claim() == record.claim()) {
                return Err(still_there(name));
            }
        }
        self.say(said(&effects), name).await
    }

    /// Its source keeps nothing of a machine that was handed over, or has taken it back.
    pub(super) fn let_go(&self, commit: &wire::Commit) -> Result<(), End> {
        let (name, session) = (name_of(commit)?, session_of(commit)?);
        let here = self.host.journal.get(&name);
        let others = |record: &Record| record.arrived_from.as_ref() != Some(&self.peer.name);
        if here.filter(|record| record.arrived_by == Some(session)).is_some_and(|record| others(&record)) {
            return Err(violation("lets go of a VM that it has not sent"));
        }
        self.host.journal.released(session);
        Ok(())
    }

    /// Whose a machine is, for the agent that has a copy of it; for any other it is one that nobody knows.
    pub(super) async fn whose(&mut self, commit: &wire::Commit) -> Result<(), End> {
        let (name, session) = (name_of(commit)?, session_of(commit)?);
        let standing = self.host.journal.get(&name).map(|record| record.standing());
        let says = concerned::whose(standing.as_ref(), session, &self.peer.name);
        if says != SourceSays::Unknown && self.host.journal.is_unsettled(&name) {
            // What it says here may not be what a later start of the agent finds.
            return Err(End::Failed(vec![Finding::new(
                kind::BUSY,
                format!("whose VM {name} is cannot be put on record on {}", self.host.name),
                "see to the disk of state_dir there, and ask again",
            )]));
        }
        let owner = match says {
            SourceSays::Mine => wire::Owner::Mine,
            SourceSays::Yours => wire::Owner::Yours,
            SourceSays::Unknown | SourceSays::Unheard => wire::Owner::Unknown,
        };
        self.reply(Reply::Belongs(wire::Belongs { owner: owner.into() })).await
    }

    fn committed(&self, commit: &wire::Commit, session: Uuid) -> Result<Event, End> {
        let from = self.peer.name.clone();
        Ok(Event::Committed { session, from, generation: commit.generation, mark: self.mark(session)? })
    }

    fn mark(&self, session: Uuid) -> Result<Option<Mark>, End> {
        self.host.journal.mark(session).map_err(|e| failed("journal", &e))
    }

    async fn say(&mut self, response: Response, name: &VmName) -> Result<(), End> {
        match response {
            Response::Running => self.reply(Reply::Running(wire::Running::default())).await,
            Response::Ready => self.reply(Reply::Ready(wire::Nothing {})).await,
            Response::NoCopy => Err(no_copy(name.as_ref())),
            Response::Cancelled => Err(End::Cancelled),
            Response::Unknown => Err(unknown_copy(&self.host.name, name.as_ref())),
            Response::NotNow => Err(qemu_gone()),
        }
    }

    pub(super) fn meant(&self, commit: &wire::Commit) -> Option<(Record, Uuid)> {
        let session = Uuid::from_slice(&commit.session).ok()?;
        let record = self.host.journal.get(&commit.name.parse().ok()?)?;
        record.standing().came_by(session, &self.peer.name).then_some((record, session))
    }
}

/// What an event would come to.
fn becomes(record: &Record, event: &Event) -> Vec<Effect> {
    ownership::on(Some(&record.standing()), event.clone()).effects
}

/// What the source is told.
fn said(effects: &[Effect]) -> Response {
    let response = |effect: &Effect| match effect {
        Effect::Respond(response) => Some(*response),
        _ => None,
    };
    effects.iter().find_map(response).unwrap_or(Response::NotNow)
}

fn session_of(commit: &wire::Commit) -> Result<Uuid, End> {
    Uuid::from_slice(&commit.session).map_err(|_| violation("names no migration"))
}

fn name_of(commit: &wire::Commit) -> Result<VmName, End> {
    commit.name.parse().map_err(|_| violation("names no VM"))
}

/// Whether QEMU has certainly not run the guest: it refused to, or says that the guest has not, and told of no beginning.
async fn never_ran(qmp: &Qmp, events: &mut broadcast::Receiver<qemu::qmp::Event>, error: &QmpError) -> bool {
    let Ok(state) = qmp.status().await else { return false };
    if state.running || !lifecycle::NEVER_RAN.contains(&state.status.as_str()) {
        return false;
    }
    if matches!(error, QmpError::Refused { .. }) {
        return true;
    }
    loop {
        match events.try_recv() {
            Ok(event) if event.name == "RESUME" => return false,
            Ok(_) => {}
            Err(TryRecvError::Empty) => return true,
            // What was missed may have been that.
            Err(TryRecvError::Lagged(_) | TryRecvError::Closed) => return false,
        }
    }
}

async fn is_ended(record: &Record) -> bool {
    match &record.process {
        Some(process) => {
            let _ = process.kill();
            process.wait_for_end(KILL_GRACE).await
        }
        None => false,
    }
}

/// Puts on record that a machine runs, until it is.
async fn insist(host: Arc<ReceivingHost>, mut record: Record) {
    while let Err(e) = host.journal.on(&mut record, Event::Resumed, |_| {}) {
        if !matches!(e, ownership::JournalError::Io { .. }) {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn still_there(name: &VmName) -> End {
    let message = format!("the copy of VM {name} cannot be thrown away");
    End::Failed(vec![Finding::new("not-ended", message, "see the log of the destination's agent")])
}

fn still_redirecting(host: &Host) -> Finding {
    Finding::new(
        "hook-slow",
        format!("hook network-redirect on {} has not ended yet", host.name),
        "see the log of that agent for how it ends",
    )
}

#[cfg(test)]
mod tests;
