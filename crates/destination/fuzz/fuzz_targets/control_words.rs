//! A control message, of either side.

#![no_main]

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.byte() % 2 {
        0 => destination::fuzzing::request(input.0),
        _ => destination::fuzzing::reply(input.0),
    }
});
