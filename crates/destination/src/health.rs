//! The watch over a machine that has just resumed.

use std::time::{Duration, Instant};

use qemu::{Process, Qmp};

use protocol::deadlines::WATCH_STILL;
use protocol::wire;

/// How long a machine is watched: several timer ticks even of a guest that ticks ten times a second.
const WATCH: Duration = Duration::from_millis(200);

/// Watches a machine for a while: whether it runs and keeps running, and how many of its vCPUs use CPU time.
pub(crate) async fn watch(qmp: &Qmp, process: Option<&Process>) -> wire::Health {
    let begin = Instant::now();
    let mut events = qmp.events();
    let before = vcpu_times(qmp, process).await;
    let progressing = loop {
        tokio::time::sleep(WATCH).await;
        let after = vcpu_times(qmp, process).await;
        let progressing = before.iter().zip(&after).filter(|(before, after)| after > before).count();
        if progressing > 0 || begin.elapsed() >= WATCH_STILL {
            break progressing;
        }
    };
    let mut status = match qmp.status().await {
        Ok(state) => state.status,
        Err(_) => "gone".to_owned(),
    };
    // A panic may leave the machine running, or reset it.
    while let Ok(event) = events.try_recv() {
        if event.name == "GUEST_PANICKED" {
            status = "guest-panicked".to_owned();
        }
    }
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    wire::Health {
        watched_ms: begin.elapsed().as_secs_f64() * 1e3,
        vcpus: count(before.len()),
        progressing: count(progressing),
        status,
        problems: Vec::new(),
        frames_dropped: 0,
    }
}

async fn vcpu_times(qmp: &Qmp, process: Option<&Process>) -> Vec<Duration> {
    let (Some(process), Ok(vcpus)) = (process, qmp.vcpus().await) else { return Vec::new() };
    let time =
        |vcpu: &qemu::qmp::VcpuThread| qemu::vcpu_cpu_time(process, vcpu.thread_id).unwrap_or_default();
    vcpus.iter().map(time).collect()
}
