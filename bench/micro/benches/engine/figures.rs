//! What the benchmark of migrations takes over from here: how fast the machine copies and sends, and how fast the engine
//! sends through the same cable.

use std::path::Path;
use std::time::SystemTime;

use serde_json::json;

/// Fewer measurements than this make no figure: so many criterion takes when it measures, and one when it only tries.
const FEWEST: usize = 10;

/// The figures, each the median of a run.
#[derive(Default)]
pub(crate) struct Figures {
    /// Bytes that one thread copies per second.
    pub(crate) memcpy: Option<f64>,
    /// Over a veth pair, by the number of streams.
    pub(crate) through: Vec<Rates>,
}

/// Bytes per second over a veth pair.
pub(crate) struct Rates {
    pub(crate) streams: u16,
    pub(crate) iperf3: Option<f64>,
    /// The engine's first round without TLS.
    pub(crate) plain: Option<f64>,
    /// The same over the agents' connections.
    pub(crate) tls: Option<f64>,
}

impl Rates {
    pub(crate) fn print(&self) {
        let (Some(plain), Some(iperf3)) = (self.plain, self.iperf3) else { return };
        let tls = self.tls.map_or_else(String::new, |tls| {
            format!("; with TLS {:.2} GB/s, ratio {:.2}", tls / 1e9, tls / iperf3)
        });
        println!(
            "through, streams {}: {:.2} GB/s, iperf3 {:.2} GB/s, ratio {:.2}{tls}",
            self.streams,
            plain / 1e9,
            iperf3 / 1e9,
            plain / iperf3
        );
    }
}

impl Figures {
    /// Leaves them in `target/engine-throughput.json`, where all of them were measured: in a run that was told to measure only
    /// some, what an earlier run left stays.
    pub(crate) fn write(&self) {
        let complete = |rates: &Rates| rates.iperf3.is_some() && rates.plain.is_some() && rates.tls.is_some();
        if self.memcpy.is_none() || self.through.is_empty() || !self.through.iter().all(complete) {
            return;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let through: Vec<_> = self
            .through
            .iter()
            .map(|rates| {
                json!({ "streams": rates.streams, "iperf3": rates.iperf3, "plain": rates.plain, "tls": rates.tls })
            })
            .collect();
        let figures = json!({ "measured_unix_s": now.as_secs(), "memcpy": self.memcpy, "through": through });
        // Cargo's directory for benches is target/tmp.
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("engine-throughput.json");
        std::fs::write(&path, format!("{figures:#}\n")).unwrap();
        println!("{}", path.display());
    }
}

/// The median; none where there are too few.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (values.len() >= FEWEST).then(|| values[values.len() / 2])
}
