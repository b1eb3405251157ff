//! Which encoding moves guest memory soonest, by measurement.
//!
//! A worker compresses, then writes; the kernel sends what was written while the worker compresses the next. So what a byte
//! of guest memory costs is the larger of two times: the worker's, for compressing it and writing what is left, and the
//! stream's, for carrying what is left. All of them are measured all the time:
//!
//! - how fast each encoding is and how much it leaves: now and then all are tried on the same frame, since guest memory is of
//!   many kinds, and what one leaves of a log says nothing against what another leaves of a library. It is a whole frame, for
//!   what the higher levels are better at is to find what is far back;
//! - what CPU time a write takes;
//! - how fast the stream is: from the end of one write that had to wait to the end of another the buffers were full, so what
//!   was written in between is what was carried. Streams share a link, so what all of them wrote counts, and each has its part:
//!   one that has the link for itself, because the others are at work, is not faster for it. A stream that takes more than any
//!   buffer without a wait is at least as fast as it was fed.
//!
//! The encoding with the least cost is used, or one that costs little more and leaves less: bytes are somebody's as well.

use std::time::{Duration, Instant};

/// An encoding and how hard it tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    None,
    Lz4,
    /// With this level.
    Zstd(i32),
}

/// What there is to choose from, the least work first.
pub(crate) const METHODS: [Method; 5] =
    [Method::None, Method::Lz4, Method::Zstd(1), Method::Zstd(3), Method::Zstd(6)];
/// Every how many frames the methods are tried: at the very first, later, and where nothing gets smaller.
const TRY_EVERY: (u32, u32, u32) = (1, 32, 256);
/// Where something would get smaller and is not worth it.
const TRY_UNUSED: u32 = 64;
/// One that seems not to pay is tried so often, every how many tries: what it costs may have been measured at a bad moment. Not one
/// whose work alone is so many times what the cheapest costs.
const TRY_AGAIN: (u32, f64) = (4, 3.0);
/// What is new counts so much against what was measured before.
const NEW: f64 = 0.25;
/// How much more a method may cost than the cheapest, if it leaves less.
const MORE: f64 = 1.3;
/// What is left counts as less if it is not more than this much of it.
const LESS: f64 = 0.98;
/// What leaves more than this gains nothing.
const GAINS: f64 = 0.95;
/// A stretch of fewer bytes says little of a stream's speed.
const TELLING: u64 = 1 << 20;
/// More than the buffers of a stream take: the kernel gives a socket 4 MiB to 6 MiB unless told otherwise (`tcp_wmem`).
const BUFFERS: u64 = 8 << 20;
/// What a link is taken for until it has shown what it is, in nanoseconds per byte: 1 Gbit/s. The buffers take megabytes before it
/// does, and those are to cross it as well.
const ASSUMED: f64 = 8.0;
/// By how much a stream is taken to be faster that has long not made wait.
const FASTER: f64 = 0.7;

/// Nanoseconds per byte, or bytes per byte, as measured lately.
#[derive(Debug, Clone, Copy, Default)]
struct Lately(Option<f64>);

impl Lately {
    fn learn(&mut self, now: f64) {
        self.0 = Some(self.0.map_or(now, |before| before + NEW * (now - before)));
    }

    /// Learns what is now and then measured as far more than it is: of CPU time, what an interrupt took.
    fn learn_but_outliers(&mut self, now: f64) {
        self.learn(self.0.map_or(now, |before| now.min(2.0 * before)));
    }
}

/// What a method is known to do.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// CPU time per byte that goes in, in nanoseconds.
    work: Lately,
    /// Bytes that come out per byte that goes in, of the frames it was tried on.
    left: Lately,
    /// What the method before leaves of the same frames.
    left_before: Lately,
}

impl Known {
    /// Bytes that come out per byte that the method before leaves of the same memory.
    fn part(&self) -> Option<f64> {
        Some(self.left.0? / self.left_before.0?)
    }
}

/// A write to the stream that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    pub(crate) bytes: u64,
    /// What all streams have written so far, in bytes.
    pub(crate) by_all: u64,
    /// CPU time.
    pub(crate) took: Duration,
    /// It had to wait until the stream took it.
    pub(crate) waited: bool,
    pub(crate) at: Instant,
}

/// What was written since a moment.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    since: Instant,
    bytes: u64,
    /// What all streams had written at its beginning, in bytes.
    by_all: u64,
    /// The buffers were full at its beginning.
    from_full: bool,
}

