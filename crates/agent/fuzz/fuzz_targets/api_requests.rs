//! Bodies of the API's requests: what was understood is said again the same way, and options that are taken are within bounds.

#![no_main]

use std::fmt::Debug;

use agent::api::types::{
    AdoptRequest, BandwidthRequest, MigrateRequest, ReleaseRequest, ResolveRequest, RunRequest, StopRequest,
};
use fuzzing::Input;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.byte() % 7 {
        0 => {
            let Some(request) = again::<MigrateRequest>(input.0) else { return };
            if request.options.validate().is_ok() {
                let options = request.options;
                assert!(options.downtime <= options.max_downtime, "{options:?}");
                // Added to a time they do not go beyond all times.
                let _ = std::time::Instant::now() + options.timeout + options.max_downtime;
                assert!(options.streams.is_none_or(|streams| streams.get() <= 16));
            }
        }
        1 => drop(again::<RunRequest>(input.0)),
        2 => drop(again::<AdoptRequest>(input.0)),
        3 => drop(again::<StopRequest>(input.0)),
        4 => drop(again::<ReleaseRequest>(input.0)),
        5 => drop(again::<ResolveRequest>(input.0)),
        _ => drop(again::<BandwidthRequest>(input.0)),
    }
});

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(body: &[u8]) -> Option<T> {
    let request: T = serde_json::from_slice(body).ok()?;
    let said = serde_json::to_vec(&request).expect("a request is JSON");
    assert_eq!(serde_json::from_slice::<T>(&said).expect("our own"), request);
    Some(request)
}
