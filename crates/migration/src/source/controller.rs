//! The source's controller: the phases of a migration, one after the other.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use compression::Compression;
use futures::FutureExt as _;
use link::{AbortHandle, Bandwidth, DataSender};
use mirror::hash::Secret;
use mirror::layout::Layout;
use mirror::memory::round::Guest;
use serde_json::Value;
use uuid::Uuid;

use super::capabilities;
use super::commands::Commands;
use super::devices::{Alone, Devices};
use super::disks::{self, Disks};
use super::earlier;
use super::forwarding;
use super::held::{Controller, Held};
use super::network::Network;
use super::peer::{self, Destination};
use super::reporting::blank;
use super::request;
use super::rounds::{Begin, Rounds};
use super::stop::{Stop, nothing_held};
use super::switch::{self, Fencing, Prepared};
use super::throttle::Throttling;
use crate::disks::Disk;
use crate::linked::LinkedHost;
use crate::machine::Machine;
use finding::{Finding, chain, kind};
use host::Vm;
use host::firewall;
use host::paths::{self, Paths};
use host::settings::Settings;
use movable::confinement;
use ownership::Event;
use protocol::wire::{self, Request};
use session::Session;
use session::options::{Compress, Engine, Goal, Options};
use session::progress::Progress;
use session::report::{DiskMode, Outcome, Phase, Report, Verdict, Verification};

impl Controller {
    /// Starts a controller on a task of its own.
    pub(super) fn start(
        host: Arc<LinkedHost>,
        mut vm: Vm,
        to: String,
        goal: Goal,
        options: Options,
    ) -> Session {
        // The journal is the truth; the caller's copy may be older than the last attempt.
        if let Some(record) = host.journal.get(&vm.record.name) {
            vm.record = record;
        }
        let id = Uuid::new_v4();
        let begin = Instant::now();
        let first = Progress {
            id: id.to_string(),
            vm: vm.record.name.to_string(),
            source: host.name.clone(),
            destination: to.clone(),
            goal,
            phase: Phase::Initialize,
            elapsed_ms: 0.0,
            rounds: 0,
            total_bytes: vm.record.memory,
            remaining_bytes: vm.record.memory,
            raw_bytes: 0,
            wire_bytes: 0,
            throughput: 0.0,
            dirty_rate: 0.0,
            predicted_downtime_ms: None,
            time_left_ms: None,
            in_sync: false,
            verification: Verification::default(),
            warning: None,
            throttle: 0.0,
            disks: Vec::new(),
        };
        let report = blank(id, &host, &vm, &to, &options);
        let (session, conductor) = Session::new(id, first);
        let bandwidth = Bandwidth::within(&host.bandwidth, options.bandwidth);
        let (commands, following) = Commands::follow(conductor.commands, bandwidth);
        let progress = conductor.progress;
        let done = conductor.report;
        let controller = Controller {
            host,
            vm,
            to,
            goal,
            options,
            id,
            begin,
            commands,
            progress,
            report,
            held: Held::default(),
            post_copy: false,
            hardware: None,
            keeper: None,
            alone: None,
        };
        tokio::spawn(async move {
            let report = controller.run().await;
            following.abort();
            let _ = done.send(Some(Arc::new(report)));
        });
        session
    }

