//! Written parts of a tracked range, and how to walk their pages.

/// A run of written pages inside one tracked range, in bytes from the start of that range.
///
/// `start` and `end` are multiples of the page size of the range, and `start < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Which of [`Tracker::ranges`](crate::Tracker::ranges) it lies in.
    pub range: usize,
    /// First written byte, counted from the start of the range.
    pub start: u64,
    /// One past the last written byte, counted from the start of the range.
    pub end: u64,
}

impl Region {
    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// The offset of every page of `page_size` bytes it touches, in bytes from the start of the range.
    ///
    /// A smaller `page_size` than the range's own is meant for huge pages, which are found written
    /// as a whole but compared and sent in 4 KiB pieces. A `page_size` of 0 yields nothing.
    pub fn pages(&self, page_size: u64) -> impl Iterator<Item = u64> + use<> {
        let first = self.start.checked_div(page_size).unwrap_or(0).saturating_mul(page_size);
        let end = if page_size == 0 { first } else { self.end };
        // `step_by` of a zero page size would panic; the range is empty then, so any step will do.
        (first..end).step_by(usize::try_from(page_size).unwrap_or(usize::MAX).max(1))
    }
}

/// Adds `region` to `regions`, joining it to the last one where they touch.
///
/// The kernel joins what touches within one call, but an answer that needed several calls is cut at
/// each of them.
pub(crate) fn push_joined(regions: &mut Vec<Region>, first: usize, region: Region) {
    if regions.len() > first
        && let Some(last) = regions.last_mut()
        && last.range == region.range
        && last.end == region.start
    {
        last.end = region.end;
        return;
    }
    regions.push(region);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pages_are_offsets_of_page_starts() {
        let region = Region { range: 0, start: 8192, end: 20480 };
        assert_eq!(region.pages(4096).collect::<Vec<_>>(), [8192, 12288, 16384]);
        assert_eq!(region.bytes(), 12288);
        assert_eq!(region.pages(0).count(), 0);
    }

    #[test]
    fn a_region_smaller_than_the_page_yields_the_page_it_touches() {
        let region = Region { range: 0, start: 0x20_1000, end: 0x20_2000 };
        assert_eq!(region.pages(0x20_0000).collect::<Vec<_>>(), [0x20_0000]);
    }

    #[test]
    fn only_touching_regions_of_the_same_range_and_scan_are_joined() {
        let of = |range, start, end| Region { range, start, end };
        let mut regions = vec![of(0, 0, 4096)];
        push_joined(&mut regions, 1, of(0, 4096, 8192));
        push_joined(&mut regions, 1, of(0, 8192, 12288));
        push_joined(&mut regions, 1, of(1, 12288, 16384));
        push_joined(&mut regions, 1, of(1, 20480, 24576));
        assert_eq!(regions, [of(0, 0, 4096), of(0, 4096, 12288), of(1, 12288, 16384), of(1, 20480, 24576)]);
    }

    proptest! {
        #[test]
        fn pages_cover_the_region_exactly(start in 0_u64..1000, pages in 1_u64..1000) {
            let region = Region { range: 0, start: start * 4096, end: (start + pages) * 4096 };
            let found: Vec<u64> = region.pages(4096).collect();
            prop_assert_eq!(found.len() as u64, pages);
            prop_assert_eq!(found[0], region.start);
            prop_assert_eq!(found[found.len() - 1] + 4096, region.end);
        }
    }
}
