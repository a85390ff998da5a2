//! `Evidence`: decides who delayed a consumer that does not take its rows.
//!
//! When rows wait for a consumer that was woken, either the runtime is late to run its task, or the task is busy with
//! something else. The evidence:
//!
//! - The [`Watchdog`] knows when its own turns ran late. A late runtime delayed a stream only if the stream continued
//!   as soon as the runtime was no longer late.
//! - If one thread runs all tasks, they run in the order in which they were woken, and streams can request a turn of
//!   the watchdog at a certain place in that order. A turn that is requested by a consumer runs once the consumer's
//!   task has yielded the thread. A turn that is requested just before a consumer is woken runs just before the
//!   consumer.
//! - If there are several threads, a producer that the consumer woke may have to run on the consumer's thread, right
//!   after it. While the producer does not run although the runtime is not late, the consumer blocks it.
//!
//! Turns are requested only by streams whose consumer was slow recently, and while the runtime is suspected to be late.
//! A fast stream pays nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::partition::add;
use crate::channel::clock::{Clock, Nanos};
use crate::channel::watchdog::{CATCH_UP, Watchdog};

/// A consumer that takes rows within this time takes them at once. A healthy runtime may need this long to run a task
/// that is ready.
pub(crate) const AT_ONCE: Nanos = 500_000;
/// The amount of evidence above which older evidence is halved.
const REMEMBERED: Nanos = 500_000_000;
/// Others block the thread for a significant part of the time if their share is at least one part in this many.
const SIGNIFICANT_PART: Nanos = 8;
/// The number of periods in doubt that are attributed to others without evidence.
const FIRST_DOUBTS: u64 = 2;
/// A consumer that was slow is expected to be slow again within this many times the delay.
const SLOW_FACTOR: Nanos = 2;
const NEVER: Nanos = Nanos::MAX;

/// The evidence of one stream.
#[derive(Debug)]
pub(crate) struct Evidence {
    watchdog: Arc<Watchdog>,
    /// The time on the watchdog's clock when the stream was started.
    offset: Nanos,
    /// When a turn was requested as the consumer began to wait; `NEVER` if none was.
    requested_at_wait: AtomicU64,
    /// When a turn was requested as rows arrived during the wait; `NEVER` if none was.
    requested_at_arrival: AtomicU64,
    /// When a turn was requested as the consumer took rows; `NEVER` if none was.
    requested_at_take: AtomicU64,
    /// Whether the consumer runs in the order in which it was woken.
    is_in_order: AtomicBool,
    /// The consumer is expected to be slow again until then.
    slow_until: AtomicU64,
    /// When the consumer woke a producer that has not run since; `NEVER` if there is none.
    producer_woken: AtomicU64,
    /// For how long recently it was in doubt whether the consumer blocked the thread.
    doubtful: AtomicU64,
    /// For how long recently others certainly blocked the thread.
    others: AtomicU64,
    /// The number of periods in doubt so far.
    doubts: AtomicU64,
}

/// How a period is attributed. The rest of it is not attributed to anyone named here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attribution {
    /// To the consumer's own task.
    pub(crate) own: Nanos,
    /// To others: the runtime was late.
    pub(crate) others: Nanos,
    /// To one of the two, and it is in doubt to which.
    doubtful: Nanos,
}

/// Returns whether the caller runs in a task. Always true in tests, which poll without a runtime.
fn runs_in_task() -> bool {
    cfg!(test) || tokio::task::try_id().is_some()
}

impl Evidence {
    pub(crate) fn new(clock: &Clock, watchdog: Arc<Watchdog>) -> Self {
        Self {
            offset: clock.since(watchdog.clock()),
            watchdog,
            requested_at_wait: AtomicU64::new(NEVER),
            requested_at_arrival: AtomicU64::new(NEVER),
            requested_at_take: AtomicU64::new(NEVER),
            is_in_order: AtomicBool::new(false),
            slow_until: AtomicU64::new(0),
            producer_woken: AtomicU64::new(NEVER),
            doubtful: AtomicU64::new(0),
            others: AtomicU64::new(0),
            doubts: AtomicU64::new(0),
        }
    }

    pub(crate) fn watchdog(&self) -> &Watchdog {
        &self.watchdog
    }

    /// Records that the consumer begins to wait.
    pub(crate) fn record_wait_start(&self, now: Nanos) {
        let has_one_thread = self.watchdog.has_one_thread();
        // The future of `block_on` is not a task and has no place in the run queue.
        self.is_in_order.store(has_one_thread && runs_in_task(), Ordering::Relaxed);
        self.request_turn_if(has_one_thread && self.expects_delay(now), &self.requested_at_wait, now);
    }

    /// Records that rows arrived and that the consumer is about to be woken.
    pub(crate) fn record_arrival(&self, now: Nanos) {
        let is_useful =
            if self.watchdog.has_one_thread() { self.expects_delay(now) } else { self.is_slow(now) };
        self.requested_at_arrival.store(if is_useful { now } else { NEVER }, Ordering::Relaxed);
        if is_useful {
            self.watchdog.request_turn_for_rows(self.offset + now);
        }
    }

