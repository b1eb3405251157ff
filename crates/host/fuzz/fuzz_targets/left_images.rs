//! The record of images that machines have left, whatever has happened to the files: of this version, and the two of earlier ones.

#![no_main]

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let [record, remnants] = [input.short(), input.short()].map(usize::from);
    let (record, remnants) = (input.take(record), input.take(remnants));
    host::fuzzing::left_images(record, remnants, input.0);
});