/// Chooses a method by measurement.
#[derive(Debug)]
pub(crate) struct Balance {
    /// How many streams share the link.
    streams: f64,
    known: [Known; METHODS.len()],
    /// CPU time per byte of a write, in nanoseconds.
    write: Lately,
    /// Time per byte that the stream carries, in nanoseconds. None where that has not shown yet.
    link: Lately,
    stretch: Option<Stretch>,
    /// Frames until the next try, and how many there were between the last two.
    until_try: u32,
    try_every: u32,
    tries: u32,
    /// The method tried last on this frame, and what it left per byte.
    tried: (usize, f64),
}

impl Balance {
    /// For one of so many streams.
    pub(crate) fn new(streams: u16) -> Balance {
        Balance {
            streams: f64::from(streams.max(1)),
            known: Default::default(),
            write: Lately::default(),
            link: Lately::default(),
            stretch: None,
            until_try: TRY_EVERY.0,
            try_every: TRY_EVERY.0,
            tries: 0,
            tried: (0, 1.0),
        }
    }

    /// Whether the methods are to be tried on the next frame. To be asked once for each.
    pub(crate) fn is_try_due(&mut self) -> bool {
        self.until_try = self.until_try.saturating_sub(1);
        let due = self.until_try == 0;
        if due {
            let (_, usual, most) = TRY_EVERY;
            let gains = (1..=2).any(|method| self.left(method).is_none_or(|left| left < GAINS));
            let every = match METHODS[self.choose()] {
                _ if !gains => most,
                Method::None => TRY_UNUSED,
                _ => usual,
            };
            self.try_every = (self.try_every * 2).min(every);
            self.until_try = self.try_every;
            self.tries += 1;
            self.tried = (0, 1.0);
        }
        due
    }

    /// Whether a method could be worth it at all: one whose work alone costs more than another in whole is not. A method does
    /// more work than the one before.
    pub(crate) fn may_pay(&self, method: usize) -> bool {
        let known = |method: usize| self.known.get(method).and_then(|known| known.work.0);
        let least = known(method).or(method.checked_sub(1).and_then(known)).unwrap_or(0.0);
        let (every, most) = TRY_AGAIN;
        let again = if self.tries.is_multiple_of(every) && known(method).is_some() { most } else { MORE };
        method == 1 || !self.is_hopeless(method) && self.best().is_some_and(|best| least <= best * again)
    }

    /// Where the first level of Zstandard finds nothing, no other does.
    fn is_hopeless(&self, method: usize) -> bool {
        method > 2 && self.left(2).is_some_and(|left| left > GAINS)
    }

    /// The method for a frame, by its place among [`METHODS`].
    pub(crate) fn choose(&self) -> usize {
        let Some(best) = self.best() else { return 0 };
        let mut chosen: Option<(usize, f64)> = None;
        for method in 0..METHODS.len() {
            let Some(cost) = self.cost(method) else { continue };
            let left = self.left(method).unwrap_or(1.0);
            let less = chosen.is_none_or(|(_, least)| left <= least * LESS);
            if cost <= best * MORE && less {
                chosen = Some((method, left));
            }
        }
        chosen.map_or(0, |(method, _)| method)
    }

    /// The least that a byte of memory costs with any method, in nanoseconds.
    fn best(&self) -> Option<f64> {
        (0..METHODS.len()).filter_map(|method| self.cost(method)).min_by(f64::total_cmp)
    }

    /// Bytes that come out per byte that goes in.
    fn left(&self, method: usize) -> Option<f64> {
        self.known[1..=method].iter().map(Known::part).product()
    }

    /// Time per byte that the stream carries, in nanoseconds.
    fn link(&self) -> f64 {
        self.link.0.unwrap_or(ASSUMED * self.streams)
    }

    /// What a byte of memory costs with a method, in nanoseconds. None where too little is known.
    fn cost(&self, method: usize) -> Option<f64> {
        let work = if method == 0 { Some(0.0) } else { self.known[method].work.0 };
        let left = self.left(method).filter(|_| !self.is_hopeless(method))?;
        Some((work? + left * self.write.0?).max(left * self.link()))
    }

