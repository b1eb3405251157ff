//! One bandwidth limit for all data streams of a mirror together, and one for all mirrors of an agent.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::fair_queue::{ALONE, FairQueue, Member};

/// How much time's worth of bytes may pass at once.
const BURST: Duration = Duration::from_millis(4);
/// The smallest piece worth its own system call, and the content of one TLS record: bytes.
const MIN_QUANTUM: usize = 16 << 10;
/// The largest piece handed to the kernel at once: bytes. With 1 MiB the sender needed more
/// processor time in each of four runs on loopback.
pub(crate) const MAX_QUANTUM: usize = 256 << 10;
/// The balance is kept in billionths of a byte, so that nothing is lost in rounding.
const NANO: i128 = 1_000_000_000;

/// A token bucket shared by all data streams of a session. It can be [within](Bandwidth::within) another one, which
/// several sessions share.
///
/// Takers are served in the order they came, so no stream starves. A taker waits until the bucket is not in debt,
/// then takes all it asked for, even more than the bucket holds; the next one waits for it. Averages are
/// therefore exact whatever the sizes. The limit may change at any time, also under those who wait.
/// Without a limit, taking is one relaxed atomic addition.
///
/// Sessions that share a bucket get equal parts of it, however many streams each has; what one does not use goes to the
/// others.
#[derive(Debug)]
pub struct Bandwidth {
    /// Bytes per second; 0 is no limit.
    limit: AtomicU64,
    /// Bytes taken so far.
    sent: AtomicU64,
    bucket: Mutex<Bucket>,
    /// Someone left the queue, or the limit changed, or a taker was aborted.
    changed: Condvar,
    clock: Box<dyn Clock>,
    /// The bucket that this one takes from in turn, and who it is there.
    shared: Option<(Arc<Bandwidth>, Member)>,
}

#[derive(Debug)]
struct Bucket {
    /// Billionths of bytes that may be taken now; negative is debt.
    balance: i128,
    /// The clock when the balance was last brought up to date.
    filled: Duration,
    /// Those who wait.
    queue: FairQueue,
}

impl Bucket {
    fn new(now: Duration) -> Self {
        Self { balance: 0, filled: now, queue: FairQueue::default() }
    }
}

/// Time, so that tests can make it pass.
trait Clock: Send + Sync + std::fmt::Debug {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;
    /// Waits for a notification or until so much time has passed.
    fn wait<'a>(
        &self,
        changed: &Condvar,
        bucket: MutexGuard<'a, Bucket>,
        time: Duration,
    ) -> MutexGuard<'a, Bucket>;
}

