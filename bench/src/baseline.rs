//! The twin: an equal guest in plain QEMU processes, moved by QEMU's own migration.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use qemu::Qmp;
use qemu::qmp::MigrationState;
use serde_json::{Value, json};
use testbed::cpu::watch_threads;
use testbed::link::LinkWatch;
use testbed::memory::{Memory, most_overhead};
use testbed::{GuestSpec, Host, RunningGuest};

use crate::error::BenchError;
use crate::events::Events;
use crate::measure::ms;
use crate::nbd::NbdMirror;
use crate::record::{DiskCopy, Method, Miss, Moved, QemuReport, Sample};
use crate::run::Run;

/// How long QEMU may take to open its monitor.
const MONITOR: Duration = Duration::from_secs(30);
/// QEMU's default of `max-bandwidth`, in bytes per second.
const DEFAULT_BANDWIDTH: u64 = 128 << 20;
/// Connections of multifd: QEMU's default.
const CHANNELS: u32 = 2;
/// Bytes per second that are no limit: a tebibyte.
const UNLIMITED: u64 = 1 << 40;

/// Says of a thread's name whether the thread counts.
type Fits = fn(&str) -> bool;

/// How QEMU is to move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// One of QEMU's.
    pub method: Method,
    /// Whether encrypted, with both sides' certificates checked.
    pub tls: bool,
    /// How long a disk stays mirrored once it has been copied, before the guest is moved.
    pub hold: Duration,
}

/// The twin, on the host where it runs.
#[derive(Debug)]
pub struct Twin {
    // The monitor before the process: it is closed before QEMU is killed.
    qmp: Qmp,
    guest: RunningGuest,
    spec: GuestSpec,
    host: usize,
    run: Run,
}

impl Twin {
    /// Boots it on the first of two hosts.
    pub fn boot(hosts: &[Host; 2], spec: &GuestSpec, run: &Run) -> Result<Self, BenchError> {
        Self::start(hosts, 0, spec, &[], run)
    }

    fn start(
        hosts: &[Host; 2],
        host: usize,
        spec: &GuestSpec,
        more: &[&str],
        run: &Run,
    ) -> Result<Self, BenchError> {
        let socket = hosts[host].directory().join("twin.qmp");
        let mut spec = GuestSpec { qmp: Some(socket.clone()), ..spec.clone() };
        let own = spec.clone();
        // Its image, too, is the host's own.
        for disk in &mut spec.disks {
            disk.image = hosts[host].disk_dir().join(disk.image.file_name().unwrap_or_default());
        }
        spec.extra.extend(more.iter().map(|&word| word.to_owned()));
        // A socket of an earlier QEMU would be connected to in vain.
        let _ = std::fs::remove_file(&socket);
        let mut guest = hosts[host].boot(&spec)?;
        let qmp = run.wait("QEMU's monitor", MONITOR, || match run.block_on(Qmp::connect(&socket)) {
            Ok(qmp) => Ok(Some(qmp)),
            Err(error) => guest.exit_status().map_or(Ok(None), |_| Err(error.into())),
        })?;
        Ok(Self { qmp, guest, spec: own, host, run: run.clone() })
    }

    /// QEMU's process.
    pub fn pid(&self) -> i32 {
        self.guest.pid()
    }

    /// Which of the two hosts it is on.
    pub fn host(&self) -> usize {
        self.host
    }

