//! Connections that another host's firewall knows.

#![no_main]

use fuzzing as _;

libfuzzer_sys::fuzz_target!(|data: &[u8]| network::fuzzing::flows(data));
