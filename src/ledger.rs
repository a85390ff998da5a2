//! `Ledger`: where a stream's time goes, and whose time it is.
//!
//! On each half, every moment belongs to exactly one state. Entering a state leaves the previous one, so the sums
//! add up to the half's lifetime by construction. Readers count the current state up to the moment of reading.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::evidence::{AT_ONCE, Evidence, Whose};
use crate::partition::{OVER, Partition, Sums, Window, add};
use crate::time::{Clock, Nanos};
use crate::turns::CATCH_UP;
use crate::watchdog::Watchdog;

/// What the consumer's half does. In both `Overlap` and `Backlog` the user's code or the decoder holds rows; in
/// `Backlog`, more rows or the end wait in the channel meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Consumer {
    SourceWait = 0,
    Scheduled = 1,
    Overlap = 2,
    Backlog = 3,
    Paused = 4,
    /// Rows arrived while it waited, and it has not taken them yet. Has no sum of its own: the time is attributed to
    /// the runtime (`Scheduled`) and to the consumer (`Backlog`).
    Woken = 5,
}

/// What the producer's half does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Producer {
    Source = 0,
    Room = 1,
}

const STATES: usize = 5;

/// The time of one stream. The channel's lock admits one writer at a time; readers take no lock and detect by the
/// version whether what they read is consistent.
///
/// While the consumer's own task keeps the only thread, nobody can read rows for it, and the channel looks empty.
/// If rows arrive at once after it yields the thread, they had been there: that time was backlog.
#[derive(Debug)]
pub(crate) struct Ledger {
    clock: Clock,
    evidence: Evidence,
    version: AtomicU64,
    consumer: Partition<STATES>,
    producer: Partition<2>,
    /// When rows were last taken.
    taken: AtomicU64,
    /// Time in `Overlap` that is backlog if rows arrive soon after `suspect_until`.
    suspect: AtomicU64,
    suspect_until: AtomicU64,
    decode: AtomicU64,
    window: Window<STATES>,
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
    pub(crate) fn new(clock: Clock, watchdog: Arc<Watchdog>) -> Self {
        Self {
            evidence: Evidence::new(&clock, watchdog),
            clock,
            version: AtomicU64::new(0),
            // Until the first poll nobody waits for rows: the caller is busy elsewhere.
            consumer: Partition::new(Consumer::Overlap as usize),
            producer: Partition::new(Producer::Source as usize),
            taken: AtomicU64::new(0),
            suspect: AtomicU64::new(0),
            suspect_until: AtomicU64::new(0),
            decode: AtomicU64::new(0),
            window: Window::new(),
        }
    }

    pub(crate) fn now(&self) -> Nanos {
        self.clock.now()
    }

    pub(crate) fn watchdog(&self) -> &Watchdog {
        self.evidence.watchdog()
    }

    /// The consumer found nothing in a poll that began at `polled`. Call under the channel's lock.
    pub(crate) fn wait(&self, polled: Nanos) {
        if self.consumer_is(Consumer::SourceWait) {
            return self.wait_on();
        }
        self.write(|| {
            let is_overlap = self.consumer_is(Consumer::Overlap);
            let kept = if is_overlap { self.evidence.kept_thread(self.consumer.since(), polled) } else { 0 };
            self.suspect.store(kept, Ordering::Relaxed);
            self.suspect_until.store(polled, Ordering::Relaxed);
            self.enter(Consumer::SourceWait as usize, polled, self.running(polled));
        });
        self.evidence.note_pace(polled.saturating_sub(self.taken.load(Ordering::Relaxed)), polled);
        self.evidence.wait_begins(polled);
    }

    /// A further poll in the same wait found nothing.
    fn wait_on(&self) {
        let now = self.now();
        if self.evidence.is_wanted(now) {
            let whose = self.evidence.of_wait_up_to_poll(self.consumer.since(), now);
            self.write(|| self.end_wait(Consumer::SourceWait, &whose, now));
            self.evidence.wait_begins(now);
        }
    }