    /// The whole migration, and its report.
    async fn run(mut self) -> Report {
        tracing::info!(vm = %self.vm.record.name, to = self.to, session = %self.id, "migration begins");
        // Where it is in another host's network it stays so: what is on record of that is ours now.
        let held = self.host.forwards.hold(&self.vm.record.name);
        if let Some(record) = self.host.journal.get(&self.vm.record.name) {
            self.vm.record = record;
        }
        let cancel = self.commands.cancel.clone();
        let until_handed_over = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Stop::Cancelled),
            // A defect must not leave the guest paused: the way back is the same as from any failure.
            reached = AssertUnwindSafe(self.until_ready(held.is_some())).catch_unwind() => reached.unwrap_or_else(|_| Err(defect())),
        };
        let ended = match until_handed_over {
            Ok(_) if cancel.is_cancelled() => Err(Stop::Cancelled),
            Ok(prepared) => self.hand_over(prepared).await,
            Err(stop) => Err(stop),
        };
        match ended {
            Ok(()) => self.after_hand_over().await,
            Err(Stop::Uncertain(finding)) => {
                self.close(Outcome::Uncertain, Some(Stop::Uncertain(finding)));
                self.release().await;
            }
            Err(stop) => self.undo(stop).await,
        }
        paths::part(&self.host, &self.vm.record.name);
        self.finish_report();
        self.report
    }

    /// Every phase in which the machine can still stay.
    async fn until_ready(&mut self, held: bool) -> Result<Prepared, Stop> {
        self.enter(Phase::Initialize).await;
        if !held {
            let message = format!("VM {} is being released from another host's network", self.vm.record.name);
            return Err(Stop::Refused(vec![Finding::new("busy", message, "try again when that has ended")]));
        }
        self.is_noted().await?;
        paths::meet(&self.host, &self.vm.record)
            .map_err(|e| Stop::because("run-dir", &e, "see to the source agent's run_dir"))?;
        let machine = self.initialize().await?;
        self.enter(Phase::Reserve).await;
        let (layout, secret, reserved) = self.reserve(&machine).await?;
        if self.options.engine == Engine::Qemu {
            return self.by_qemu().await;
        }
        self.enter(Phase::Prepare).await;
        self.prepare(machine, layout, secret, reserved).await?;
        self.enter(Phase::Synchronize).await;
        self.synchronize().await?;
        self.enter(Phase::Verify).await;
        self.verify().await?;
        self.enter(Phase::SwitchOver).await;
        self.switch_over().await
    }

    /// What came here and could not be put on record as running since is so now, before it is paused: its former source may ask about it
    /// again at any time, and would have it resumed in the middle of its switch-over.
    async fn is_noted(&mut self) -> Result<(), Stop> {
        if self.vm.record.resuming {
            let _deciding = self.host.journal.decide(&self.vm.record.name).await;
            self.host.journal.on(&mut self.vm.record, Event::Resumed, |_| {})?;
        }
        Ok(())
    }

    /// Link up, versions and identities agreed; the machine looked at.
    async fn initialize(&mut self) -> Result<Machine, Stop> {
        let options = self.options.validate();
        if self.goal == Goal::Mirror && self.options.engine == Engine::Qemu {
            return Err(Stop::Refused(vec![Finding::new(
                "bad-option",
                "QEMU's own stream cannot be kept standing as a mirror",
                "use `vmirror migrate`, or --engine mirror",
            )]));
        }
        options.map_err(|e| Stop::Refused(vec![Finding::new("bad-option", chain(&e), "see --help")]))?;
        let connected = Destination::connect(&self.host, &self.to).await;
        let (machine, mut findings) = Machine::describe(&self.host, &self.vm, &self.options).await;
        match connected {
            Ok(destination) => {
                self.report.destination = destination.name().to_owned();
                self.held.destination = Some(destination);
            }
            Err(finding) => findings.insert(0, finding),
        }
        match machine.filter(|_| findings.is_empty()) {
            Some(machine) => {
                self.hardware = Some(machine.hardware.clone());
                Ok(machine)
            }
            None => Err(Stop::Refused(findings)),
        }
    }

    /// The destination sets everything aside.
    async fn reserve(&mut self, machine: &Machine) -> Result<(Layout, Secret, wire::Reserved), Stop> {
        let streams = self.streams();
        let layout = Layout::new(machine.ram.iter().map(|block| (block.id.as_str(), block.size)), streams)
            .map_err(|e| Stop::because("ram", &e, "see the VM's command line"))?;
        let secret =
            Secret::random().map_err(|e| Stop::because("random", &e, "see to the host's random numbers"))?;
        let firewall = firewall::describe(&self.host, &self.vm.record.name).await;
        let mut request = request::reserve(
            &self.host,
            self.id,
            &self.vm,
            machine,
            &self.options,
            streams,
            secret.as_bytes(),
            false,
        );
        request.nft = firewall.map_err(|finding| Stop::Refused(vec![finding]))?;
        if self.options.forward && !machine.taps.is_empty() {
            request.forward = Some(forwarding::request(&self.host));
            let destination = self.held.destination.as_ref().ok_or_else(nothing_held)?;
            let begun = forwarding::begin(&self.host, &self.vm, destination, self.id, &machine.taps).await;
            begun.map_err(|finding| Stop::Refused(vec![finding]))?;
        }
        self.report.disks = machine.disks.iter().map(Disk::reported).collect();
        self.report.memory.pages = layout.page_count();
        let qmp = self.vm.qmp.clone();
        request.link_port = self.host.link_port.get().copied().map_or(0, u32::from);
        let to = self.destination()?.name().to_owned();
        if let Some(finding) = earlier::too_many(&self.host, &self.vm.record.name, &to) {
            return Err(Stop::Refused(vec![finding]));
        }
        let reserved = self.destination()?.reserve(request, &qmp).await?;
        earlier::replaced(&self.host, &self.vm.record.name, &to);
        self.keeper = Uuid::from_slice(&reserved.keeper).ok();
        for number in &reserved.mirrored {
            let disk = usize::try_from(*number).ok().and_then(|number| self.report.disks.get_mut(number));
            disk.ok_or_else(|| peer::violation("wants a disk that there is not"))?.mode = DiskMode::Mirrored;
        }
        Ok((layout, secret, reserved))
    }

    /// Data streams open, tracking begins.
    async fn prepare(
        &mut self,
        machine: Machine,
        layout: Layout,
        secret: Secret,
        reserved: wire::Reserved,
    ) -> Result<(), Stop> {
        let address = self.destination()?.address().to_owned();
        let (endpoint, session) = (self.host.endpoint.clone(), self.id);
        let bandwidth = Arc::clone(&self.commands.bandwidth);
        let switch_cost = self.host.switch_cost.expected();
        let compression = match self.options.compress {
            Compress::Auto => Compression::Auto,
            Compress::Off => Compression::Off,
            Compress::Lz4 => Compression::Lz4,
            Compress::Zstd => Compression::Zstd,
        };
        let Some(process) = self.vm.record.process.clone() else {
            return Err(Stop::Failed(Finding::new(
                "qemu-gone",
                "the VM has no process",
                "see `vmirror show`",
            )));
        };
        self.alone = machine.saves_devices().then(|| Alone {
            process: process.clone(),
            machine: machine.machine.clone(),
            mirrored: machine.ram.iter().map(|block| block.id.clone()).collect(),
        });
        let places = self.disk_places();
        self.held.clears = !reserved.mirrored.is_empty();
        if machine.direct_disks || (self.held.clears && disks::has_jobs(&self.vm.qmp).await) {
            // Before the guest is stopped for the first time: an agent that ends in between is to let it go on.
            self.host.journal.amend(&mut self.vm.record, |now| now.pauses = true)?;
        }
        let (qmp, streams) = (self.vm.qmp.clone(), layout.streams());
        let prepared =
            Disks::prepare(&qmp, &machine.disks, &reserved, secret.clone(), streams, places).await?;
        let (storage, lanes) = match prepared {
            Some((disks, lanes)) => (Some(self.held.disks.insert(disks).storage()), lanes),
            None => (None, Vec::new()),
        };
        let mut network = Network::of(machine.taps.clone());
        network.prepare(&endpoint, &address, session, process.pid).await;
        self.held.network = Some(network);
        let gives_back = self.vm.spec.gives_memory_back();
        let known_filters = confinement::known(&self.host, &self.vm.record, &self.vm.spec);
        let quiesce = machine.direct_disks.then(|| self.vm.qmp.clone());
        let preparing = self.held.preparing.insert(tokio::task::spawn_blocking(move || {
            let mut sinks: Vec<DataSender> = Vec::new();
            let mut aborts: Vec<AbortHandle> = Vec::new();
            for stream in 0..streams {
                let sink =
                    endpoint.open_data(&address, session, stream, Arc::clone(&bandwidth)).map_err(|e| {
                        Stop::because("data-stream", &e, "see the log of the destination's agent")
                    })?;
                aborts.push(sink.abort_handle().map_err(|e| {
                    Stop::because("data-stream", &e, "raise the agent's limit of open files")
                })?);
                sinks.push(sink);
            }
            let (pid, ram, kvm) = (process.pid, machine.ram, machine.kvm);
            Rounds::begin(Begin {
                pid,
                known_filters,
                gives_back,
                ram,
                layout,
                secret,
                kvm,
                sinks,
                aborts,
                switch_cost,
                compression,
                quiesce,
                storage,
                lanes,
            })
        }));
        let begun = preparing.await;
        self.held.preparing = None;
        let rounds = begun.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))??;
        self.report.tracking_hold_ms = rounds.hold.as_secs_f64() * 1e3;
        self.held.rounds = Some(rounds);
        let Held { destination: Some(destination), disks, .. } = &mut self.held else {
            return Err(nothing_held());
        };
        match disks {
            Some(disks) => disks.begin(&self.vm.qmp, destination, !reserved.known.is_empty()).await,
            None => Ok(()),
        }
    }

    /// Pause, last rounds, gate, device state, until the destination is ready.
    async fn switch_over(&mut self) -> Result<Prepared, Stop> {
        let predicted = self.rounds()?.estimate.downtime().unwrap_or_default();
        self.report.downtime_predicted_ms = predicted.as_secs_f64() * 1e3;
        let streams = match self.post_copy {
            true => Some(self.prepare_post_copy().await?),
            false => None,
        };
        self.raise_tunnels().await?;
        switch::may_migrate(&self.vm.qmp).await?;
        let devices = self.devices().await?;
        self.offer()?;
        if let Some(network) = &mut self.held.network {
            network.look(&self.host, &self.vm.record.name).await;
        }
        let Held {
            destination: Some(destination),
            rounds: Some(rounds),
            disks,
            throttling,
            network,
            qemu,
            ..
        } = &mut self.held
        else {
            return Err(nothing_held());
        };
        let name = self.vm.record.name.clone();
        let fencing = Fencing { fence: &self.host.fence, vm: &name };
        let (journal, record) = (&self.host.journal, &mut self.vm.record);
        let stops = devices.are_alone();
        // It is stopped by us: whoever finds it so is to let it run.
        let about_to_pause = || match stops {
            true => Ok(journal.amend(record, |now| now.pauses = true)?),
            false => Ok(()),
        };
        let slowed = &mut self.report.throttle;
        // Paused for good, the guest need not be slowed any more.
        let paused = || *slowed = throttling.take().map(Throttling::end);
        let prepared = switch::prepare(
            &self.vm.qmp,
            (rounds, (disks, fencing), network),
            destination,
            devices,
            &self.options,
            streams,
            qemu,
            (about_to_pause, paused),
        )
        .await;
        match prepared {
            Ok(prepared) => {
                self.report.verification.gate = Verdict::Match;
                Ok(prepared)
            }
            Err(Stop::Failed(finding)) if finding.kind == kind::GATE => {
                self.report.verification.gate = Verdict::Mismatch;
                Err(Stop::Failed(finding))
            }
            Err(stop) => Err(stop),
        }
    }

    /// The devices, ready to be saved; QEMU is set up for that.
    async fn devices(&mut self) -> Result<Devices, Stop> {
        if self.alone.is_some() {
            self.devices_are_ready().await?;
            return self.held.devices.take().ok_or_else(nothing_held);
        }
        self.held.configured = true;
        self.set_up_qemu(&capabilities::DEVICES_ONLY, Value::Null).await?;
        Devices::by_migration(&self.vm.qmp, &Paths::of(&self.host, &self.vm.record.name).device)
    }

    /// Makes ready what of the devices can be before the pause. True if it was: where RAM of the machine's own had to be sent first, the
    /// guest has gone on writing meanwhile.
    pub(super) async fn devices_are_ready(&mut self) -> Result<bool, Stop> {
        let Some(alone) = self.alone.as_ref().filter(|_| self.held.devices.is_none()) else {
            return Ok(true);
        };
        let sender = self.held.destination.as_ref().ok_or_else(nothing_held)?.sender();
        let devices = Devices::by_themselves(&self.vm.qmp, alone, self.id, &sender).await?;
        self.held.devices = Some(devices);
        Ok(false)
    }

    /// Has QEMU's own migration be as ours needs it, whatever another tool has left it at. What it was is on record before that.
    pub(super) async fn set_up_qemu(&mut self, on: &[&str], parameters: Value) -> Result<(), Stop> {
        let before = Settings::of(&self.vm.qmp).await.map_err(Stop::qemu)?;
        self.host.journal.amend(&mut self.vm.record, |now| now.settings = Some(before.clone()))?;
        before.replace(&self.vm.qmp, on, parameters).await.map_err(Stop::qemu)
    }

    /// The machine is about to leave, and to stay in the network here.
    pub(super) async fn raise_tunnels(&self) -> Result<(), Stop> {
        self.host.forwards.raise(self.id).await.map_err(Stop::Failed)
    }

    pub(super) async fn end_preparing(&mut self) {
        if let Some(preparing) = self.held.preparing.take()
            && let Ok(Ok(rounds)) = preparing.await
        {
            rounds.end().await;
        }
    }

    pub(super) async fn end_rounds(&mut self) {
        if let Some(rounds) = self.held.rounds.take() {
            let found = rounds.verification();
            let told = &mut self.report.verification;
            (told.audited_pages, told.repaired_pages) = (found.audited_pages, found.repaired_pages);
            (told.audited_blocks, told.repaired_blocks) = (found.audited_blocks, found.repaired_blocks);
            self.report.quiesced.clone_from(&rounds.quiesced);
            self.report.rounds = rounds.report.clone();
            self.report.memory = rounds.totals.clone();
            // More than the rounds where the last one was not finished.
            self.report.memory.raw_bytes = rounds.flow.raw_bytes();
            self.report.memory.wire_bytes = rounds.flow.wire_bytes();
            rounds.end().await;
        }
    }

    pub(super) async fn release(&mut self) {
        if let Some(network) = self.held.network.take() {
            network.abandon();
        }
        self.end_rounds().await;
        self.end_relay().await;
        if let Some(destination) = self.held.destination.take()
            && !self.held.keeps
        {
            let _ = destination.send(Request::Release(wire::Nothing {})).await;
        }
    }

    pub(super) async fn round(&mut self, guest: Guest) -> Result<(), Stop> {
        let (progress, begin) = (self.progress.clone(), self.begin);
        let (destination, rounds) = self.held.both().ok_or_else(nothing_held)?;
        let (flow, first) = (Arc::clone(&rounds.flow), rounds.report.is_empty());
        tokio::select! {
            done = rounds.round(destination, guest) => done,
            never = super::reporting::follow(&progress, begin, &flow, first) => match never {},
        }
    }

    /// Where everything is put that the machine's disks need here.
    pub(super) fn disk_places(&self) -> disks::Places {
        disks::Places {
            directory: Paths::of(&self.host, &self.vm.record.name).own,
            private: self.host.run_dir.clone(),
            machine: self.vm.record.name.to_string(),
            binary: self.vm.spec.binary().to_owned(),
        }
    }
}

fn defect() -> Stop {
    Stop::Failed(Finding::new(
        "agent",
        "the migration controller has panicked",
        "report this with the agent's log",
    ))
}
