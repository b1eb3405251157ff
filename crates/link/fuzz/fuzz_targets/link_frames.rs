//! The bytes of a control connection: the frames in them are the same however they are cut.

#![no_main]

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let pieces: Vec<usize> = (0..input.byte() % 16).map(|_| usize::from(input.byte())).collect();
    let in_pieces = link::fuzzing::frames(input.0, pieces.iter().copied().cycle());
    assert_eq!(in_pieces, link::fuzzing::frames(input.0, std::iter::empty()));
});