    /// Attributes the current wait and enters `state`.
    fn end_wait(&self, state: Consumer, whose: &Whose, now: Nanos) {
        let since = self.consumer.since();
        let parts = self.parts_of_wait(*whose, now);
        let own = parts[Consumer::Overlap as usize];
        if own > 0 {
            add(&self.suspect, own);
            let until = if state == Consumer::SourceWait { now } else { since + own };
            self.suspect_until.store(until, Ordering::Relaxed);
        }
        if self.evidence.asked_in_wait() {
            self.evidence.weigh(whose);
        }
        self.enter(state as usize, now, parts);
    }

    /// Rows, or the end, arrived in the channel. Call under the channel's lock, before the consumer is woken.
    pub(crate) fn rows_came(&self) {
        if self.consumer_is(Consumer::SourceWait) {
            let now = self.now();
            let whose = self.evidence.of_wait(self.consumer.since(), now);
            self.write(|| {
                self.end_wait(Consumer::Woken, &whose, now);
                self.settle_suspect(now);
            });
            self.evidence.rows_came(now);
        } else if self.consumer_is(Consumer::Overlap) {
            self.consumer(Consumer::Backlog, self.now());
        }
    }

    fn settle_suspect(&self, now: Nanos) {
        let suspect = self.suspect.load(Ordering::Relaxed);
        let is_soon = now.saturating_sub(self.suspect_until.load(Ordering::Relaxed)) <= CATCH_UP;
        if suspect > 0 && is_soon {
            self.consumer.shift(Consumer::Overlap as usize, Consumer::Backlog as usize, suspect);
        }
        self.suspect.store(0, Ordering::Relaxed);
    }

    /// The consumer yields although it could continue. Call under the channel's lock.
    pub(crate) fn yield_thread(&self, is_empty: bool) {
        self.consumer(if is_empty { Consumer::SourceWait } else { Consumer::Woken }, self.now());
        self.evidence.forget();
    }

    /// The producer is about to be woken by the consumer. Call under the channel's lock.
    pub(crate) fn wake_producer(&self, now: Nanos) {
        self.evidence.wake_producer(now);
    }

    /// The producer runs. Call under the channel's lock.
    pub(crate) fn producer_runs(&self) {
        if !self.evidence.producer_is_woken() {
            return;
        }
        let now = self.now();
        let is_waiting = self.consumer_is(Consumer::SourceWait) || self.consumer_is(Consumer::Overlap);
        self.write(|| {
            if is_waiting && self.evidence.kept_producer(self.consumer.since(), now) > 0 {
                self.enter(self.consumer.state(), now, self.running(now));
            }
            self.evidence.producer_runs();
        });
    }

    /// The consumer has taken a chunk and enters `state`; returns whether it had let the chunk wait after it was
    /// woken. Call under the channel's lock.
    pub(crate) fn take(&self, state: Consumer, now: Nanos) -> bool {
        let mut delay = 0;
        if self.consumer_is(Consumer::Woken) {
            let since = self.consumer.since();
            delay = now.saturating_sub(since);
            self.evidence.weigh(&self.evidence.of_delay(since, now));
        }
        if !self.consumer_is(state) {
            self.consumer(state, now);
        }
        self.taken.store(now, Ordering::Relaxed);
        self.evidence.rows_taken(delay, now);
        delay > AT_ONCE
    }

    /// The consumer's half enters `state`. Call under the channel's lock.
    pub(crate) fn consumer(&self, state: Consumer, now: Nanos) {
        self.write(|| self.enter(state as usize, now, self.running(now)));
    }

    /// The producer's half enters `state`. Call under the channel's lock.
    pub(crate) fn producer(&self, state: Producer, now: Nanos) {
        self.write(|| self.producer.enter(state as usize, now, self.producer.running(now)));
    }

    /// The consumer's half is over. Call under the channel's lock.
    pub(crate) fn end_consumer(&self) {
        self.write(|| {
            let now = self.end_of_life();
            self.enter(OVER, now, self.running(now));
        });
    }

    /// The producer's half is over. Call under the channel's lock.
    pub(crate) fn end_producer(&self) {
        self.write(|| {
            let now = self.end_of_life();
            self.producer.enter(OVER, now, self.producer.running(now));
        });
    }

