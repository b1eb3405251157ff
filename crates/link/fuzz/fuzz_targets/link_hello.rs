//! The first message of a connection, in its envelope, of either side.

#![no_main]

use fuzzing as _;

libfuzzer_sys::fuzz_target!(|data: &[u8]| link::fuzzing::hello(data));
