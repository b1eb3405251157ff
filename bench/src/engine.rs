//! How fast the memory engine sends through a cable, beside what the machine itself can do: measured by `make bench-micro`,
//! which leaves it in `target/engine-throughput.json`.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::BenchError;

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
    /// Reads it; none where it was not measured.
    ///
    /// # Errors
    /// Where the file cannot be read, or is none of ours.
    pub fn read(path: &Path) -> Result<Option<Self>, BenchError> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(BenchError::file(path))?,
        };
        let document = |source| BenchError::Document { command: path.display().to_string(), source };
        serde_json::from_str(&text).map(Some).map_err(document)
    }

    /// What was measured on so many streams.
    #[must_use]
    pub fn on(&self, streams: u16) -> Option<Through> {
        self.through.iter().find(|through| through.streams == streams).copied()
    }

    /// When, for people.
    #[must_use]
    pub fn date(&self) -> String {
        let time = jiff::Timestamp::from_second(self.measured_unix_s).unwrap_or_default();
        time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M %Z").to_string()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn engine(plain: f64) -> Engine {
        let through = |streams| Through { streams, iperf3: 4e9, plain, tls: plain / 2.0 };
        Engine { measured_unix_s: 1_700_000_000, memcpy: 8e9, through: vec![through(1), through(2)] }
    }

    #[test]
    fn figures_that_were_not_measured_are_none_and_others_files_are_refused() {
        let directory = std::env::temp_dir().join(format!("vmirror-bench-engine-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("engine.json");
        assert_eq!(Engine::read(&path).unwrap(), None);
        fs::write(&path, serde_json::to_string(&engine(3e9)).unwrap()).unwrap();
        assert_eq!(Engine::read(&path).unwrap(), Some(engine(3e9)));
        fs::write(&path, "{}").unwrap();
        assert!(Engine::read(&path).is_err());
        fs::remove_dir_all(&directory).unwrap();
        assert!(engine(1.0).date().starts_with("2023-11-14"));
    }
}