    /// The time, from when on readers have to read again: none has seen more of the life than there is.
    fn end_of_life(&self) -> Nanos {
        fence(Ordering::SeqCst);
        self.now()
    }

    pub(crate) fn consumer_is(&self, state: Consumer) -> bool {
        self.consumer.is(state as usize)
    }

    /// Whether the consumer's half is over.
    pub(crate) fn is_ended(&self) -> bool {
        self.consumer.is(OVER)
    }

    pub(crate) fn producer_is(&self, state: Producer) -> bool {
        self.producer.is(state as usize)
    }

    fn enter(&self, state: usize, now: Nanos, parts: [Nanos; STATES]) {
        self.consumer.enter(state, now, parts);
        self.window.mark(&self.consumer, now);
    }

    /// How the time in the consumer's current state is attributed up to `now`.
    fn running(&self, now: Nanos) -> [Nanos; STATES] {
        let since = self.consumer.since();
        let life = now.saturating_sub(since);
        if self.consumer_is(Consumer::SourceWait) {
            return self.parts_of_wait(self.evidence.of_wait(since, now), now);
        }
        if self.consumer_is(Consumer::Overlap) {
            let kept = self.evidence.kept_producer(since, now).min(life);
            return [0, 0, life - kept, kept, 0];
        }
        if self.consumer_is(Consumer::Woken) {
            if life <= AT_ONCE {
                // A consumer that takes rows at once has waited for them until then.
                return [life, 0, 0, 0, 0];
            }
            let others = self.evidence.resolve(self.evidence.of_delay(since, now)).others.min(life);
            return [0, others, 0, life - others, 0];
        }
        self.consumer.running(now)
    }

    /// What of it a reader can be given. Whose a delay is shows after `AT_ONCE`: until then nobody's, so that nothing
    /// has to be taken back.
    fn running_so_far(&self, now: Nanos) -> [Nanos; STATES] {
        let is_open =
            self.consumer_is(Consumer::Woken) && now.saturating_sub(self.consumer.since()) <= AT_ONCE;
        if is_open { [0; STATES] } else { self.running(now) }
    }

    fn parts_of_wait(&self, whose: Whose, now: Nanos) -> [Nanos; STATES] {
        let since = self.consumer.since();
        let life = now.saturating_sub(since);
        let Whose { own, others, .. } = self.evidence.resolve(whose);
        let left = life.saturating_sub(own + others);
        let kept = self.evidence.kept_producer(since + own, now).min(left);
        [left - kept, others, own, kept, 0]
    }

    /// Counts `spent` as decoding, which is part of the time in which the consumer holds rows.
    pub(crate) fn decoded(&self, spent: Nanos) {
        add(&self.decode, spent);
    }

    /// The time spent decoding, which is cheaper to read than all sums.
    pub(crate) fn read_decode(&self) -> Nanos {
        self.decode.load(Ordering::Relaxed)
    }

    /// The sums up to now, current states included.
    pub(crate) fn read(&self) -> Times {
        self.consistent(|| self.read_at(self.now()))
    }

    /// The sums without a delay of which it is not known yet whose it is, so that nothing has to be taken back.
    pub(crate) fn read_settled(&self) -> Times {
        self.consistent(|| {
            let now = self.now();
            self.times(self.running_so_far(now), now)
        })
    }

    /// The consumer's sums at the beginning of the sliding window.
    pub(crate) fn read_window_start(&self) -> [Nanos; STATES] {
        self.consistent(|| {
            let now = self.read_at(self.now());
            self.window.start(Sums { at: now.at, sums: now.consumer }).sums
        })
    }

    fn read_at(&self, now: Nanos) -> Times {
        self.times(self.running(now), now)
    }

    fn times(&self, running: [Nanos; STATES], now: Nanos) -> Times {
        let consumer = self.consumer.read(running);
        let busy = consumer[Consumer::Overlap as usize] + consumer[Consumer::Backlog as usize];
        Times {
            at: consumer.iter().sum(),
            consumer,
            producer: self.producer.read(self.producer.running(now)),
            decode: self.decode.load(Ordering::Relaxed).min(busy),
        }
    }

