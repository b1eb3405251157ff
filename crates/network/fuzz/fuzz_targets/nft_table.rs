//! A table of another host's firewall.

#![no_main]

use fuzzing as _;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(document) = std::str::from_utf8(data) {
        network::fuzzing::nft(document);
    }
});