    /// Records that the consumer takes rows that waited for it for `delay`.
    pub(crate) fn record_take(&self, delay: Nanos, now: Nanos) {
        self.record_pace(delay, now);
        let is_useful = self.watchdog.has_one_thread() && self.is_slow(now);
        self.request_turn_if(is_useful, &self.requested_at_take, now);
    }

    /// Forgets the turns requested before: once the consumer yields, they prove nothing.
    pub(crate) fn forget_requests(&self) {
        for requested in [&self.requested_at_wait, &self.requested_at_arrival, &self.requested_at_take] {
            requested.store(NEVER, Ordering::Relaxed);
        }
    }

    fn request_turn_if(&self, is_useful: bool, requested: &AtomicU64, now: Nanos) {
        requested.store(if is_useful { now } else { NEVER }, Ordering::Relaxed);
        if is_useful {
            self.watchdog.request_turn(self.offset + now);
        }
    }

    /// Records that the consumer was busy, or let rows wait, for `time` up to `now`.
    pub(crate) fn record_pace(&self, time: Nanos, now: Nanos) {
        if time > AT_ONCE {
            self.slow_until.fetch_max(now + SLOW_FACTOR * time, Ordering::Relaxed);
        }
    }

    fn is_slow(&self, now: Nanos) -> bool {
        now < self.slow_until.load(Ordering::Relaxed)
    }

    fn expects_delay(&self, now: Nanos) -> bool {
        self.is_slow(now) || self.watchdog.is_alert(self.offset + now)
    }

    /// Returns whether a further poll in the current wait adds evidence.
    pub(crate) fn learns_from_poll(&self, now: Nanos) -> bool {
        self.has_turn_for_wait()
            || self.overdue_on_one_thread(now).is_some()
            || (self.watchdog.has_one_thread() && self.expects_delay(now))
    }

    /// Returns whether a turn was requested when the current wait began. If not, nothing is certain about the wait.
    pub(crate) fn has_turn_for_wait(&self) -> bool {
        self.requested_at_wait.load(Ordering::Relaxed) != NEVER
    }

    /// Attributes a wait for rows.
    pub(crate) fn attribute_wait(&self, since: Nanos, now: Nanos) -> Attribution {
        let elapsed = now.saturating_sub(since);
        let doubtful = match self.requested_at_wait.load(Ordering::Relaxed) {
            NEVER => 0,
            requested => self
                .first_turn_after(requested)
                .map_or(elapsed, |turn| turn.saturating_sub(since))
                .min(elapsed),
        };
        let others = self.late_up_to(since + doubtful, now);
        Attribution { others, doubtful, ..Attribution::default() }
    }

    /// Attributes a wait in which the consumer polls once more. If a turn is overdue then, the consumer's own task may
    /// have blocked the thread.
    pub(crate) fn attribute_wait_at_poll(&self, since: Nanos, now: Nanos) -> Attribution {
        match self.overdue_on_one_thread(now) {
            Some(from) => {
                let doubtful = now - from.saturating_sub(self.offset).clamp(since, now);
                Attribution { doubtful, ..Attribution::default() }
            }
            None => self.attribute_wait(since, now),
        }
    }

    fn overdue_on_one_thread(&self, now: Nanos) -> Option<Nanos> {
        self.watchdog.overdue_since(self.offset + now).filter(|_| self.watchdog.has_one_thread())
    }

    /// Attributes the time since rows arrived that were not taken yet.
    pub(crate) fn attribute_delay(&self, since: Nanos, now: Nanos) -> Attribution {
        let elapsed = now.saturating_sub(since);
        if elapsed <= AT_ONCE {
            return Attribution::default();
        }
        let is_requested = self.requested_at_arrival.load(Ordering::Relaxed) != NEVER;
        // That turn's place in the run queue is just before the consumer.
        let turn = if is_requested { self.first_turn_for_rows(since) } else { None };
        if is_requested && self.is_in_order.load(Ordering::Relaxed) {
            return self.attribute_delay_in_order(turn, since, now);
        }
        if !self.watchdog.has_one_thread() && turn.is_some_and(|turn| turn <= since + CATCH_UP) {
            // A thread was free, so the runtime could have run the consumer.
            return Attribution { own: elapsed, ..Attribution::default() };
        }
        let late = self.late_up_to(since, now);
        // If a turn is still overdue, the thread that it needs may be the one that the consumer had until now.
        let overdue = self.watchdog.overdue_since(self.offset + now);
        let doubtful =
            overdue.map_or(0, |from| now - from.saturating_sub(self.offset).clamp(since, now)).min(late);
        Attribution { others: late - doubtful, doubtful, own: elapsed - late }
    }

