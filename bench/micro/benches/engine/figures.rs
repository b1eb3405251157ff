//! What the benchmark of migrations takes over from here: how fast the machine copies and sends, and how fast the engine
//! sends through the same cable.

use std::path::Path;
use std::time::SystemTime;

use micro::{Engine, FILE, Through};

/// Fewer measurements than this make no figure: so many criterion takes when it measures, and one when it only tries.
const FEWEST: usize = 10;

/// Tells what went over a veth pair.
pub(crate) fn print(Through { streams, iperf3, plain, tls }: &Through) {
    println!(
        "through, streams {streams}: {:.2} GB/s, iperf3 {:.2} GB/s, ratio {:.2}; with TLS {:.2} GB/s, ratio {:.2}",
        plain / 1e9,
        iperf3 / 1e9,
        plain / iperf3,
        tls / 1e9,
        tls / iperf3
    );
}

/// Leaves the figures in `target`, where all of them were measured: in a run that was told to measure only some, what an
/// earlier run left stays.
pub(crate) fn write(memcpy: Option<f64>, through: Option<Vec<Through>>) {
    let (Some(memcpy), Some(through)) = (memcpy, through) else { return };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let engine = Engine { measured_unix_s: now.as_secs() as i64, memcpy, through };
    // Cargo's directory for benches is target/tmp.
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name(FILE);
    std::fs::write(&path, serde_json::to_string_pretty(&engine).unwrap() + "\n").unwrap();
    println!("{}", path.display());
}

/// The median; none where there are too few.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (values.len() >= FEWEST).then(|| values[values.len() / 2])
}
