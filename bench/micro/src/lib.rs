//! How fast the memory engine sends through a cable, beside what the machine itself can do: what the benchmarks of this crate
//! leave for the benchmark of migrations.

use serde::{Deserialize, Serialize};

/// The name of its file, in cargo's `target`.
pub const FILE: &str = "engine-throughput.json";

/// What was measured, medians, in bytes per second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Engine {
    /// When, in seconds since 1970.
    pub measured_unix_s: i64,
    /// Copied by one thread.
    pub memcpy: f64,
    /// Over a veth pair between two network namespaces, by the number of streams.
    pub through: Vec<Through>,
}

/// Over a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Through {
    /// Connections, of each of them.
    pub streams: u16,
    /// By iperf3.
    pub iperf3: f64,
    /// Incompressible memory, by the engine, without TLS.
    pub plain: f64,
    /// The same over the agents' own connections.
    pub tls: f64,
}

impl Engine {
    /// What was measured on so many streams.
    #[must_use]
    pub fn on(&self, streams: u16) -> Option<Through> {
        self.through.iter().find(|through| through.streams == streams).copied()
    }
}
