//! Where a stream's time goes: the clock, the states of both halves, and the ledger that adds them up.
//!
//! Every moment belongs to exactly one state on each half. A state is entered, never left by hand, so the
//! sums add up to the half's life by construction; the state that is still going on is counted by whoever
//! reads, up to the moment of reading.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::time::Instant;

#[cfg(test)]
use std::sync::Arc;

/// Nanoseconds since the stream began.
pub(crate) type Nanos = u64;

/// Tells a stream's age.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    Monotonic(Instant),
    /// Moved by hand, so that tests can state sums to the nanosecond.
    #[cfg(test)]
    Manual(Arc<AtomicU64>),
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self::Monotonic(Instant::now())
    }

    pub(crate) fn now(&self) -> Nanos {
        match self {
            // 584 years fit into a u64 of nanoseconds.
            Self::Monotonic(start) => {
                let age = start.elapsed();
                age.as_secs() * 1_000_000_000 + u64::from(age.subsec_nanos())
            }
            #[cfg(test)]
            Self::Manual(now) => now.load(Ordering::Relaxed),
        }
    }
}

/// What the consumer's half does. `Overlap` and `Backlog` are both "the user's code or the decoder holds
/// rows"; they differ in whether more rows lie in the channel meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Consumer {
    SourceWait = 0,
    Scheduled = 1,
    Overlap = 2,
    Backlog = 3,
    Paused = 4,
}

/// What the producer's half does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Producer {
    Source = 0,
    Room = 1,
}

/// A life cut into `N` states.
#[derive(Debug)]
struct Partition<const N: usize> {
    sums: [AtomicU64; N],
    /// The running state; `N` once the life is over.
    state: AtomicUsize,
    since: AtomicU64,
}

impl<const N: usize> Partition<N> {
    fn new(state: usize) -> Self {
        Self {
            sums: [const { AtomicU64::new(0) }; N],
            state: AtomicUsize::new(state),
            since: AtomicU64::new(0),
        }
    }

    fn enter(&self, state: usize, now: Nanos) {
        let since = self.since.load(Ordering::Relaxed);
        if let Some(sum) = self.sums.get(self.state.load(Ordering::Relaxed)) {
            add(sum, now.saturating_sub(since));
            self.since.store(now.max(since), Ordering::Relaxed);
            self.state.store(state, Ordering::Relaxed);
        }
    }

    fn is(&self, state: usize) -> bool {
        self.state.load(Ordering::Relaxed) == state
    }

    fn read(&self, now: Nanos) -> [Nanos; N] {
        let mut sums: [Nanos; N] = std::array::from_fn(|i| self.sums[i].load(Ordering::Relaxed));
        if let Some(sum) = sums.get_mut(self.state.load(Ordering::Relaxed)) {
            *sum += now.saturating_sub(self.since.load(Ordering::Relaxed));
        }
        sums
    }
}

/// Adds to a counter that has one writer at a time: cheaper than an atomic addition.
fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(value), Ordering::Relaxed);
}

/// Sums at one moment of the consumer's half, for the sliding window.
#[derive(Debug)]
struct Mark {
    at: AtomicU64,
    sums: [AtomicU64; STATES],
}

const STATES: usize = 5;
/// The length of the sliding window.
const WINDOW: Nanos = 10_000_000_000;
const MARK_EVERY: Nanos = 1_000_000_000;
/// One more than the window has seconds, and one for the mark being written.
const MARKS: usize = 12;
/// A timer of the runtime may be this late (its grain is 1 ms) before it counts as starved.
const TIMER_GRACE: Nanos = 4_000_000;

/// The time of one stream. Transitions are made by one writer at a time (the channel's lock sees to that);
/// readers take no lock and see a consistent state by its version.
#[derive(Debug)]
pub(crate) struct Ledger {
    clock: Clock,
    version: AtomicU64,
    consumer: Partition<STATES>,
    producer: Partition<2>,
    /// When the timer that proves the runtime alive is due while the consumer waits; `u64::MAX` for none.
    timer_due: AtomicU64,
    decode: AtomicU64,
    marks: [Mark; MARKS],
    marked: AtomicUsize,
}

