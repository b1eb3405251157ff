//! What the fuzz targets in `fuzz/` are given of this crate beyond its interface. Compiled for nobody else.

use crate::forward::Forward;

/// Understands what is on record of images that machines have left, as this version and the earlier ones wrote it.
///
/// # Panics
/// If it is another when it is written and read again, or what an earlier version wrote is added twice.
pub fn left_images(record: &[u8], remnants: &[u8], kept: &[u8]) {
    crate::left_images::fuzz(record, remnants, kept);
}

/// Understands what is on record of machines that stay in this host's network.
///
/// # Panics
/// If it is another when it is written and read again, or names an interface that cannot be.
pub fn forwards(record: &[u8]) {
    let Ok(forwards) = serde_json::from_slice::<Vec<Forward>>(record) else { return };
    for name in forwards.iter().flat_map(Forward::interfaces) {
        // IFNAMSIZ of the kernel, with a zero at its end.
        assert!(name.starts_with("vmf") && name.len() < 16, "{name}");
    }
    // A time before 1970 cannot be written; what cannot be written is told.
    let Ok(again) = serde_json::to_vec_pretty(&forwards) else { return };
    assert_eq!(serde_json::from_slice::<Vec<Forward>>(&again).expect("our own"), forwards);
}
