//! What the demo and the comparison both move: a guest under vmirror's agents, and its twin in plain QEMU processes.

use std::net::Ipv4Addr;
use std::time::Duration;

use testbed::guest_spec::Nic;
use testbed::{AgentOptions, Console, GuestSpec, Host, Testbed};

use crate::error::BenchError;
use crate::mirrored::NAME;
use crate::run::Run;

/// The name of the guest that QEMU moves itself.
pub const TWIN: &str = "twin";
/// The guests' addresses, vmirror's first.
pub const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 88, 0, 10), Ipv4Addr::new(10, 88, 0, 11)];
/// How long the guests may take to boot and to fill their memory, on a machine with much other work.
const BOOT: Duration = Duration::from_secs(300);
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

/// Waits until guests have booted.
pub fn wait_ready(consoles: &[Console], run: &Run) -> Result<(), BenchError> {
    run.wait("the guests to boot", BOOT, || {
        let ready = consoles.iter().all(|console| console.is_ready() && console.status().is_some());
        Ok(ready.then_some(()))
    })
}

/// Where vmirror's guest is in a round, and where it goes.
pub fn hosts(bed: &Testbed, round: u32) -> [&Host; 2] {
    if round.is_multiple_of(2) { [bed.a(), bed.b()] } else { [bed.b(), bed.a()] }
}