/// The sums of both halves at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) at: Nanos,
    pub(crate) consumer: [Nanos; STATES],
    pub(crate) producer: [Nanos; 2],
    pub(crate) decode: Nanos,
}

impl Times {
    pub(crate) fn of(&self, state: Consumer) -> Nanos {
        self.consumer[state as usize]
    }
}

impl Ledger {
    pub(crate) fn new(clock: Clock) -> Self {
        Self {
            clock,
            version: AtomicU64::new(0),
            // Until the first poll the rows are awaited by no one: the caller is busy elsewhere.
            consumer: Partition::new(Consumer::Overlap as usize),
            producer: Partition::new(Producer::Source as usize),
            timer_due: AtomicU64::new(Nanos::MAX),
            decode: AtomicU64::new(0),
            marks: std::array::from_fn(|_| Mark {
                at: AtomicU64::new(0),
                sums: [const { AtomicU64::new(0) }; STATES],
            }),
            marked: AtomicUsize::new(0),
        }
    }

    pub(crate) fn now(&self) -> Nanos {
        self.clock.now()
    }

    /// The consumer's half goes over into `state`. Call under the channel's lock.
    pub(crate) fn consumer(&self, state: Consumer, now: Nanos) {
        self.write(|| {
            self.split_late_wait(now);
            self.consumer.enter(state as usize, now);
            self.mark(now);
        });
    }

    /// The producer's half goes over into `state`. Call under the channel's lock.
    pub(crate) fn producer(&self, state: Producer, now: Nanos) {
        self.write(|| self.producer.enter(state as usize, now));
    }

    pub(crate) fn end_consumer(&self, now: Nanos) {
        self.write(|| {
            self.split_late_wait(now);
            self.consumer.enter(STATES, now);
        });
    }

    pub(crate) fn end_producer(&self, now: Nanos) {
        self.write(|| self.producer.enter(2, now));
    }

    pub(crate) fn consumer_is(&self, state: Consumer) -> bool {
        self.consumer.is(state as usize)
    }

    /// Whether the consumer's half is over.
    pub(crate) fn is_ended(&self) -> bool {
        self.consumer.is(STATES)
    }

    pub(crate) fn producer_is(&self, state: Producer) -> bool {
        self.producer.is(state as usize)
    }

    /// The runtime runs a timer's task now, and will again at `due`. Call under the channel's lock. What a wait
    /// lasts from then on, beyond a timer's grain and until the next call, was not the source's doing: the
    /// runtime could not even run a timer.
    pub(crate) fn expect_timer(&self, due: Nanos) {
        self.write(|| {
            self.split_late_wait(self.now());
            self.timer_due.store(due, Ordering::Relaxed);
        });
    }

    /// Counts `spent` as decoding; it is part of the time in which the consumer holds rows.
    pub(crate) fn decoded(&self, spent: Nanos) {
        add(&self.decode, spent);
    }

    /// The decoding alone: cheaper than all sums.
    pub(crate) fn read_decode(&self) -> Nanos {
        self.decode.load(Ordering::Relaxed)
    }

    /// The sums up to now, running states included.
    pub(crate) fn read(&self) -> Times {
        self.consistent(|| self.read_at(self.now()))
    }

    /// The sums at the beginning of the sliding window.
    pub(crate) fn read_window_start(&self) -> Times {
        self.consistent(|| {
            let now = self.read_at(self.now());
            self.window_start(&now)
        })
    }

    fn read_at(&self, now: Nanos) -> Times {
        let mut consumer = self.consumer.read(now);
        // No more than there is: the parts may have been read while they were written.
        let late = self.late(now).min(consumer[Consumer::SourceWait as usize]);
        consumer[Consumer::SourceWait as usize] -= late;
        consumer[Consumer::Scheduled as usize] += late;
        let busy = consumer[Consumer::Overlap as usize] + consumer[Consumer::Backlog as usize];
        Times {
            at: consumer.iter().sum(),
            consumer,
            producer: self.producer.read(now),
            decode: self.decode.load(Ordering::Relaxed).min(busy),
        }
    }

