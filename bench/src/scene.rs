//! What the demo and the comparison both move: a guest under vmirror's agents, and its twin in plain QEMU processes.

use std::net::Ipv4Addr;
use std::time::Duration;

use testbed::guest_spec::Nic;
use testbed::{AgentOptions, Console, GuestSpec, Host, Testbed};

use crate::baseline::Twin;
use crate::error::BenchError;
use crate::measure::{Beats, with_heartbeats};
use crate::mirrored::{self, NAME};
use crate::run::Run;

/// The name of the guest that QEMU moves itself.
pub const TWIN: &str = "twin";
/// The guests' addresses, vmirror's first.
pub const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 88, 0, 10), Ipv4Addr::new(10, 88, 0, 11)];
/// How long the guests may take to boot and to fill their memory, on a machine with much other work.
pub const BOOT: Duration = Duration::from_secs(300);
/// How much a guest checks of itself per second, in pages: 8 MiB, which leaves an emulated CPU to its workload.
const CHECK_RATE: u64 = 2048;

/// Starts the agents, and lays what the guests' networks need if they have one.
pub fn prepare(bed: &Testbed, options: &AgentOptions, network: bool) -> Result<(), BenchError> {
    for host in bed.hosts() {
        host.start_agent_with(options)?;
        if network {
            host.add_tap(TWIN)?;
        }
    }
    if network {
        // At the other host vmirror makes it.
        bed.a().add_tap(NAME)?;
    }
    Ok(())
}

/// What both guests have in common.
pub fn spec(bed: &Testbed, name: &str, network: bool) -> Result<GuestSpec, BenchError> {
    let address = ADDRESSES[usize::from(name == TWIN)];
    Ok(GuestSpec {
        check_rate: Some(CHECK_RATE),
        nic: network.then(|| Nic::new(name, address.octets()[3])),
        // QEMU names its threads only when told to, and the twin's are told apart by name.
        extra: vec!["-name".into(), format!("{name},debug-threads=on")],
        ..GuestSpec::new(bed.a().serial(name))?
    })
}

/// Both guests, and the hosts that they are on.
pub struct Scene {
    // In the order in which they are to go.
    pub twin: Option<Twin>,
    pub bed: Testbed,
    pub console: Console,
    pub run: Run,
}

impl Scene {
    /// Boots the guests, the one of QEMU's where there is to be one, and tells of each.
    pub fn boot(
        bed: Testbed,
        spec: &GuestSpec,
        twin: Option<&GuestSpec>,
        run: &Run,
        mut tell: impl FnMut(&str),
    ) -> Result<Self, BenchError> {
        mirrored::start(bed.a(), spec)?;
        tell(&format!(
            "{NAME} was started on host-a with `vmirror run` (process {}); its memory: {} MiB, {} MiB of them filled",
            mirrored::pid(bed.a())?,
            spec.memory_mib,
            spec.fill_mib
        ));
        let consoles: Vec<_> =
            [Some(spec), twin].into_iter().flatten().map(|spec| Console::new(&spec.serial)).collect();
        let twin = twin.map(|spec| Twin::boot(bed.hosts(), spec, run)).transpose()?;
        if let Some(twin) = &twin {
            tell(&format!(
                "{TWIN}, an equal guest in a plain QEMU (process {}), for QEMU's own migration",
                twin.pid()
            ));
        }
        run.wait("the guests to boot", BOOT, || {
            let ready = consoles.iter().all(|console| console.is_ready() && console.status().is_some());
            Ok(ready.then_some(()))
        })?;
        tell("booted; memory is filled and the guests' ports answer");
        Ok(Self { twin, bed, console: Console::new(&spec.serial), run: run.clone() })
    }

    /// What the client notices of vmirror's guest while nothing is moved.
    pub fn unmigrated(&self, time: Duration) -> Result<Option<Beats>, BenchError> {
        let listen = || self.run.sleep(time);
        Ok(with_heartbeats(self.bed.client(), ADDRESSES[0], &self.run, listen)?.1)
    }
}

/// Where vmirror's guest is in a round, and where it goes.
pub fn hosts(bed: &Testbed, round: u32) -> [&Host; 2] {
    if round.is_multiple_of(2) { [bed.a(), bed.b()] } else { [bed.b(), bed.a()] }
}