    /// Takes in what a method has done when it was tried, after those before it that were tried on the same frame.
    pub(crate) fn tried(&mut self, method: usize, input: usize, output: usize, time: Duration) {
        let input = input.max(1) as f64;
        self.known[method].work.learn_but_outliers(nanos(time) / input);
        let (last, left) = self.tried;
        // What those in between would have left, by what they do elsewhere.
        let between = self.known[last + 1..method].iter().filter_map(Known::part);
        let before = left * between.product::<f64>();
        let left = (output as f64 / input).clamp(f64::MIN_POSITIVE, 1.0);
        self.known[method].left.learn(left);
        self.known[method].left_before.learn(before.max(f64::MIN_POSITIVE));
        self.tried = (method, left);
    }

    /// Takes in what the stream has done.
    pub(crate) fn written(&mut self, written: Written) {
        let Written { bytes, by_all, took, waited, at } = written;
        if bytes > 0 {
            self.write.learn(nanos(took) / bytes as f64);
        }
        let Some(stretch) = &mut self.stretch else {
            self.stretch = Some(Stretch { since: at, bytes: 0, by_all, from_full: waited });
            return;
        };
        stretch.bytes += bytes;
        let Stretch { since, bytes, by_all: before, from_full } = *stretch;
        let carried = by_all.saturating_sub(before);
        let pace = self.streams * nanos(at.saturating_duration_since(since)) / carried.max(1) as f64;
        if waited {
            if from_full && carried < TELLING {
                return;
            }
            if from_full {
                self.link.learn(pace);
            }
            self.stretch = Some(Stretch { since: at, bytes: 0, by_all, from_full: true });
        } else if bytes >= BUFFERS {
            // It carries at least what it was fed, and who is fed little shows little: it is taken to be faster, until it makes
            // wait again.
            self.link.0 = Some(self.link().min(pace) * FASTER);
            self.stretch = Some(Stretch { since: at, bytes: 0, by_all, from_full: false });
        }
    }

    /// Nothing is written for a while: the buffers empty themselves.
    pub(crate) fn rest(&mut self) {
        self.stretch = None;
    }
}

fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: f64 = (1 << 20) as f64;
    /// What a booted Debian userland in 1 MiB blocks gave on one core, in nanoseconds per byte and parts of what went in.
    const WORK: [f64; 5] = [0.0, 1.06, 1.45, 2.39, 6.4];
    const LEFT: [f64; 5] = [1.0, 0.455, 0.345, 0.316, 0.303];
    /// Encryption and copying, in nanoseconds per byte.
    const WRITE: f64 = 1.2;

    /// A worker and its stream, in a time of their own.
    struct Model {
        balance: Balance,
        now: Instant,
        /// Bytes in the stream's buffers, which take so many.
        buffered: f64,
        buffers: f64,
        written: u64,
        used: [u32; 5],
    }

    impl Model {
        fn new(buffers: f64) -> Model {
            let balance = Balance::new(1);
            Model { balance, now: Instant::now(), buffered: 0.0, buffers, written: 0, used: [0; 5] }
        }

        /// Lets time pass in which a stream of that pace carries what is buffered.
        fn pass(&mut self, nanoseconds: f64, link: f64) {
            self.now += Duration::from_nanos(nanoseconds as u64);
            self.buffered = (self.buffered - nanoseconds / link).max(0.0);
        }

        /// Sends frames over a stream of that pace. Returns how long that took per byte of memory, in nanoseconds.
        fn send(&mut self, frames: u32, link: f64, left: [f64; 5]) -> f64 {
            let begin = self.now;
            self.used = [0; 5];
            for _ in 0..frames {
                if self.balance.is_try_due() {
                    for method in 1..METHODS.len() {
                        if self.balance.may_pay(method) {
                            let work = WORK[method] * FRAME;
                            self.pass(work, link);
                            let left = (left[method] * FRAME) as usize;
                            self.balance.tried(
                                method,
                                FRAME as usize,
                                left,
                                Duration::from_nanos(work as u64),
                            );
                        }
                    }
                }
                let method = self.balance.choose();
                self.used[method] += 1;
                let bytes = FRAME * left[method];
                self.pass(WORK[method] * FRAME, link);
                self.buffered += bytes;
                self.pass(bytes * WRITE, link);
                let over = self.buffered - self.buffers;
                let waited = over > 0.0;
                if waited {
                    self.pass(over * link, link);
                }
                let (at, took) = (self.now, Duration::from_nanos((bytes * WRITE) as u64));
                let bytes = bytes as u64;
                self.written += bytes;
                self.balance.written(Written { bytes, by_all: self.written, took, waited, at });
            }
            nanos(self.now - begin) / (f64::from(frames) * FRAME)
        }

        /// The method that most of those frames were sent with.
        fn most_used(&self) -> Method {
            let most = (0..METHODS.len()).max_by_key(|&method| self.used[method]);
            METHODS[most.unwrap_or(0)]
        }
    }

    #[test]
    fn the_slower_the_link_the_more_is_compressed() {
        for (link, method) in [
            (0.1, Method::None),
            (0.8, Method::None),
            (2.0, Method::Lz4),
            (10.0, Method::Zstd(3)),
            (80.0, Method::Zstd(6)),
        ] {
            let mut model = Model::new(FRAME * 3.0);
            model.send(100, link, LEFT);
            model.send(300, link, LEFT);
            assert_eq!(model.most_used(), method, "{link} ns per byte: {:?}", model.balance);
        }
    }

    #[test]
    fn what_is_chosen_is_nearly_as_fast_as_the_best() {
        for link in [0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 80.0, 800.0] {
            for buffers in [1.0, 4.0] {
                let mut model = Model::new(FRAME * buffers);
                model.send(60, link, LEFT);
                let chosen = model.send(600, link, LEFT);
                let best =
                    (0..5).map(|m| (WORK[m] + LEFT[m] * WRITE).max(LEFT[m] * link)).fold(f64::MAX, f64::min);
                assert!(chosen < best * 1.4, "{link}, {buffers}: {chosen} against {best}: {:?}", model.used);
            }
        }
    }

    #[test]
    fn a_link_that_changes_is_followed() {
        let mut model = Model::new(FRAME * 3.0);
        for _ in 0..3 {
            model.send(300, 16.0, LEFT);
            model.send(100, 16.0, LEFT);
            assert_eq!(model.most_used(), Method::Zstd(3));
            model.send(300, 0.2, LEFT);
            model.send(100, 0.2, LEFT);
            assert_eq!(model.most_used(), Method::None, "{:?}", model.balance);
        }
    }

    #[test]
    fn a_stream_that_has_the_link_for_itself_takes_it_to_be_shared_all_the_same() {
        let mut model = Model::new(FRAME * 3.0);
        model.balance = Balance::new(2);
        model.send(300, 8.0, LEFT);
        model.send(100, 8.0, LEFT);
        let mut alone = Model::new(FRAME * 3.0);
        alone.send(300, 16.0, LEFT);
        alone.send(100, 16.0, LEFT);
        assert_eq!(model.most_used(), alone.most_used());
    }

    #[test]
    fn what_does_not_get_smaller_is_left_alone_and_seldom_tried() {
        for link in [0.5, 8.0, 80.0] {
            let mut model = Model::new(FRAME * 3.0);
            let took = model.send(1000, link, [1.0; 5]);
            assert!(model.used[0] == 1000, "{link}: {:?}", model.used);
            assert!(took < WRITE.max(link) * 1.05, "{link}: {took}");
        }
    }

    #[test]
    fn one_bad_measurement_does_not_write_a_method_off() {
        let mut model = Model::new(FRAME * 3.0);
        model.send(60, 16.0, LEFT);
        let unlucky = Duration::from_nanos((40.0 * FRAME) as u64);
        model.balance.tried = (2, LEFT[2]);
        model.balance.tried(3, FRAME as usize, (LEFT[3] * FRAME) as usize, unlucky);
        model.send(400, 16.0, LEFT);
        model.send(100, 16.0, LEFT);
        assert_eq!(model.most_used(), Method::Zstd(3), "{:?}", model.balance);
    }

    #[test]
    fn frames_of_different_kinds_count_by_their_bytes() {
        let mut balance = Balance::new(1);
        for _ in 0..50 {
            // All but nothing is left of one, all of the other.
            for parts in [[0.01, 0.001], [1.0, 1.0]] {
                balance.tried = (0, 1.0);
                for (method, part) in (1..).zip(parts) {
                    balance.tried(method, 1 << 20, (part * FRAME) as usize, Duration::from_millis(1));
                }
            }
        }
        let left = balance.left(2).expect("tried");
        assert!((0.4..0.6).contains(&left), "{left}");
    }

    #[test]
    fn little_is_spent_before_the_first_choice() {
        let mut model = Model::new(FRAME * 3.0);
        model.send(16, 16.0, LEFT);
        assert!(model.used[0] <= 8, "{:?}", model.used);
        model.send(32, 16.0, LEFT);
        assert_eq!(model.most_used(), Method::Zstd(3), "{:?}", model.used);
    }
}