    /// How much of the running wait passed after the timer was due.
    fn late(&self, now: Nanos) -> Nanos {
        if !self.consumer.is(Consumer::SourceWait as usize) {
            return 0;
        }
        let due = self.timer_due.load(Ordering::Relaxed).saturating_add(TIMER_GRACE);
        let since = self.consumer.since.load(Ordering::Relaxed);
        now.saturating_sub(due.max(since))
    }

    fn split_late_wait(&self, now: Nanos) {
        let late = self.late(now);
        if late > 0 {
            self.consumer.enter(Consumer::Scheduled as usize, now - late);
            self.consumer.enter(Consumer::SourceWait as usize, now);
        }
    }

    fn mark(&self, now: Nanos) {
        let marked = self.marked.load(Ordering::Relaxed);
        let last = self.marks[marked % MARKS].at.load(Ordering::Relaxed);
        if now.saturating_sub(last) < MARK_EVERY {
            return;
        }
        let mark = &self.marks[(marked + 1) % MARKS];
        mark.at.store(now, Ordering::Relaxed);
        for (slot, sum) in mark.sums.iter().zip(self.consumer.read(now)) {
            slot.store(sum, Ordering::Relaxed);
        }
        self.marked.store(marked + 1, Ordering::Relaxed);
    }

    /// The consumer's sums one window before `now`, between the two marks around that moment in proportion.
    fn window_start(&self, now: &Times) -> Times {
        let then = now.at.saturating_sub(WINDOW);
        let mut after = *now;
        let newest = self.marked.load(Ordering::Relaxed);
        let oldest = newest.saturating_sub(MARKS - 2);
        for index in (oldest..=newest).rev() {
            let mark = &self.marks[index % MARKS];
            let before = Times {
                at: mark.at.load(Ordering::Relaxed),
                consumer: std::array::from_fn(|i| mark.sums[i].load(Ordering::Relaxed)),
                ..Times::default()
            };
            if before.at <= then {
                return between(&before, &after, then);
            }
            after = before;
        }
        after
    }

    fn write(&self, change: impl FnOnce()) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Reads again while a writer was in between. A writer holds the version for some nanoseconds; one that
    /// was put to sleep there must not hold up the reader, who then takes what is there.
    fn consistent<T>(&self, read: impl Fn() -> T) -> T {
        for _ in 0..64 {
            let before = self.version.load(Ordering::Acquire);
            let value = read();
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return value;
            }
            std::hint::spin_loop();
        }
        read()
    }
}

fn between(before: &Times, after: &Times, then: Nanos) -> Times {
    let span = u128::from(after.at.saturating_sub(before.at).max(1));
    let part = u128::from(then.saturating_sub(before.at)).min(span);
    let consumer = std::array::from_fn(|i| {
        let grown = u128::from(after.consumer[i].saturating_sub(before.consumer[i]));
        before.consumer[i] + u64::try_from(grown * part / span).unwrap_or(u64::MAX)
    });
    Times { at: then, consumer, ..Times::default() }
}

