//! `Ledger`: where the time of a stream goes, and to which side it is attributed.
//!
//! In each half of the channel, every moment belongs to exactly one state. Entering a state leaves the previous one, so
//! the sums always add up to the half's lifetime. Readers count the current state up to the moment of reading.

mod evidence;
mod partition;
mod states;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use self::evidence::{AT_ONCE, Attribution, Evidence};
use self::partition::{ENDED, Partition, Sums, Window, add};
use self::states::{CONSUMER_STATES, PRODUCER_STATES};
pub(crate) use self::states::{ConsumerState, ProducerState, Times};
use super::clock::{Clock, Nanos};
use super::watchdog::{CATCH_UP, Watchdog};

/// The times of one stream. Methods that change them must be called under the channel's lock, so there is one writer at
/// a time. Readers take no lock. They detect by the version whether what they read is consistent.
///
/// While the consumer's own task blocks the only thread, the producer cannot read rows, and the channel looks empty. If
/// rows arrive at once after the task yields the thread, they were ready before, and that time was backlog.
#[derive(Debug)]
pub(crate) struct Ledger {
    clock: Clock,
    evidence: Evidence,
    /// Odd while a writer is at work.
    version: AtomicU64,
    consumer: Partition<CONSUMER_STATES>,
    producer: Partition<PRODUCER_STATES>,
    /// When the consumer last took a chunk.
    last_take: AtomicU64,
    /// Time in `Overlap` that becomes backlog if rows arrive soon after `unproven_until`.
    unproven_backlog: AtomicU64,
    unproven_until: AtomicU64,
    decode: AtomicU64,
    window: Window<CONSUMER_STATES>,
}

