//! QEMU's own words on its RAM blocks, and its heap, through which goes what a guest sends.

#![no_main]

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let length = usize::from(input.short());
    let table = String::from_utf8_lossy(input.take(length));
    qemu::fuzzing::ram_table(&table, input.0);
});
