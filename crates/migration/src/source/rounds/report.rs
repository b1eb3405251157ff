//! The rounds that a report tells: few enough, however long a mirror stands.

use session::report::Round;

/// Rounds that a report tells one by one; and those of them at its beginning and end that always are.
const MOST_ROUNDS: usize = 1000;
const FIRST_ROUNDS: usize = 16;
const LAST_ROUNDS: usize = 200;

/// A mirror may stand for days. When there are too many rounds to be told, neighbours in the middle become one.
pub(super) fn merge(rounds: &mut Vec<Round>) {
    if rounds.len() <= MOST_ROUNDS {
        return;
    }
    let last = rounds.split_off(rounds.len() - LAST_ROUNDS);
    let middle = rounds.split_off(FIRST_ROUNDS);
    for pair in middle.chunks(2) {
        let mut round = pair[0].clone();
        pair[1..].iter().for_each(|next| round.take_in(next));
        rounds.push(round);
    }
    rounds.extend(last);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_rounds_there_are_the_report_stays_small_and_its_sums_right() {
        let mut rounds = Vec::new();
        for n in 0..50_000 {
            rounds.push(Round { n, dirty_pages: 3, unchanged: 3, wire_bytes: 7, ..Round::default() });
            merge(&mut rounds);
        }
        assert!(rounds.len() <= MOST_ROUNDS, "{}", rounds.len());
        assert_eq!(rounds.iter().map(|round| round.wire_bytes).sum::<u64>(), 350_000);
        assert_eq!(rounds.iter().map(|round| u64::from(round.merged) + 1).sum::<u64>(), 50_000);
        assert!(rounds.is_sorted_by_key(|round| round.n));
        assert_eq!((rounds[1].n, rounds.last().map(|round| round.n)), (1, Some(49_999)));
    }
}
