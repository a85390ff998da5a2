//! `Ledger`: where a stream's time goes, and whose time it is.
//!
//! On each half, every moment belongs to exactly one state. Entering a state leaves the previous one, so the sums
//! add up to the half's lifetime by construction. Readers count the current state up to the moment of reading.

mod evidence;
mod partition;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use self::evidence::{AT_ONCE, Evidence, Whose};
use self::partition::{OVER, Partition, Sums, Window, add};
use super::clock::{Clock, Nanos};
use super::watchdog::{CATCH_UP, Watchdog};

/// What the consumer's half does. In both `Overlap` and `Backlog` the user's code or the decoder holds rows; in
/// `Backlog`, more rows or the end wait in the channel meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConsumerState {
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
pub(crate) enum ProducerState {
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
    pub(crate) fn of(&self, state: ConsumerState) -> Nanos {
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
            consumer: Partition::new(ConsumerState::Overlap as usize),
            producer: Partition::new(ProducerState::Source as usize),
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
        if self.consumer_is(ConsumerState::SourceWait) {
            return self.wait_on();
        }
        self.write(|| {
            let is_overlap = self.consumer_is(ConsumerState::Overlap);
            let kept = if is_overlap { self.evidence.kept_thread(self.consumer.since(), polled) } else { 0 };
            self.suspect.store(kept, Ordering::Relaxed);
            self.suspect_until.store(polled, Ordering::Relaxed);
            self.enter(ConsumerState::SourceWait as usize, polled, self.running(polled));
        });
        self.evidence.note_pace(polled.saturating_sub(self.taken.load(Ordering::Relaxed)), polled);
        self.evidence.wait_begins(polled);
    }

    /// A further poll in the same wait found nothing.
    fn wait_on(&self) {
        let now = self.now();
        if self.evidence.is_wanted(now) {
            let whose = self.evidence.of_wait_up_to_poll(self.consumer.since(), now);
            self.write(|| self.end_wait(ConsumerState::SourceWait, &whose, now));
            self.evidence.wait_begins(now);
        }
    }

    /// Attributes the current wait and enters `state`.
    fn end_wait(&self, state: ConsumerState, whose: &Whose, now: Nanos) {
        let since = self.consumer.since();
        let parts = self.parts_of_wait(*whose, now);
        let own = parts[ConsumerState::Overlap as usize];
        if own > 0 {
            add(&self.suspect, own);
            let until = if state == ConsumerState::SourceWait { now } else { since + own };
            self.suspect_until.store(until, Ordering::Relaxed);
        }
        if self.evidence.asked_in_wait() {
            self.evidence.weigh(whose);
        }
        self.enter(state as usize, now, parts);
    }

    /// Rows, or the end, arrived in the channel. Call under the channel's lock, before the consumer is woken.
    pub(crate) fn rows_arrived(&self) {
        if self.consumer_is(ConsumerState::SourceWait) {
            let now = self.now();
            let whose = self.evidence.of_wait(self.consumer.since(), now);
            self.write(|| {
                self.end_wait(ConsumerState::Woken, &whose, now);
                self.settle_suspect(now);
            });
            self.evidence.rows_arrived(now);
        } else if self.consumer_is(ConsumerState::Overlap) {
            self.enter_consumer(ConsumerState::Backlog, self.now());
        }
    }

    fn settle_suspect(&self, now: Nanos) {
        let suspect = self.suspect.load(Ordering::Relaxed);
        let is_soon = now.saturating_sub(self.suspect_until.load(Ordering::Relaxed)) <= CATCH_UP;
        if suspect > 0 && is_soon {
            self.consumer.shift(ConsumerState::Overlap as usize, ConsumerState::Backlog as usize, suspect);
        }
        self.suspect.store(0, Ordering::Relaxed);
    }

    /// The consumer yields although it could continue. Call under the channel's lock.
    pub(crate) fn yield_thread(&self, is_empty: bool) {
        self.enter_consumer(
            if is_empty { ConsumerState::SourceWait } else { ConsumerState::Woken },
            self.now(),
        );
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
        let is_waiting =
            self.consumer_is(ConsumerState::SourceWait) || self.consumer_is(ConsumerState::Overlap);
        self.write(|| {
            if is_waiting && self.evidence.kept_producer(self.consumer.since(), now) > 0 {
                self.enter(self.consumer.state(), now, self.running(now));
            }
            self.evidence.producer_runs();
        });
    }

    /// The consumer has taken a chunk and enters `state`; returns whether it had let the chunk wait after it was
    /// woken. Call under the channel's lock.
    pub(crate) fn take(&self, state: ConsumerState, now: Nanos) -> bool {
        let mut delay = 0;
        if self.consumer_is(ConsumerState::Woken) {
            let since = self.consumer.since();
            delay = now.saturating_sub(since);
            self.evidence.weigh(&self.evidence.of_delay(since, now));
        }
        if !self.consumer_is(state) {
            self.enter_consumer(state, now);
        }
        self.taken.store(now, Ordering::Relaxed);
        self.evidence.rows_taken(delay, now);
        delay > AT_ONCE
    }

    /// The consumer's half enters `state`. Call under the channel's lock.
    pub(crate) fn enter_consumer(&self, state: ConsumerState, now: Nanos) {
        self.write(|| self.enter(state as usize, now, self.running(now)));
    }

    /// The producer's half enters `state`. Call under the channel's lock.
    pub(crate) fn enter_producer(&self, state: ProducerState, now: Nanos) {
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

    pub(crate) fn consumer_is(&self, state: ConsumerState) -> bool {
        self.consumer.is(state as usize)
    }

    /// Whether the consumer's half is over.
    pub(crate) fn is_ended(&self) -> bool {
        self.consumer.is(OVER)
    }

    pub(crate) fn producer_is(&self, state: ProducerState) -> bool {
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
        if self.consumer_is(ConsumerState::SourceWait) {
            return self.parts_of_wait(self.evidence.of_wait(since, now), now);
        }
        if self.consumer_is(ConsumerState::Overlap) {
            let kept = self.evidence.kept_producer(since, now).min(life);
            return [0, 0, life - kept, kept, 0];
        }
        if self.consumer_is(ConsumerState::Woken) {
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
            self.consumer_is(ConsumerState::Woken) && now.saturating_sub(self.consumer.since()) <= AT_ONCE;
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
        let busy = consumer[ConsumerState::Overlap as usize] + consumer[ConsumerState::Backlog as usize];
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
mod tests;
