//! The two slots of a record's file: the newest whole record counts, and nothing else.

#![no_main]

use fuzzing::Input;
use host::Record;
use libfuzzer_sys::fuzz_target;
use ownership::fuzzing::{Slot, slots};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (how, first, second) = (input.byte(), input.byte(), input.byte());
    let length = usize::from(input.short());
    let even = input.take(length);
    let slot = |raw: u8, sequence: u8, bytes| match how & raw {
        0 => Slot::Whole(if sequence == u8::MAX { u64::MAX } else { sequence.into() }, bytes),
        _ => Slot::Raw(bytes),
    };
    slots::<Record>(slot(1, first, even), slot(2, second, input.0));
});