    /// Moves it to the other host as QEMU does, and measures what that takes. Where that fails, or takes longer than
    /// `patience`, the twin stays where it is.
    pub fn migrate(
        &mut self,
        hosts: &[Host; 2],
        setting: Setting,
        patience: Duration,
    ) -> Result<Moved, BenchError> {
        let run = self.run.clone();
        let (from, to) = (&hosts[self.host], &hosts[1 - self.host]);
        let incoming = ["-incoming", "defer"];
        let there = Self::start(hosts, 1 - self.host, &self.spec, &incoming, &run)?;
        let uri = format!("tcp:{}:{}", to.listen().ip(), free_port(to)?);
        let parameters = self.prepare(from, setting, "client", to.name())?;
        there.prepare(to, setting, "server", "")?;

        let memories = [self.pid(), there.pid()].map(|pid| Memory::of_qemu(pid, self.spec.memory_mib));
        let link = LinkWatch::start(from);
        let disk = self.spec.disks.first().map(|disk| format!("disk-{}", disk.serial));
        // Disks are read and written by threads whose names say nothing of it.
        let (sends, loads): (Fits, Fits) = if disk.is_some() { (serves, serves) } else { (sends, loads) };
        let loading = watch_threads(there.pid(), loads);
        run.block_on(there.qmp.migrate_incoming(&uri))?;
        let mut here_events = Events::of(&self.qmp, &run);
        let mut there_events = Events::of(&there.qmp, &run);
        let sending = watch_threads(self.pid(), sends);
        let since = |from: SystemTime, to: SystemTime| ms(to.duration_since(from).unwrap_or_default());
        let began = SystemTime::now();
        let listen = SocketAddr::from((to.listen().ip(), free_port(to)?));
        let begin = |node: String| NbdMirror::begin(&self.qmp, &there.qmp, &run, &node, listen);
        let mirror = disk.map(begin).transpose()?;
        let mut copy = DiskCopy { began_ms: since(began, SystemTime::now()), copied_ms: 0.0 };
        let mut ended = Ok(());
        if let Some(mirror) = &mirror {
            let copied = mirror.copied(&mut here_events, patience);
            ended = copied.map(|copied| copy.copied_ms = since(began, copied));
            run.sleep(setting.hold)?;
        }
        let ended = ended.and_then(|()| {
            run.block_on(self.qmp.migrate(&uri))?;
            let post_copy = setting.method == Method::QemuPostCopy;
            let let_go = || mirror.as_ref().map_or(Ok(()), NbdMirror::end);
            here_events.ended(&self.qmp, post_copy, let_go, patience)
        });
        let cpu_source = sending.stop();
        let missed = |miss| Moved { result: Err(miss), overhead_bytes: most_overhead(&memories) };
        if let (Err(BenchError::Timeout { .. } | BenchError::Baseline { .. }), Some(mirror)) =
            (&ended, &mirror)
        {
            mirror.give_up()?;
        }
        let stopped = match ended {
            Ok(stopped) => stopped,
            Err(BenchError::Timeout { waited, .. }) => {
                run.block_on(self.qmp.migrate_cancel())?;
                self.settle()?;
                return Ok(missed(Miss::NotConverged { after_ms: ms(waited) }));
            }
            Err(BenchError::Baseline { status, message }) => {
                return Ok(missed(Miss::Failed { message: format!("{status}: {message}") }));
            }
            Err(error) => return Err(error),
        };
        let resumed = there_events.first("RESUME")?;
        let cpu_destination = loading.stop();
        let link_bytes = link.and_then(|link| link.bytes());
        let overhead_bytes = most_overhead(&memories);

        let state = run.block_on(self.qmp.query_migrate())?;
        let until_running_ms = since(began, resumed);
        let total_ms = state.total_ms.unwrap_or_default() as f64;
        let sample = Sample {
            method: setting.method,
            round: 0,
            from: from.name().to_owned(),
            to: to.name().to_owned(),
            began_unix_ms: since(SystemTime::UNIX_EPOCH, began),
            // QEMU's own begins when the disk has been copied.
            total_ms: if mirror.is_some() { until_running_ms } else { total_ms },
            until_running_ms,
            downtime_ms: since(stopped, resumed),
            cpu_source_ms: ms(cpu_source),
            cpu_destination_ms: ms(cpu_destination),
            link_bytes,
            sent_bytes: state.ram["transferred"].as_u64().unwrap_or_default(),
            heartbeats: None,
            disk: mirror.is_some().then_some(copy),
            report: None,
            qemu: Some(report(&state, parameters)),
        };
        *self = there;
        Ok(Moved { result: Ok(sample), overhead_bytes })
    }