#[derive(Debug)]
struct Monotonic(Instant);

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wait<'a>(
        &self,
        changed: &Condvar,
        bucket: MutexGuard<'a, Bucket>,
        time: Duration,
    ) -> MutexGuard<'a, Bucket> {
        changed.wait_timeout(bucket, time).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Bandwidth {
    /// A new limit in bytes per second, counted as TLS sends them; `None` is no limit.
    #[must_use]
    pub fn new(limit: Option<NonZeroU64>) -> Arc<Self> {
        Arc::new(Self::with_clock(limit, Box::new(Monotonic(Instant::now()))))
    }

    fn with_clock(limit: Option<NonZeroU64>, clock: Box<dyn Clock>) -> Self {
        Self {
            limit: AtomicU64::new(limit.map_or(0, NonZeroU64::get)),
            sent: AtomicU64::new(0),
            bucket: Mutex::new(Bucket::new(clock.now())),
            changed: Condvar::new(),
            clock,
            shared: None,
        }
    }

    /// A new limit of its own for a session that has to share `all` with others.
    #[must_use]
    pub fn within(all: &Arc<Self>, limit: Option<NonZeroU64>) -> Arc<Self> {
        Arc::new(Self::with_clock(limit, Box::new(Monotonic(Instant::now()))).sharing(all))
    }

    fn sharing(mut self, all: &Arc<Self>) -> Self {
        let member = all.lock().queue.join();
        self.shared = Some((Arc::clone(all), member));
        self
    }

    /// Changes the limit, at once also for those who wait; `None` is no limit.
    pub fn set(&self, limit: Option<NonZeroU64>) {
        let mut bucket = self.lock();
        // What has come in until now came in at the old rate.
        self.fill(&mut bucket);
        self.limit.store(limit.map_or(0, NonZeroU64::get), Ordering::Relaxed);
        if limit.is_none() {
            // A debt is forgotten with the limit it was made under.
            bucket.balance = 0;
        }
        self.changed.notify_all();
    }

    /// The limit now, in bytes per second.
    #[must_use]
    pub fn limit(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.limit.load(Ordering::Relaxed))
    }

    /// Bytes taken so far, by all streams together.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Takes so many bytes, blocking the thread until they may be sent.
    pub fn take(&self, bytes: usize) {
        self.take_unless(bytes, &AtomicBool::new(false));
    }

    /// As [`Bandwidth::take`], but gives up, and returns false, once `aborted` is set and [`Bandwidth::wake`] called.
    pub(crate) fn take_unless(&self, bytes: usize, aborted: &AtomicBool) -> bool {
        let taken = self.take_as(ALONE, bytes, aborted);
        match &self.shared {
            Some((all, member)) => taken && all.take_as(*member, bytes, aborted),
            None => taken,
        }
    }

    fn take_as(&self, member: Member, bytes: usize, aborted: &AtomicBool) -> bool {
        if self.limit.load(Ordering::Relaxed) != 0 && !self.wait_for(member, bytes, aborted) {
            return false;
        }
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        true
    }

    /// Makes all who wait look at their abort flags.
    pub(crate) fn wake(&self) {
        // Under the lock, so that nobody is between looking at the flag and going to sleep.
        let bucket = self.lock();
        self.changed.notify_all();
        drop(bucket);
        if let Some((all, _)) = &self.shared {
            all.wake();
        }
    }

    /// How many bytes a stream should take at once, now: a few milliseconds' worth, in whole TLS records.
    pub(crate) fn quantum(&self) -> usize {
        let all = self.shared.as_ref().map_or(MAX_QUANTUM, |(all, _)| all.quantum());
        let Some(limit) = self.limit() else { return all };
        let burst = u128::from(limit.get()) * BURST.as_millis() / 1000;
        let burst = usize::try_from(burst).unwrap_or(MAX_QUANTUM).clamp(MIN_QUANTUM, all);
        burst / MIN_QUANTUM * MIN_QUANTUM
    }

    fn wait_for(&self, member: Member, bytes: usize, aborted: &AtomicBool) -> bool {
        let mut bucket = self.lock();
        let me = bucket.queue.enter(member, bytes);
        let taken = loop {
            if aborted.load(Ordering::Relaxed) {
                break false;
            }
            self.fill(&mut bucket);
            let limit = self.limit.load(Ordering::Relaxed);
            if limit == 0 {
                break true;
            }
            if bucket.queue.front() != Some(me) {
                bucket = self.changed.wait(bucket).unwrap_or_else(PoisonError::into_inner);
            } else if bucket.balance >= 0 {
                bucket.balance -= bytes as i128 * NANO;
                break true;
            } else {
                // Rounded up: after this wait the debt is paid, so nobody spins through the last nanosecond.
                let nanoseconds = (-bucket.balance) as u128 / u128::from(limit) + 1;
                let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
                bucket = self.clock.wait(&self.changed, bucket, time);
            }
        };
        bucket.queue.leave(me, taken);
        if !bucket.queue.is_empty() {
            self.changed.notify_all();
        }
        taken
    }

    /// Brings the balance up to date.
    fn fill(&self, bucket: &mut Bucket) {
        let now = self.clock.now();
        let passed = now.saturating_sub(bucket.filled);
        bucket.filled = now;
        let limit = i128::from(self.limit.load(Ordering::Relaxed));
        // A nanosecond brings `limit` billionths of a byte.
        bucket.balance = bucket
            .balance
            .saturating_add(limit.saturating_mul(passed.as_nanos() as i128))
            .min(limit * BURST.as_nanos() as i128);
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // Nothing in here panics between two states that belong together.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Bandwidth {
    fn drop(&mut self) {
        if let Some((all, member)) = &self.shared {
            all.lock().queue.forget(*member);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::thread;

    /// Passes exactly as fast as someone waits.
    #[derive(Debug, Clone, Default)]
    struct Virtual(Arc<AtomicU64>);

    impl Virtual {
        fn pass(&self, time: Duration) {
            self.0.fetch_add(u64::try_from(time.as_nanos()).expect("short"), Ordering::SeqCst);
        }
    }

    impl Clock for Virtual {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::SeqCst))
        }

        fn wait<'a>(
            &self,
            _: &Condvar,
            bucket: MutexGuard<'a, Bucket>,
            time: Duration,
        ) -> MutexGuard<'a, Bucket> {
            self.pass(time);
            bucket
        }
    }

    fn limited(limit: u64) -> (Arc<Bandwidth>, Virtual) {
        let clock = Virtual::default();
        (Arc::new(Bandwidth::with_clock(NonZeroU64::new(limit), Box::new(clock.clone()))), clock)
    }

    proptest! {
        #[test]
        fn the_average_is_the_limit_whatever_the_sizes(
            limit in 1_000u64..10_000_000_000,
            sizes in prop::collection::vec(1usize..1_000_000, 20..200),
        ) {
            let (bandwidth, clock) = limited(limit);
            for &size in &sizes { bandwidth.take(size); }
            let total: u64 = sizes.iter().map(|&s| s as u64).sum();
            prop_assert_eq!(bandwidth.sent(), total);
            // The last one's debt is not yet waited for; the rest must have taken its time, to the nanosecond
            // that each wait is rounded up by.
            let waited_for = total - *sizes.last().expect("not empty") as u64;
            let exact = u128::from(waited_for) * 1_000_000_000 / u128::from(limit);
            let passed = clock.now().as_nanos();
            prop_assert!(passed >= exact, "{passed} ns for what takes {exact} ns");
            prop_assert!(passed <= exact + 2 * sizes.len() as u128, "{passed} ns for what takes {exact} ns");
        }
    }

    #[test]
    fn an_idle_bucket_saves_up_no_more_than_a_burst() {
        let (bandwidth, clock) = limited(1_000_000);
        clock.pass(Duration::from_secs(3600));
        let before = clock.now();
        for _ in 0..1000 {
            bandwidth.take(1000);
        }
        let passed = clock.now() - before;
        // One million bytes at a million per second, less the 4,000 of the burst and the debt of the last.
        assert_eq!(passed.as_millis(), 995, "{passed:?}");
    }

    #[test]
    fn threads_share_one_limit() {
        let (bandwidth, clock) = limited(1_000_000);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        bandwidth.take(1000);
                    }
                });
            }
        });
        assert_eq!(bandwidth.sent(), 2_000_000);
        let passed = clock.now();
        assert!(passed >= Duration::from_micros(1_999_000), "{passed:?}");
        assert!(passed < Duration::from_micros(2_000_010), "{passed:?}");
    }

    #[test]
    fn a_session_keeps_to_its_own_limit_and_to_the_one_it_shares() {
        for (own, all) in [(1_000_000, 3_000_000), (3_000_000, 1_000_000), (0, 1_000_000), (1_000_000, 0)] {
            let clock = Virtual::default();
            let with = |limit| Bandwidth::with_clock(NonZeroU64::new(limit), Box::new(clock.clone()));
            let shared = Arc::new(with(all));
            let session = with(own).sharing(&shared);
            assert!(session.quantum() <= MAX_QUANTUM && session.quantum() <= shared.quantum());
            for _ in 0..1000 {
                session.take(1000);
            }
            let passed = clock.now();
            assert!((0.99..1.01).contains(&passed.as_secs_f64()), "{own} {all}: {passed:?}");
            assert_eq!((session.sent(), shared.sent()), (1_000_000, 1_000_000));
            drop(session);
            assert!(shared.lock().queue.knows_nobody(), "a session that ended is forgotten");
        }
    }

    #[test]
    fn one_that_waits_for_what_is_shared_can_be_aborted() {
        let all = Bandwidth::new(NonZeroU64::new(1));
        let session = Bandwidth::within(&all, None);
        session.take(1_000_000);
        let aborted = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| session.take_unless(5, &aborted));
            while all.lock().queue.is_empty() {
                thread::yield_now();
            }
            aborted.store(true, Ordering::Relaxed);
            session.wake();
            assert!(!waiting.join().expect("no panic"), "took although aborted");
        });
    }

    #[test]
    fn no_limit_takes_no_time() {
        let clock = Virtual::default();
        let bandwidth = Bandwidth::with_clock(None, Box::new(clock.clone()));
        bandwidth.take(usize::MAX / 2);
        assert_eq!(clock.now(), Duration::ZERO);
        assert_eq!(bandwidth.quantum(), MAX_QUANTUM);
    }

    #[test]
    fn lifting_the_limit_frees_those_who_wait() {
        // A real clock: one byte per second, and a debt of eleven days.
        let bandwidth = Bandwidth::new(NonZeroU64::new(1));
        bandwidth.take(1_000_000);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| bandwidth.take(1_000_000));
            }
            while bandwidth.lock().queue.len() < 3 {
                thread::yield_now();
            }
            bandwidth.set(None);
        });
        assert_eq!(bandwidth.sent(), 4_000_000);
    }

    #[test]
    fn an_aborted_taker_leaves_and_the_others_are_served() {
        let bandwidth = Bandwidth::new(NonZeroU64::new(1));
        bandwidth.take(1_000_000);
        let aborted = AtomicBool::new(false);
        thread::scope(|scope| {
            let first = scope.spawn(|| bandwidth.take_unless(5, &aborted));
            while bandwidth.lock().queue.is_empty() {
                thread::yield_now();
            }
            let second = scope.spawn(|| bandwidth.take(7));
            aborted.store(true, Ordering::Relaxed);
            bandwidth.wake();
            assert!(!first.join().expect("no panic"), "took although aborted");
            bandwidth.set(None);
            second.join().expect("no panic");
        });
        assert_eq!(bandwidth.sent(), 1_000_007);
    }

    #[test]
    fn a_new_limit_counts_from_now_on() {
        let (bandwidth, clock) = limited(1_000);
        bandwidth.take(1_000);
        clock.pass(Duration::from_millis(500));
        bandwidth.set(NonZeroU64::new(500_000));
        // 500 bytes of debt are left, a millisecond's worth at the new rate.
        let before = clock.now();
        bandwidth.take(1);
        let passed = clock.now() - before;
        assert!(passed >= Duration::from_millis(1) && passed < Duration::from_micros(1001), "{passed:?}");
    }

    #[test]
    fn pieces_are_a_few_milliseconds_worth_and_whole_records() {
        for (limit, quantum) in
            [(1, 16 << 10), (12_500_000, 48 << 10), (125_000_000, 256 << 10), (u64::MAX, 256 << 10)]
        {
            assert_eq!(limited(limit).0.quantum(), quantum, "at {limit} bytes per second");
        }
    }
}