impl Ledger {
    pub(crate) fn new(clock: Clock, watchdog: Arc<Watchdog>) -> Self {
        Self {
            evidence: Evidence::new(&clock, watchdog),
            clock,
            version: AtomicU64::new(0),
            // Before the first poll the caller is busy elsewhere and does not wait for rows.
            consumer: Partition::new(ConsumerState::Overlap as usize),
            producer: Partition::new(ProducerState::Source as usize),
            last_take: AtomicU64::new(0),
            unproven_backlog: AtomicU64::new(0),
            unproven_until: AtomicU64::new(0),
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

    /// Records that a poll of the consumer that began at `polled` found the channel empty.
    pub(crate) fn record_empty_poll(&self, polled: Nanos) {
        if self.consumer_is(ConsumerState::SourceWait) {
            return self.continue_wait();
        }
        self.write(|| {
            let is_overlap = self.consumer_is(ConsumerState::Overlap);
            let blocked =
                if is_overlap { self.evidence.blocked_thread(self.consumer.since(), polled) } else { 0 };
            self.unproven_backlog.store(blocked, Ordering::Relaxed);
            self.unproven_until.store(polled, Ordering::Relaxed);
            self.enter(ConsumerState::SourceWait as usize, polled, self.current_parts(polled));
        });
        self.evidence.record_pace(polled.saturating_sub(self.last_take.load(Ordering::Relaxed)), polled);
        self.evidence.record_wait_start(polled);
    }

    /// Records a further empty poll in the same wait.
    fn continue_wait(&self) {
        let now = self.now();
        if self.evidence.learns_from_poll(now) {
            let attribution = self.evidence.attribute_wait_at_poll(self.consumer.since(), now);
            self.write(|| self.leave_wait(ConsumerState::SourceWait, &attribution, now));
            self.evidence.record_wait_start(now);
        }
    }

    /// Attributes the current wait and enters `state`.
    fn leave_wait(&self, state: ConsumerState, attribution: &Attribution, now: Nanos) {
        let since = self.consumer.since();
        let parts = self.wait_parts(*attribution, now);
        let own = parts[ConsumerState::Overlap as usize];
        if own > 0 {
            add(&self.unproven_backlog, own);
            let until = if state == ConsumerState::SourceWait { now } else { since + own };
            self.unproven_until.store(until, Ordering::Relaxed);
        }
        if self.evidence.has_turn_for_wait() {
            self.evidence.remember(attribution);
        }
        self.enter(state as usize, now, parts);
    }

    /// Records that rows or the end arrived in the channel. Call before the consumer is woken.
    pub(crate) fn record_arrival(&self) {
        if self.consumer_is(ConsumerState::SourceWait) {
            let now = self.now();
            let attribution = self.evidence.attribute_wait(self.consumer.since(), now);
            self.write(|| {
                self.leave_wait(ConsumerState::Woken, &attribution, now);
                self.settle_unproven_backlog(now);
            });
            self.evidence.record_arrival(now);
        } else if self.consumer_is(ConsumerState::Overlap) {
            self.enter_consumer(ConsumerState::Backlog, self.now());
        }
    }

    fn settle_unproven_backlog(&self, now: Nanos) {
        let unproven = self.unproven_backlog.load(Ordering::Relaxed);
        let is_soon = now.saturating_sub(self.unproven_until.load(Ordering::Relaxed)) <= CATCH_UP;
        if unproven > 0 && is_soon {
            self.consumer.shift(ConsumerState::Overlap as usize, ConsumerState::Backlog as usize, unproven);
        }
        self.unproven_backlog.store(0, Ordering::Relaxed);
    }

    /// Records that the consumer yields the thread although it could continue.
    pub(crate) fn record_yield(&self, is_empty: bool) {
        self.enter_consumer(
            if is_empty { ConsumerState::SourceWait } else { ConsumerState::Woken },
            self.now(),
        );
        self.evidence.forget_requests();
    }

    /// Records that the consumer is about to wake the producer.
    pub(crate) fn record_producer_wake(&self, now: Nanos) {
        self.evidence.record_producer_wake(now);
    }

    /// Records that the producer runs.
    pub(crate) fn record_producer_run(&self) {
        if !self.evidence.is_producer_woken() {
            return;
        }
        let now = self.now();
        let is_channel_empty =
            self.consumer_is(ConsumerState::SourceWait) || self.consumer_is(ConsumerState::Overlap);
        self.write(|| {
            if is_channel_empty && self.evidence.blocked_producer(self.consumer.since(), now) > 0 {
                self.enter(self.consumer.state(), now, self.current_parts(now));
            }
            self.evidence.record_producer_run();
        });
    }

    /// Records that the consumer has taken a chunk and enters `state`. Returns whether it was woken for the chunk and
    /// did not take it at once.
    pub(crate) fn record_take(&self, state: ConsumerState, now: Nanos) -> bool {
        let mut delay = 0;
        if self.consumer_is(ConsumerState::Woken) {
            let since = self.consumer.since();
            delay = now.saturating_sub(since);
            self.evidence.remember(&self.evidence.attribute_delay(since, now));
        }
        if !self.consumer_is(state) {
            self.enter_consumer(state, now);
        }
        self.last_take.store(now, Ordering::Relaxed);
        self.evidence.record_take(delay, now);
        delay > AT_ONCE
    }

    /// Records that the consumer enters `state`.
    pub(crate) fn enter_consumer(&self, state: ConsumerState, now: Nanos) {
        self.write(|| self.enter(state as usize, now, self.current_parts(now)));
    }

    /// Records that the producer enters `state`.
    pub(crate) fn enter_producer(&self, state: ProducerState, now: Nanos) {
        self.write(|| self.producer.enter(state as usize, now, self.producer.current_parts(now)));
    }

    /// Ends the lifetime of the consumer's half. Does nothing if it has ended.
    pub(crate) fn end_consumer(&self) {
        self.write(|| {
            let now = self.end_time();
            self.enter(ENDED, now, self.current_parts(now));
        });
    }

    /// Ends the lifetime of the producer's half. Does nothing if it has ended.
    pub(crate) fn end_producer(&self) {
        self.write(|| {
            let now = self.end_time();
            self.producer.enter(ENDED, now, self.producer.current_parts(now));
        });
    }

    /// Returns the time at which a lifetime ends. The fence makes readers that look later read again, so that no reader
    /// returns a lifetime longer than the final one.
    fn end_time(&self) -> Nanos {
        fence(Ordering::SeqCst);
        self.now()
    }

    pub(crate) fn consumer_is(&self, state: ConsumerState) -> bool {
        self.consumer.is(state as usize)
    }

    /// Returns whether the lifetime of the consumer's half has ended.
    pub(crate) fn is_ended(&self) -> bool {
        self.consumer.is(ENDED)
    }

    pub(crate) fn producer_is(&self, state: ProducerState) -> bool {
        self.producer.is(state as usize)
    }

    fn enter(&self, state: usize, now: Nanos, parts: [Nanos; CONSUMER_STATES]) {
        self.consumer.enter(state, now, parts);
        self.window.mark(&self.consumer, now);
    }

    /// Returns how the time in the consumer's current state is attributed, up to `now`.
    fn current_parts(&self, now: Nanos) -> [Nanos; CONSUMER_STATES] {
        let since = self.consumer.since();
        let elapsed = now.saturating_sub(since);
        if self.consumer_is(ConsumerState::SourceWait) {
            return self.wait_parts(self.evidence.attribute_wait(since, now), now);
        }
        if self.consumer_is(ConsumerState::Overlap) {
            let blocked = self.evidence.blocked_producer(since, now).min(elapsed);
            return [0, 0, elapsed - blocked, blocked, 0];
        }
        if self.consumer_is(ConsumerState::Woken) {
            if elapsed <= AT_ONCE {
                // A consumer that takes rows at once has waited for them until then.
                return [elapsed, 0, 0, 0, 0];
            }
            let others = self.evidence.resolve(self.evidence.attribute_delay(since, now)).others.min(elapsed);
            return [0, others, 0, elapsed - others, 0];
        }
        self.consumer.current_parts(now)
    }

    /// Returns the part of the current state's time whose attribution will not change. A delay can be attributed only
    /// after `AT_ONCE`; until then none of it is returned.
    fn settled_parts(&self, now: Nanos) -> [Nanos; CONSUMER_STATES] {
        let is_open =
            self.consumer_is(ConsumerState::Woken) && now.saturating_sub(self.consumer.since()) <= AT_ONCE;
        if is_open { [0; CONSUMER_STATES] } else { self.current_parts(now) }
    }

    fn wait_parts(&self, attribution: Attribution, now: Nanos) -> [Nanos; CONSUMER_STATES] {
        let since = self.consumer.since();
        let elapsed = now.saturating_sub(since);
        let Attribution { own, others, .. } = self.evidence.resolve(attribution);
        let left = elapsed.saturating_sub(own + others);
        let blocked = self.evidence.blocked_producer(since + own, now).min(left);
        [left - blocked, others, own, blocked, 0]
    }

    /// Adds `spent` to the time spent decoding, which is part of the time in which the consumer is busy.
    pub(crate) fn record_decode(&self, spent: Nanos) {
        add(&self.decode, spent);
    }

    /// Returns the time spent decoding. This is cheaper than reading all sums.
    pub(crate) fn read_decode(&self) -> Nanos {
        self.decode.load(Ordering::Relaxed)
    }

    /// Returns the sums up to now, current states included.
    pub(crate) fn read(&self) -> Times {
        self.read_consistently(|| self.read_at(self.now()))
    }

    /// Returns the sums without a delay that cannot be attributed yet, so that no sum ever decreases.
    pub(crate) fn read_settled(&self) -> Times {
        self.read_consistently(|| {
            let now = self.now();
            self.times(self.settled_parts(now), now)
        })
    }

    /// Returns the consumer's sums at the start of the sliding window.
    pub(crate) fn read_window_start(&self) -> [Nanos; CONSUMER_STATES] {
        self.read_consistently(|| {
            let now = self.read_at(self.now());
            self.window.start(Sums { at: now.at, sums: now.consumer }).sums
        })
    }

    fn read_at(&self, now: Nanos) -> Times {
        self.times(self.current_parts(now), now)
    }

    fn times(&self, current: [Nanos; CONSUMER_STATES], now: Nanos) -> Times {
        let consumer = self.consumer.read(current);
        let busy = consumer[ConsumerState::Overlap as usize] + consumer[ConsumerState::Backlog as usize];
        Times {
            at: consumer.iter().sum(),
            consumer,
            producer: self.producer.read(self.producer.current_parts(now)),
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

    /// Calls `read` again if a writer interfered. A writer finishes within nanoseconds unless the operating system
    /// suspends it. The reader does not wait for a suspended writer: after a number of attempts it returns what it
    /// read last.
    fn read_consistently<T>(&self, read: impl Fn() -> T) -> T {
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