    /// Attributes the same time if tasks run in the order in which they were woken. `turn` is when the turn ran whose
    /// place is just before the consumer.
    fn attribute_delay_in_order(&self, turn: Option<Nanos>, since: Nanos, now: Nanos) -> Attribution {
        let elapsed = now.saturating_sub(since);
        let requested = self.requested_at_wait.load(Ordering::Relaxed);
        if requested != NEVER && self.first_turn_after(requested).is_none() {
            // The consumer has not yielded the thread since.
            return Attribution { own: elapsed, ..Attribution::default() };
        }
        if let Some(turn) = turn {
            let others = turn.clamp(since, now) - since;
            return Attribution { others, own: elapsed - others, ..Attribution::default() };
        }
        // Something else had woken the consumer before; it may have been queued behind an earlier turn.
        let others = self.first_turn_after(since).map_or(0, |turn| turn.clamp(since, now) - since);
        Attribution { others, doubtful: elapsed - others, ..Attribution::default() }
    }

    /// Returns how long a consumer that held rows certainly blocked the only thread.
    pub(crate) fn blocked_thread(&self, since: Nanos, now: Nanos) -> Nanos {
        let requested = self.requested_at_take.load(Ordering::Relaxed);
        let is_blocked = requested != NEVER && self.first_turn_after(requested).is_none();
        if is_blocked { now.saturating_sub(since) } else { 0 }
    }

    /// Returns how long the consumer blocked a producer that it had woken.
    pub(crate) fn blocked_producer(&self, since: Nanos, now: Nanos) -> Nanos {
        let since = self.producer_woken.load(Ordering::Relaxed).max(since);
        let blocked = now.saturating_sub(since);
        if blocked <= AT_ONCE || self.watchdog.has_one_thread() {
            return 0;
        }
        blocked - self.watchdog.late_between(self.offset + since, self.offset + now).min(blocked)
    }

    /// Records that the consumer is about to wake the producer.
    pub(crate) fn record_producer_wake(&self, now: Nanos) {
        self.producer_woken.store(now, Ordering::Relaxed);
    }

    /// Returns whether the consumer woke the producer and the producer has not run since.
    pub(crate) fn is_producer_woken(&self) -> bool {
        self.producer_woken.load(Ordering::Relaxed) != NEVER
    }

    /// Records that the producer runs.
    pub(crate) fn record_producer_run(&self) {
        self.producer_woken.store(NEVER, Ordering::Relaxed);
    }

    /// Remembers the evidence by which `resolve` attributes periods in doubt.
    pub(crate) fn remember(&self, attribution: &Attribution) {
        if attribution.doubtful == 0 && attribution.others <= AT_ONCE {
            return;
        }
        let (doubtful, others) = (self.doubtful.load(Ordering::Relaxed), self.others.load(Ordering::Relaxed));
        let halve = u32::from(doubtful + others > REMEMBERED);
        let surely_others = if attribution.others > AT_ONCE { attribution.others } else { 0 };
        self.doubtful.store((doubtful >> halve) + attribution.doubtful, Ordering::Relaxed);
        self.others.store((others >> halve) + surely_others, Ordering::Relaxed);
        add(&self.doubts, u64::from(attribution.doubtful > AT_ONCE));
    }

    /// Attributes time in doubt: the first `FIRST_DOUBTS` times to others, later to others as long as they certainly
    /// blocked the thread for a significant part of the time, and otherwise to the consumer.
    pub(crate) fn resolve(&self, attribution: Attribution) -> Attribution {
        let (doubtful, others) = (self.doubtful.load(Ordering::Relaxed), self.others.load(Ordering::Relaxed));
        let is_early = self.doubts.load(Ordering::Relaxed) < FIRST_DOUBTS;
        // The future of `block_on` runs out of order, so nothing proves that it blocked the thread.
        let is_out_of_order = self.watchdog.has_one_thread() && !self.is_in_order.load(Ordering::Relaxed);
        let Attribution { own, others: surely_others, doubtful: in_doubt } = attribution;
        if is_early || is_out_of_order || others * SIGNIFICANT_PART >= doubtful {
            Attribution { own, others: surely_others + in_doubt, doubtful: 0 }
        } else {
            Attribution { own: own + in_doubt, others: surely_others, doubtful: 0 }
        }
    }

    /// Sets whether time in doubt is attributed to the consumer from the first time on, until evidence is remembered.
    #[cfg(test)]
    pub(crate) fn attribute_doubts_to_consumer(&self, enabled: bool) {
        self.doubts.store(if enabled { FIRST_DOUBTS } else { 0 }, Ordering::Relaxed);
        self.doubtful.store(u64::from(enabled), Ordering::Relaxed);
    }

    fn late_up_to(&self, since: Nanos, now: Nanos) -> Nanos {
        self.watchdog.late_up_to(self.offset + since, self.offset + now).min(now.saturating_sub(since))
    }

    fn first_turn_after(&self, moment: Nanos) -> Option<Nanos> {
        self.watchdog.first_turn_after(self.offset + moment).map(|turn| turn.saturating_sub(self.offset))
    }

    fn first_turn_for_rows(&self, moment: Nanos) -> Option<Nanos> {
        self.watchdog.first_turn_for_rows(self.offset + moment).map(|turn| turn.saturating_sub(self.offset))
    }
}
