//! Choices that come out the same for the same seed.

/// Splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// Of that seed, for what has this name.
    #[must_use]
    pub fn new(seed: u64, name: &str) -> Chance {
        // FNV-1a: all that is asked of it is that names that differ are told apart.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        Chance(seed ^ hash)
    }

    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of these.
    ///
    /// # Panics
    /// If there are none.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[(self.number() % of.len() as u64) as usize]
    }
}
