//! A migration under way, and what it holds.

use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use uuid::Uuid;

use super::commands::Commands;
use super::devices::{Alone, Devices};
use super::disks::Disks;
use super::network::Network;
use super::peer::Destination;
use super::relay::Relay;
use super::rounds::Rounds;
use super::stop::{Stop, nothing_held};
use super::supplying::Supplying;
use super::throttle::Throttling;
use crate::hardware::Hardware;
use crate::linked::LinkedHost;
use host::Vm;
use session::options::{Engine, Goal, Options};
use session::progress::Progress;
use session::report::Report;

/// Most data streams that an agent chooses by itself.
const CHOSEN_STREAMS: usize = 4;

/// A migration under way.
pub(super) struct Controller {
    pub(super) host: Arc<LinkedHost>,
    pub(super) vm: Vm,
    pub(super) to: String,
    pub(super) goal: Goal,
    pub(super) options: Options,
    pub(super) id: Uuid,
    pub(super) begin: Instant,
    pub(super) commands: Commands,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) report: Report,
    pub(super) held: Held,
    /// The machine is handed over before its memory is complete.
    pub(super) post_copy: bool,
    /// What was plugged into the machine when it was described.
    pub(super) hardware: Option<Hardware>,
    /// Identity of the destination's state directory, where it tells one.
    pub(super) keeper: Option<Uuid>,
    /// What has to be known to save its devices alone, where they are.
    pub(super) alone: Option<Alone>,
}

/// What must be given back, whatever happens.
#[derive(Default)]
pub(super) struct Held {
    pub(super) destination: Option<Destination>,
    pub(super) rounds: Option<Rounds>,
    /// The disks that are mirrored.
    pub(super) disks: Option<Disks>,
    /// Something of ours may be in QEMU's block graph.
    pub(super) clears: bool,
    /// The thread that opens streams and begins tracking: to be waited for even when nobody wants its result.
    pub(super) preparing: Option<tokio::task::JoinHandle<Result<Rounds, Stop>>>,
    /// QEMU's own stream, where that carries the memory.
    pub(super) relay: Option<Relay>,
    /// QEMU's migration was set up for this, and is to be put back as it was.
    pub(super) configured: bool,
    /// QEMU was told to migrate: who is paused now was paused by that.
    pub(super) qemu: bool,
    /// Something of the machine is left here that was handed over: the destination is asked about it again.
    pub(super) keeps: bool,
    /// The guest's CPUs, slowed.
    pub(super) throttling: Option<Throttling>,
    /// Memory that was left out, on its way.
    pub(super) supplying: Option<Supplying>,
    /// The guest's network.
    pub(super) network: Option<Network>,
    /// Devices that are saved by themselves, as soon as they are ready.
    pub(super) devices: Option<Devices>,
}

impl Held {
    /// Does something that takes long with the disks, if there are any, and hears meanwhile what the destination says: a link that is
    /// lost ends it.
    pub(super) async fn while_connected<'a, T, F>(
        &'a mut self,
        work: impl FnOnce(&'a Disks) -> F,
    ) -> Result<T, Stop>
    where
        T: Default,
        F: Future<Output = Result<T, Stop>> + Send,
    {
        let Held { destination: Some(destination), rounds: Some(rounds), disks: Some(disks), .. } = self
        else {
            return Ok(T::default());
        };
        let mut working = pin!(work(disks));
        loop {
            tokio::select! {
                done = &mut working => return done,
                reply = destination.receive() => rounds.note(reply?)?,
            }
        }
    }

    pub(super) fn both(&mut self) -> Option<(&mut Destination, &mut Rounds)> {
        Some((self.destination.as_mut()?, self.rounds.as_mut()?))
    }
}

impl Controller {
    pub(super) fn streams(&self) -> u16 {
        if self.options.engine == Engine::Qemu {
            return 1;
        }
        self.options.streams.map_or_else(chosen_streams, u16::from)
    }

    pub(super) fn destination(&mut self) -> Result<&mut Destination, Stop> {
        self.held.destination.as_mut().ok_or_else(nothing_held)
    }

    pub(super) fn rounds(&self) -> Result<&Rounds, Stop> {
        self.held.rounds.as_ref().ok_or_else(nothing_held)
    }
}

/// As many data streams as there are cores, to a limit.
pub(super) fn chosen_streams() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(cores.min(CHOSEN_STREAMS)).unwrap_or(1)
}
