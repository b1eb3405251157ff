//! The twin: an equal guest in plain QEMU processes, moved by QEMU's own migration.

use std::net::{IpAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use qemu::qmp::MigrationState;
use qemu::{Event, Qmp};
use serde_json::{Value, json};
use testbed::{GuestSpec, Host, RunningGuest};
use tokio::runtime::Handle;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;

use crate::link::LinkWatch;
use crate::measure::{ThreadWatch, ms};
use crate::memory::{Memory, most_overhead};
use crate::record::{Method, Miss, Moved, QemuReport, Sample};
use crate::{BenchError, Interrupt};

/// How long QEMU may take to open its monitor.
const MONITOR: Duration = Duration::from_secs(30);
/// How long what follows the end of a migration may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// QEMU's default of `max-bandwidth`, in bytes per second.
const DEFAULT_BANDWIDTH: u64 = 128 << 20;
/// Connections of multifd: QEMU's default.
const CHANNELS: u32 = 2;
/// Bytes per second that are no limit: a tebibyte.
const UNLIMITED: u64 = 1 << 40;

/// How QEMU is to move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// One of QEMU's.
    pub method: Method,
    /// Whether encrypted, with both sides' certificates checked.
    pub tls: bool,
}

/// The twin, on the host where it runs.
#[derive(Debug)]
pub struct Twin {
    // The monitor before the process: it is closed before QEMU is killed.
    qmp: Qmp,
    guest: RunningGuest,
    spec: GuestSpec,
    host: usize,
    runtime: Handle,
}

impl Twin {
    /// Boots it on the first of two hosts.
    ///
    /// # Errors
    /// Where QEMU does not start or its monitor does not answer.
    pub fn boot(
        hosts: &[Host; 2],
        spec: &GuestSpec,
        runtime: &Handle,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        Self::start(hosts, 0, spec, &[], runtime, interrupt)
    }

    fn start(
        hosts: &[Host; 2],
        host: usize,
        spec: &GuestSpec,
        more: &[&str],
        runtime: &Handle,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        let socket = hosts[host].directory().join("twin.qmp");
        let mut spec = GuestSpec { qmp: Some(socket.clone()), ..spec.clone() };
        let own = spec.clone();
        spec.extra.extend(more.iter().map(|&word| word.to_owned()));
        // A socket of an earlier QEMU would be connected to in vain.
        let _ = std::fs::remove_file(&socket);
        let mut guest = hosts[host].boot(&spec)?;
        let qmp =
            interrupt.wait("QEMU's monitor", MONITOR, || match runtime.block_on(Qmp::connect(&socket)) {
                Ok(qmp) => Ok(Some(qmp)),
                Err(error) => guest.exit_status().map_or(Ok(None), |_| Err(error.into())),
            })?;
        Ok(Self { qmp, guest, spec: own, host, runtime: runtime.clone() })
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.guest.pid()
    }

    /// Which of the two hosts it is on.
    #[must_use]
    pub fn host(&self) -> usize {
        self.host
    }