#[cfg(test)]
pub(crate) fn manual() -> (Clock, Arc<AtomicU64>) {
    let hand = Arc::new(AtomicU64::new(0));
    (Clock::Manual(Arc::clone(&hand)), hand)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;
    const S: Nanos = 1_000_000_000;

    #[test]
    fn a_wait_that_is_still_going_on_is_counted() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        ledger.consumer(Consumer::SourceWait, 0);
        hand.store(3_600 * S, Ordering::Relaxed);
        assert_eq!(ledger.read().of(Consumer::SourceWait), 3_600 * S);
        assert_eq!(ledger.read().producer, [3_600 * S, 0]);
    }

    #[test]
    fn the_states_of_each_half_add_up_to_its_life() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        ledger.consumer(Consumer::SourceWait, 10 * MS);
        ledger.consumer(Consumer::Scheduled, 15 * MS);
        ledger.consumer(Consumer::Backlog, 16 * MS);
        ledger.producer(Producer::Room, 20 * MS);
        ledger.consumer(Consumer::Paused, 40 * MS);
        ledger.end_producer(50 * MS);
        hand.store(70 * MS, Ordering::Relaxed);
        let times = ledger.read();
        assert_eq!(times.consumer, [5 * MS, MS, 10 * MS, 24 * MS, 30 * MS]);
        assert_eq!(times.producer, [20 * MS, 30 * MS]);
        assert_eq!(times.at, 70 * MS);
        ledger.end_consumer(70 * MS);
        hand.store(90 * MS, Ordering::Relaxed);
        assert_eq!(ledger.read().at, 70 * MS, "an ended life stands still");
    }

    #[test]
    fn a_wait_that_outlives_its_timer_is_the_runtimes() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        ledger.consumer(Consumer::SourceWait, 0);
        ledger.expect_timer(MS);
        hand.store(25 * MS, Ordering::Relaxed);
        let running = ledger.read();
        assert_eq!(running.of(Consumer::SourceWait), 5 * MS);
        assert_eq!(running.of(Consumer::Scheduled), 20 * MS);
        ledger.consumer(Consumer::Overlap, 25 * MS);
        assert_eq!(ledger.read().consumer, running.consumer);
    }

    #[test]
    fn a_timer_that_comes_in_time_acquits_the_runtime() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        ledger.consumer(Consumer::SourceWait, 0);
        ledger.expect_timer(MS);
        hand.store(2 * MS, Ordering::Relaxed);
        ledger.expect_timer(62 * MS);
        hand.store(60 * MS, Ordering::Relaxed);
        assert_eq!(ledger.read().of(Consumer::Scheduled), 0);
        // The next one is 20 ms late.
        hand.store(86 * MS, Ordering::Relaxed);
        ledger.expect_timer(106 * MS);
        hand.store(100 * MS, Ordering::Relaxed);
        assert_eq!(ledger.read().of(Consumer::Scheduled), 20 * MS);
        ledger.consumer(Consumer::Overlap, 100 * MS);
        assert_eq!(ledger.read().consumer, [80 * MS, 20 * MS, 0, 0, 0]);
    }

    #[test]
    fn decoding_never_exceeds_the_time_in_which_rows_were_held() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        hand.store(MS, Ordering::Relaxed);
        ledger.decoded(5 * MS);
        assert_eq!(ledger.read().decode, MS);
    }

    #[test]
    fn the_window_forgets_what_is_older_than_ten_seconds() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        // A minute of waiting in steps, then half a minute of backlog.
        for second in 0..60 {
            ledger.consumer(Consumer::SourceWait, second * S);
        }
        for second in 60..90 {
            ledger.consumer(Consumer::Backlog, second * S);
        }
        hand.store(90 * S, Ordering::Relaxed);
        let (now, then) = (ledger.read(), ledger.read_window_start());
        assert_eq!(now.of(Consumer::Backlog) - then.of(Consumer::Backlog), 10 * S);
        assert_eq!(now.of(Consumer::SourceWait), then.of(Consumer::SourceWait));
    }

    #[test]
    fn the_window_moves_on_while_nothing_changes() {
        let (clock, hand) = manual();
        let ledger = Ledger::new(clock);
        ledger.consumer(Consumer::Backlog, 0);
        ledger.consumer(Consumer::SourceWait, 5 * S);
        hand.store(500 * S, Ordering::Relaxed);
        let (now, then) = (ledger.read(), ledger.read_window_start());
        assert_eq!(now.of(Consumer::SourceWait) - then.of(Consumer::SourceWait), 10 * S);
        assert_eq!(now.of(Consumer::Backlog), then.of(Consumer::Backlog));
    }
}
