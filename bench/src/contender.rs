//! Who moves a guest, and in which turn.

use serde::{Deserialize, Serialize};

use crate::cell::{Cell, Dirtying, Filling, Order};
use crate::record::Method;

/// Who moves a guest, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Contender {
    /// By which method.
    pub method: Method,
    /// Whether encrypted; vmirror always is.
    pub tls: bool,
}

impl Contender {
    /// vmirror.
    pub const VMIRROR: Self = Self { method: Method::Vmirror, tls: true };
    /// QEMU as it is. Not encrypted.
    pub const DEFAULT: Self = Self::plain(Method::QemuDefault);
    /// QEMU with a disk that moves with the guest. Not encrypted.
    pub const NBD: Self = Self::plain(Method::QemuNbd);
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::VMIRROR,
        Self::plain(Method::QemuDefault),
        Self::plain(Method::QemuTuned),
        Self::plain(Method::QemuMultifdPlain),
        Self::plain(Method::QemuMultifd),
        Self::plain(Method::QemuPostCopy),
        Self::encrypted(Method::QemuDefault),
        Self::encrypted(Method::QemuTuned),
        Self::encrypted(Method::QemuMultifdPlain),
        Self::encrypted(Method::QemuMultifd),
        Self::encrypted(Method::QemuPostCopy),
        Self::NBD,
    ];
    /// Those of the short form, where a goal is about encryption: the settings that may be QEMU's best.
    const QUICK: [Self; 6] = [
        Self::VMIRROR,
        Self::plain(Method::QemuDefault),
        Self::plain(Method::QemuMultifd),
        Self::encrypted(Method::QemuTuned),
        Self::encrypted(Method::QemuMultifdPlain),
        Self::encrypted(Method::QemuMultifd),
    ];

    /// A method of QEMU, not encrypted.
    pub const fn plain(method: Method) -> Self {
        Self { method, tls: false }
    }

    /// A method of QEMU, encrypted.
    pub const fn encrypted(method: Method) -> Self {
        Self { method, tls: true }
    }

    /// Whether it can move a guest of that kind: there is one way of QEMU to move a disk, and it moves nothing else.
    pub fn fits(self, cell: &Cell) -> bool {
        self == Self::VMIRROR || (self == Self::NBD) == cell.disk.is_some()
    }

    /// Those of the short form in a cell: with QEMU's encryption only where a goal is about it, and where whole pages outrun
    /// the link, so that no pre-copy of QEMU ends, one that is waited for in vain. Counters compress: there zstd may end.
    pub fn quick(cell: &Cell) -> &'static [Self] {
        if cell.disk.is_some() {
            return &[Self::VMIRROR, Self::NBD];
        }
        match (cell.dirtying, cell.content, cell.order) {
            (Dirtying::Idle, Filling::Incompressible, _) => &Self::QUICK,
            (Dirtying::OfLink(100..), _, Order::Random | Order::Streaming) => &Self::QUICK[..2],
            _ => &Self::QUICK[..3],
        }
    }

    /// Its name for people.
    pub fn name(self) -> String {
        let encrypted = if self.tls { ", TLS" } else { "" };
        format!("{}{encrypted}", self.method.name())
    }

    /// Its name on the command line.
    pub fn key(self) -> String {
        let encrypted = if self.tls && self != Self::VMIRROR { "-tls" } else { "" };
        format!("{}{encrypted}", self.method.key())
    }
}

/// Who goes when in a round: everybody once.
///
/// Each round begins with another, and counts on from it by another stride, one that meets everybody before it comes back to
/// the first. So whom somebody follows, and what that one leaves behind in caches and in the machine's temperature, changes
/// with every round, until the strides are used up: with 11 contenders after 10 rounds, with 8 after 4. Where one is left out
/// for not converging, the next one follows the one before it.
pub fn turns(contenders: &[Contender], round: u32) -> Vec<Contender> {
    let (count, round) = (contenders.len(), round as usize);
    let strides: Vec<usize> = (1..=count).filter(|stride| common_divisor(*stride, count) == 1).collect();
    let stride = strides.get(round % strides.len().max(1)).copied().unwrap_or(1);
    (0..count).map(|turn| contenders[(round + turn * stride) % count]).collect()
}

/// The greatest.
fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_tell_contenders_apart_and_the_short_form_has_some_of_them() {
        let keys: HashSet<String> = Contender::ALL.iter().map(|contender| contender.key()).collect();
        let names: HashSet<String> = Contender::ALL.iter().map(|contender| contender.name()).collect();
        assert_eq!((keys.len(), names.len()), (Contender::ALL.len(), Contender::ALL.len()));
        assert!(keys.contains("vmirror") && keys.contains("qemu-default-tls"), "{keys:?}");
        assert!(Contender::QUICK.iter().all(|quick| Contender::ALL.contains(quick)));
        let quick = |name| Contender::quick(&Cell::named(name)).len();
        assert_eq!((quick("idle"), quick("counters-150"), quick("random-150")), (6, 3, 2));
    }

    #[test]
    fn disks_and_memory_have_their_own_contenders() {
        for cell in Cell::all() {
            let fitting = Contender::ALL.into_iter().filter(|contender| contender.fits(&cell)).count();
            assert_eq!(fitting, if cell.disk.is_some() { 2 } else { 11 }, "{}", cell.name);
            assert!(Contender::quick(&cell).iter().all(|contender| contender.fits(&cell)), "{}", cell.name);
        }
    }

    #[test]
    fn everybody_has_one_turn_in_a_round_and_follows_another_in_each() {
        let mut pairs = HashSet::new();
        let mut firsts = HashSet::new();
        for round in 0..5 {
            let turns = turns(&Contender::ALL[..11], round);
            assert_eq!(turns.iter().collect::<HashSet<_>>().len(), 11);
            assert!(firsts.insert(turns[0]));
            for pair in turns.windows(2) {
                assert!(pairs.insert((pair[0], pair[1])), "{pair:?} again in round {round}");
            }
        }
    }

    #[test]
    fn any_number_of_contenders_has_its_turns() {
        for count in 0..=Contender::ALL.len() {
            for round in 0..20 {
                let turns = turns(&Contender::ALL[..count], round);
                assert_eq!(turns.iter().collect::<HashSet<_>>().len(), count);
            }
        }
    }
}