    /// Moves it to the other host as QEMU does, and measures what that takes. Where that fails, or takes longer than
    /// `patience`, the twin stays where it is.
    ///
    /// # Errors
    /// Whatever keeps it from being tried.
    pub fn migrate(
        &mut self,
        hosts: &[Host; 2],
        setting: Setting,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<Moved, BenchError> {
        let (from, to) = (&hosts[self.host], &hosts[1 - self.host]);
        let incoming = ["-incoming", "defer"];
        let there = Self::start(hosts, 1 - self.host, &self.spec, &incoming, &self.runtime, interrupt)?;
        let uri = format!("tcp:{}:{}", to.listen().ip(), free_port(to)?);
        let parameters = self.prepare(from, setting, "client", to.name())?;
        there.prepare(to, setting, "server", "")?;

        let memories = [self.pid(), there.pid()].map(|pid| Memory::of_qemu(pid, self.spec.memory_mib));
        let link = LinkWatch::start(from);
        let loading = ThreadWatch::start(there.pid(), loads)?;
        self.runtime.block_on(there.qmp.migrate_incoming(&uri))?;
        let mut here_events = Events(self.qmp.events());
        let mut there_events = Events(there.qmp.events());
        let sending = ThreadWatch::start(self.pid(), sends)?;
        let began = SystemTime::now();
        self.runtime.block_on(self.qmp.migrate(&uri))?;
        let post_copy = setting.method == Method::QemuPostCopy;
        let ended = here_events.ended(&self.qmp, &self.runtime, post_copy, patience, interrupt);
        let cpu_source = sending.stop();
        let missed = |miss| Moved { result: Err(miss), overhead_bytes: most_overhead(&memories) };
        let stopped = match ended {
            Ok(stopped) => stopped,
            Err(BenchError::Timeout { waited, .. }) => {
                self.runtime.block_on(self.qmp.migrate_cancel())?;
                self.settle(interrupt)?;
                return Ok(missed(Miss::NotConverged { after_ms: ms(waited) }));
            }
            Err(BenchError::Baseline { status, message }) => {
                return Ok(missed(Miss::Failed { message: format!("{status}: {message}") }));
            }
            Err(error) => return Err(error),
        };
        let resumed = there_events.first("RESUME", interrupt)?;
        let cpu_destination = loading.stop();
        let link_bytes = link.and_then(|link| link.bytes());
        let overhead_bytes = most_overhead(&memories);

        let state = self.runtime.block_on(self.qmp.query_migrate())?;
        let since = |from: SystemTime, to: SystemTime| ms(to.duration_since(from).unwrap_or_default());
        let sample = Sample {
            method: setting.method,
            round: 0,
            from: from.name().to_owned(),
            to: to.name().to_owned(),
            began_unix_ms: since(SystemTime::UNIX_EPOCH, began),
            total_ms: state.total_ms.unwrap_or_default() as f64,
            until_running_ms: since(began, resumed),
            downtime_ms: since(stopped, resumed),
            cpu_source_ms: ms(cpu_source),
            cpu_destination_ms: ms(cpu_destination),
            link_bytes,
            sent_bytes: state.ram["transferred"].as_u64().unwrap_or_default(),
            heartbeats: None,
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
        let capabilities = [("events", true), ("multifd", multifd), ("postcopy-ram", post_copy)];
        self.runtime.block_on(self.qmp.set_capabilities(&capabilities))?;
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
            self.runtime.block_on(async {
                // It is there from an attempt that failed, or it is not.
                let _ = self.qmp.execute_raw("object-del", json!({ "id": id })).await;
                self.qmp.execute_raw("object-add", object).await
            })?;
            parameters["tls-creds"] = json!(id);
            parameters["tls-hostname"] = json!(peer);
        }
        self.runtime.block_on(self.qmp.set_parameters(parameters.clone()))?;
        Ok(parameters)
    }

    /// Waits until a migration that was cancelled has ended.
    fn settle(&self, interrupt: &Interrupt) -> Result<(), BenchError> {
        interrupt.wait("QEMU's migration to be cancelled", MONITOR, || {
            let state = self.runtime.block_on(self.qmp.query_migrate())?;
            Ok((state.status.as_deref() == Some("cancelled")).then_some(()))
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

/// A port that is free on a host now.
fn free_port(host: &Host) -> Result<u16, BenchError> {
    let address: IpAddr = host.listen().ip();
    let bound =
        host.on_network(|| TcpListener::bind((address, 0)).and_then(|listener| listener.local_addr()))?;
    Ok(bound.map_err(BenchError::file("port"))?.port())
}

/// What QEMU tells, while it is waited for.
struct Events(Receiver<Event>);

impl Events {
    /// The next event, waited for in small steps so that an interruption is noticed.
    fn next(&mut self, what: &str, interrupt: &Interrupt, since: Instant) -> Result<Event, BenchError> {
        loop {
            if let Some(event) = self.poll(what, interrupt, since, PATIENCE)? {
                return Ok(event);
            }
        }
    }

    /// The next event; none after a short wait without one.
    fn poll(
        &mut self,
        what: &str,
        interrupt: &Interrupt,
        since: Instant,
        patience: Duration,
    ) -> Result<Option<Event>, BenchError> {
        loop {
            match self.0.try_recv() {
                Ok(event) => return Ok(Some(event)),
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Closed) => {
                    return Err(BenchError::Baseline {
                        status: "gone".into(),
                        message: "QEMU has ended".into(),
                    });
                }
                Err(TryRecvError::Empty) if since.elapsed() > patience => {
                    return Err(BenchError::Timeout { what: what.to_owned(), waited: since.elapsed() });
                }
                // What is measured comes from the events' own time stamps, not from when they are read.
                Err(TryRecvError::Empty) => {
                    interrupt.sleep(Duration::from_millis(5))?;
                    return Ok(None);
                }
            }
        }
    }

    /// Waits for an event and gives back when QEMU says that it was.
    fn first(&mut self, name: &str, interrupt: &Interrupt) -> Result<SystemTime, BenchError> {
        let since = Instant::now();
        loop {
            let event = self.next(name, interrupt, since)?;
            if event.name == name {
                return Ok(event.timestamp);
            }
        }
    }

    /// Waits for the end of the migration and gives back when the guest was stopped for it. Post-copy is begun when all
    /// has been sent once.
    fn ended(
        &mut self,
        qmp: &Qmp,
        runtime: &Handle,
        mut post_copy: bool,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<SystemTime, BenchError> {
        let since = Instant::now();
        let mut stopped = None;
        loop {
            if post_copy {
                let state = runtime.block_on(qmp.query_migrate())?;
                // The bitmap is fetched for the second time when the first pass is over.
                if state.ram["dirty-sync-count"].as_u64() >= Some(2) {
                    // Refused where it has just ended without.
                    let _ = runtime.block_on(qmp.execute_raw("migrate-start-postcopy", json!({})));
                    post_copy = false;
                }
            }
            let Some(event) = self.poll("QEMU's own migration", interrupt, since, patience)? else {
                continue;
            };
            match (event.name.as_str(), event.data["status"].as_str()) {
                ("STOP", _) => stopped = Some(event.timestamp),
                ("MIGRATION", Some("completed")) => {
                    let missing = || BenchError::Baseline {
                        status: "completed".into(),
                        message: "without having stopped the guest".into(),
                    };
                    return stopped.ok_or_else(missing);
                }
                ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => {
                    let message = runtime.block_on(qmp.query_migrate())?.error.unwrap_or_default();
                    return Err(BenchError::Baseline { status: status.to_owned(), message });
                }
                _ => {}
            }
        }
    }
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
    }
}
