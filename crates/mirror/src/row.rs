//! A row of a frame's table, whatever its class makes of it.
//!
//! 24 bytes, little-endian: what u64 (class 8 bits, detail 16, index 40, from the top) · value u128.

/// Bytes of a row.
pub(crate) const ROW_LENGTH: usize = 24;
const CLASS_SHIFT: u32 = 56;
const DETAIL_SHIFT: u32 = 40;

/// A row of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// What it says; the table's frame knows which there are.
    pub(crate) class: u8,
    /// A length or an offset.
    pub(crate) detail: u16,
    /// Of which page or block: less than 2⁴⁰.
    pub(crate) index: u64,
    /// A hash or a count.
    pub(crate) value: u128,
}

impl Row {
    /// Appends it to `out`.
    pub(crate) fn put(self, out: &mut Vec<u8>) {
        let what = u64::from(self.class) << CLASS_SHIFT | u64::from(self.detail) << DETAIL_SHIFT | self.index;
        out.extend_from_slice(&what.to_le_bytes());
        out.extend_from_slice(&self.value.to_le_bytes());
    }

    /// The rows of a table. What is left over at its end, and is none, is passed over.
    pub(crate) fn all(table: &[u8]) -> impl Iterator<Item = Row> {
        table.chunks_exact(ROW_LENGTH).map(|bytes| {
            let (what, value) = bytes.split_at(8);
            let what = u64::from_le_bytes(what.try_into().expect("8 bytes were split off"));
            let value = u128::from_le_bytes(value.try_into().expect("16 of 24 bytes are left"));
            let index = what & ((1 << DETAIL_SHIFT) - 1);
            Row { class: (what >> CLASS_SHIFT) as u8, detail: (what >> DETAIL_SHIFT) as u16, index, value }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_are_read_as_they_were_written(
            rows in prop::collection::vec((any::<u8>(), any::<u16>(), 0u64..1 << 40, any::<u128>()), 0..9),
        ) {
            let rows: Vec<Row> =
                rows.into_iter().map(|(class, detail, index, value)| Row { class, detail, index, value }).collect();
            let mut table = Vec::new();
            rows.iter().for_each(|row| row.put(&mut table));
            prop_assert_eq!(table.len(), rows.len() * ROW_LENGTH);
            prop_assert_eq!(Row::all(&table).collect::<Vec<_>>(), rows);
        }
    }
}