    fn write(&self, change: impl FnOnce()) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Reads again if a writer interfered. A writer is done within nanoseconds; if the operating system suspended it
    /// in between, the reader yields, but does not wait for it: it returns what it last read.
    fn consistent<T>(&self, read: impl Fn() -> T) -> T {
        for _ in 0..64 {
            let before = self.version.load(Ordering::Acquire);
            let value = read();
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return value;
            }
            std::thread::yield_now();
        }
        read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::manual;

    const MS: Nanos = 1_000_000;
    const S: Nanos = 1_000_000_000;

    /// A ledger whose clock and watchdog the test moves.
    struct Test {
        ledger: Ledger,
        hand: Arc<AtomicU64>,
        before: [AtomicU64; STATES],
    }

    impl Test {
        fn new() -> Self {
            let (clock, hand) = manual();
            let watchdog = Arc::new(Watchdog::new(clock.clone(), true));
            watchdog.stream_begins();
            let ledger = Ledger::new(clock, watchdog);
            ledger.evidence.give_no_benefit_of_the_doubt(true);
            Self { ledger, hand, before: Default::default() }
        }

        fn at(&self, now: Nanos) {
            self.hand.store(now, Ordering::Relaxed);
        }

        fn turn(&self) {
            // A turn never runs in the moment in which it is asked for.
            self.hand.fetch_add(1, Ordering::Relaxed);
            self.ledger.watchdog().turn_now();
        }

        /// The times in milliseconds.
        fn read(&self) -> [Nanos; STATES] {
            self.ledger.read().consumer.map(|time| (time + MS / 2) / MS)
        }

        /// Makes the runtime late several times up to 100 ms.
        fn suspect(&self) {
            for ms in [0, 40, 70, 100] {
                self.at(ms * MS);
                self.turn();
            }
            assert!(self.ledger.watchdog().is_alert(100 * MS));
            self.ledger.wait(100 * MS);
            self.ledger.rows_came();
            self.ledger.take(Consumer::Overlap, 100 * MS);
            self.turn();
            self.before.iter().zip(self.read()).for_each(|(slot, sum)| slot.store(sum, Ordering::Relaxed));
        }

        fn since_suspect(&self) -> [Nanos; STATES] {
            let now = self.read();
            std::array::from_fn(|i| now[i] - self.before[i].load(Ordering::Relaxed))
        }
    }

    fn ledger() -> (Ledger, Arc<AtomicU64>) {
        let (clock, hand) = manual();
        let watchdog = Arc::new(Watchdog::new(clock.clone(), true));
        (Ledger::new(clock, watchdog), hand)
    }

    #[test]
    fn the_first_doubts_are_not_held_against_the_consumer() {
        let test = Test::new();
        test.ledger.evidence.give_no_benefit_of_the_doubt(false);
        for turn in 0..4 {
            let start = turn * 50 * MS;
            test.at(start);
            test.turn();
            test.ledger.wait(start);
            // It looks as if the task that polls had the thread all the time.
            test.at(start + 40 * MS);
            test.ledger.wait(start);
            test.turn();
            test.ledger.rows_came();
            test.ledger.take(Consumer::Overlap, start + 40 * MS);
        }
        let [_, scheduled, _, backlog, _] = test.read();
        assert!(scheduled >= 60 && backlog >= 30, "{scheduled}, {backlog}");
    }

    #[test]
    fn a_wait_is_counted_before_it_ends() {
        let (ledger, hand) = ledger();
        ledger.consumer(Consumer::SourceWait, 0);
        hand.store(3_600 * S, Ordering::Relaxed);
        assert_eq!(ledger.read().of(Consumer::SourceWait), 3_600 * S);
        assert_eq!(ledger.read().producer, [3_600 * S, 0]);
    }

