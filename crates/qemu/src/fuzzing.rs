//! What the fuzz targets in `fuzz/` are given of this crate beyond its interface. Compiled for nobody else.

/// Understands QEMU's table of RAM blocks, and looks for them in what may be its heap.
///
/// # Panics
/// If it is understood in two ways, or a block is found that is not described there.
pub fn ram_table(table: &str, heap: &[u8]) {
    crate::ram_table::fuzz(table, heap);
}
