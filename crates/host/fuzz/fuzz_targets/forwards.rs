//! The record of machines that stay in this host's network, whatever has happened to the file.

#![no_main]

use fuzzing as _;

libfuzzer_sys::fuzz_target!(|data: &[u8]| host::fuzzing::forwards(data));