    #[test]
    fn the_states_of_each_half_add_up_to_its_lifetime() {
        let (ledger, hand) = ledger();
        ledger.consumer(Consumer::SourceWait, 10 * MS);
        ledger.consumer(Consumer::Scheduled, 15 * MS);
        ledger.consumer(Consumer::Backlog, 16 * MS);
        ledger.producer(Producer::Room, 20 * MS);
        ledger.consumer(Consumer::Paused, 40 * MS);
        hand.store(50 * MS, Ordering::Relaxed);
        ledger.end_producer();
        hand.store(70 * MS, Ordering::Relaxed);
        let times = ledger.read();
        assert_eq!(times.consumer, [5 * MS, MS, 10 * MS, 24 * MS, 30 * MS]);
        assert_eq!(times.producer, [20 * MS, 30 * MS]);
        assert_eq!(times.at, 70 * MS);
        ledger.end_consumer();
        hand.store(90 * MS, Ordering::Relaxed);
        assert_eq!(ledger.read().at, 70 * MS, "the sums stand still after the end");
    }

    fn until(holds: impl Fn() -> bool) {
        while !holds() {
            std::thread::yield_now();
        }
    }

    /// Reads a ledger until it has ended; the longest life seen before.
    fn longest_life(ledger: &Ledger, reads: &AtomicU64) -> Nanos {
        let mut longest = 0;
        while !ledger.is_ended() {
            longest = ledger.read().at.max(longest);
            add(reads, 1);
        }
        longest
    }

    #[test]
    fn no_reader_sees_a_life_longer_than_it_is_at_its_end() {
        let clock = Clock::start();
        let watchdog = Arc::new(Watchdog::new(clock.clone(), false));
        for _ in 0..500 {
            let ledger = Ledger::new(clock.clone(), Arc::clone(&watchdog));
            let reads = AtomicU64::new(0);
            let longest = std::thread::scope(|scope| {
                let reader = scope.spawn(|| longest_life(&ledger, &reads));
                until(|| reads.load(Ordering::Relaxed) >= 3);
                ledger.end_consumer();
                reader.join().unwrap_or(Nanos::MAX)
            });
            assert!(ledger.read().at >= longest, "{} after {longest}", ledger.read().at);
        }
    }

    #[test]
    fn a_wait_with_a_late_turn_belongs_to_the_runtime_from_2_ms_before_the_turn_was_due() {
        let test = Test::new();
        test.turn(); // the next is due at 10 ms
        test.ledger.wait(0);
        test.at(30 * MS);
        let running = test.read();
        assert_eq!(running, [8, 22, 0, 0, 0], "late from 2 ms before the turn was due");
        test.turn();
        test.ledger.rows_came();
        assert_eq!(test.read(), running);
    }

    #[test]
    fn a_turn_that_runs_in_time_proves_that_the_runtime_is_not_late() {
        let test = Test::new();
        test.turn();
        test.ledger.wait(0);
        for ms in [11, 22, 33] {
            test.at(ms * MS);
            test.turn();
        }
        assert_eq!(test.read(), [33, 0, 0, 0, 0]);
    }

    #[test]
    fn a_woken_consumer_that_lets_rows_wait_is_busy_unless_the_runtime_was_late() {
        let test = Test::new();
        test.turn();
        test.ledger.wait(0);
        test.at(MS);
        test.ledger.rows_came();
        test.at(9 * MS);
        assert!(test.ledger.take(Consumer::Overlap, 9 * MS), "it let rows wait");
        assert_eq!(test.read(), [1, 0, 0, 8, 0]);

        test.ledger.wait(9 * MS);
        test.turn();
        test.ledger.rows_came();
        test.at(39 * MS);
        test.turn();
        test.ledger.take(Consumer::Overlap, 39 * MS);
        assert_eq!(test.read(), [1, 30, 0, 8, 0], "the turn ran only then");
    }

    #[test]
    fn a_consumer_that_takes_rows_within_half_a_millisecond_takes_them_at_once() {
        let test = Test::new();
        test.ledger.wait(0);
        test.ledger.rows_came();
        test.at(AT_ONCE);
        assert!(!test.ledger.take(Consumer::Overlap, AT_ONCE));
        assert_eq!(test.read(), [1, 0, 0, 0, 0]);
    }

