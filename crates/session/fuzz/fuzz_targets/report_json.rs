//! A report as the history and scripts have it: what was read is written, and read again, as it was.

#![no_main]

use fuzzing as _;

use serde_json::Value;
use session::Report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(report) = serde_json::from_slice::<Report>(data) else { return };
    let written = serde_json::to_value(&report).expect("a report is JSON");
    let read = serde_json::from_str::<Report>(&written.to_string()).expect("our own");
    let again = serde_json::to_value(&read).expect("a report is JSON");
    assert!(alike(&written, &again), "{written} became {again}");
    assert!(report.wire_bytes() >= report.memory.wire_bytes);
});

/// Whether nothing is lost; the last bit of a fraction may be.
fn alike(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let same = |(key, value)| other.get(key).is_some_and(|found| alike(value, found));
            one.len() == other.len() && one.iter().all(same)
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| alike(one, other))
        }
        (Value::Number(one), Value::Number(other)) if one.is_f64() => {
            let (one, other) = (one.as_f64().unwrap_or_default(), other.as_f64().unwrap_or_default());
            (one - other).abs() <= one.abs() * 1e-12
        }
        (one, other) => one == other,
    }
}