    /// Sets what this side of a migration needs, all of it: something else may be left from an attempt before. Returns the
    /// parameters.
    fn prepare(
        &self,
        host: &Host,
        setting: Setting,
        endpoint: &str,
        peer: &str,
    ) -> Result<Value, BenchError> {
        let multifd = matches!(setting.method, Method::QemuMultifdPlain | Method::QemuMultifd);
        let post_copy = setting.method == Method::QemuPostCopy;
        // Without `events` QEMU does not tell how its migration goes.
        let capabilities = [
            ("events", true),
            ("multifd", multifd),
            ("postcopy-ram", post_copy),
            ("pause-before-switchover", !self.spec.disks.is_empty()),
        ];
        self.run.block_on(self.qmp.set_capabilities(&capabilities))?;
        let bandwidth = if setting.method == Method::QemuDefault { DEFAULT_BANDWIDTH } else { UNLIMITED };
        let mut parameters = json!({ "max-bandwidth": bandwidth, "tls-creds": "", "tls-hostname": "" });
        if multifd {
            parameters["multifd-channels"] = json!(CHANNELS);
            let compressed = setting.method == Method::QemuMultifd;
            parameters["multifd-compression"] = json!(if compressed { "zstd" } else { "none" });
        }
        if setting.tls {
            let id = format!("tls-{endpoint}");
            let directory = credentials(host)?;
            let object = json!({ "qom-type": "tls-creds-x509", "id": id, "endpoint": endpoint, "verify-peer": true,
                                 "dir": directory.to_string_lossy() });
            self.run.block_on(async {
                // It is there from an attempt that failed, or it is not.
                let _ = self.qmp.execute_raw("object-del", json!({ "id": id })).await;
                self.qmp.execute_raw("object-add", object).await
            })?;
            parameters["tls-creds"] = json!(id);
            parameters["tls-hostname"] = json!(peer);
        }
        self.run.block_on(self.qmp.set_parameters(parameters.clone()))?;
        Ok(parameters)
    }

    /// Waits until a migration that was cancelled has ended, if it had begun.
    fn settle(&self) -> Result<(), BenchError> {
        self.run.wait("QEMU's migration to be cancelled", MONITOR, || {
            let state = self.run.block_on(self.qmp.query_migrate())?;
            Ok(matches!(state.status.as_deref(), Some("cancelled" | "none") | None).then_some(()))
        })
    }
}

/// Puts a host's certificate where QEMU looks for it, under the names that QEMU knows.
fn credentials(host: &Host) -> Result<PathBuf, BenchError> {
    let issued = host.directory().with_file_name("certificates");
    let directory = host.directory().join("qemu-tls");
    std::fs::create_dir_all(&directory).map_err(BenchError::file(&directory))?;
    let own = |part: &str| format!("{}{part}.pem", host.name());
    for (name, file) in [
        ("ca-cert.pem", "ca.pem".to_owned()),
        ("server-cert.pem", own("")),
        ("server-key.pem", own("-key")),
        ("client-cert.pem", own("")),
        ("client-key.pem", own("-key")),
    ] {
        let to = directory.join(name);
        std::fs::copy(issued.join(file), &to).map_err(BenchError::file(&to))?;
    }
    Ok(directory)
}

fn report(state: &MigrationState, settings: Value) -> QemuReport {
    QemuReport {
        total_ms: state.total_ms.unwrap_or_default() as f64,
        downtime_ms: state.downtime_ms.unwrap_or_default() as f64,
        setup_ms: state.setup_ms.map(|time| time as f64),
        ram: state.ram.clone(),
        settings,
    }
}

/// Whether a thread of QEMU sends a migration: `live_migration` and `multifdsend_…` up to QEMU 8.2, `mig/src/…` later.
fn sends(name: &str) -> bool {
    name == "live_migration" || ["multifdsend", "mig/src"].iter().any(|first| name.starts_with(first))
}

/// Whether a thread of QEMU loads a migration: the main thread, and others whose names depend on the version.
fn loads(name: &str) -> bool {
    ["qemu-system", "mig/dst", "multifdrecv", "postcopy", "fault-"]
        .iter()
        .any(|first| name.starts_with(first))
}

/// Whether a thread of QEMU does anything else than running the guest.
pub fn serves(name: &str) -> bool {
    !name.starts_with("CPU ")
}

/// A port that is free on a host now.
fn free_port(host: &Host) -> Result<u16, BenchError> {
    let address: IpAddr = host.listen().ip();
    let bound =
        host.on_network(|| TcpListener::bind((address, 0)).and_then(|listener| listener.local_addr()))?;
    Ok(bound.map_err(BenchError::file("port"))?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sending_threads_of_every_version_are_known() {
        for name in ["live_migration", "multifdsend_0", "mig/src/main", "mig/src/send_0"] {
            assert!(sends(name) && !loads(name), "{name}");
        }
        for name in ["qemu-system-x86", "multifdrecv_1", "mig/dst/recv_0", "postcopy/listen", "fault-default"]
        {
            assert!(loads(name) && !sends(name), "{name}");
        }
        for name in ["CPU 0/TCG", "call_rcu"] {
            assert!(!sends(name) && !loads(name), "{name}");
        }
        assert!(serves("qemu-system-x86") && serves("worker") && !serves("CPU 0/TCG"));
    }
}