    #[test]
    fn a_poll_while_a_turn_is_overdue_was_late_itself() {
        let test = Test::new();
        test.turn();
        test.ledger.wait(0);
        test.at(40 * MS);
        // The task that polls had the thread all the time.
        test.ledger.wait(0);
        test.turn();
        test.at(41 * MS);
        test.ledger.rows_came();
        assert_eq!(test.read(), [9, 0, 0, 32, 0], "rows arrived at once, so they had been there");
    }

    #[test]
    fn rows_that_do_not_arrive_at_once_had_not_been_there() {
        let test = Test::new();
        test.turn();
        test.ledger.wait(0);
        test.at(40 * MS);
        test.ledger.wait(0);
        test.turn();
        for ms in [42, 44, 46] {
            test.at(ms * MS);
            test.turn();
        }
        test.ledger.rows_came();
        assert_eq!(test.read(), [14, 0, 32, 0, 0]);
    }

    #[test]
    fn while_the_runtime_is_suspect_a_waiting_consumer_is_busy_until_it_yields_the_thread() {
        let test = Test::new();
        test.suspect();
        // Its task runs for another 20 ms after the poll; then the turn runs that it asked for.
        test.ledger.wait(100 * MS + 2);
        test.at(120 * MS);
        test.turn();
        test.ledger.rows_came();
        assert_eq!(test.since_suspect(), [0, 0, 0, 20, 0]);
        test.ledger.take(Consumer::Overlap, 120 * MS);

        // It yields at once, and then others have the thread.
        test.ledger.wait(120 * MS);
        test.turn();
        test.at(140 * MS);
        test.ledger.rows_came();
        test.ledger.take(Consumer::Overlap, 140 * MS);
        assert_eq!(test.since_suspect(), [0, 20, 0, 20, 0]);
    }

    #[test]
    fn while_the_runtime_is_suspect_rows_ask_for_a_turn_just_before_the_consumers() {
        let test = Test::new();
        test.suspect();
        test.ledger.wait(100 * MS);
        test.turn();
        test.at(100 * MS + 2);
        test.ledger.rows_came();
        test.at(105 * MS);
        test.turn();
        test.at(120 * MS);
        // The 5 ms until the turn are the runtime's, the rest is its own task's.
        test.ledger.take(Consumer::Overlap, 120 * MS);
        assert_eq!(test.since_suspect(), [0, 5, 0, 15, 0]);
    }

    #[test]
    fn decoding_never_exceeds_the_time_in_which_rows_were_held() {
        let (ledger, hand) = ledger();
        hand.store(MS, Ordering::Relaxed);
        ledger.decoded(5 * MS);
        assert_eq!(ledger.read().decode, MS);
    }

    #[test]
    fn the_window_covers_the_last_ten_seconds_only() {
        let (ledger, hand) = ledger();
        // A minute of waiting, then half a minute of backlog, in steps of a second.
        for second in 0..60 {
            ledger.consumer(Consumer::SourceWait, second * S);
        }
        for second in 60..90 {
            ledger.consumer(Consumer::Backlog, second * S);
        }
        hand.store(90 * S, Ordering::Relaxed);
        let (now, then) = (ledger.read(), ledger.read_window_start());
        assert_eq!(now.of(Consumer::Backlog) - then[Consumer::Backlog as usize], 10 * S);
        assert_eq!(now.of(Consumer::SourceWait), then[Consumer::SourceWait as usize]);
    }

    #[test]
    fn the_window_moves_on_while_nothing_changes() {
        let (ledger, hand) = ledger();
        ledger.consumer(Consumer::Backlog, 0);
        ledger.consumer(Consumer::SourceWait, 5 * S);
        hand.store(500 * S, Ordering::Relaxed);
        let (now, then) = (ledger.read(), ledger.read_window_start());
        assert_eq!(now.of(Consumer::SourceWait) - then[Consumer::SourceWait as usize], 10 * S);
        assert_eq!(now.of(Consumer::Backlog), then[Consumer::Backlog as usize]);
    }
}
