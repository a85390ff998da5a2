//! `Evidence`: decides whose time it is when a consumer does not take its rows.
//!
//! Rows wait for a consumer that was woken. Either the runtime is late to run its task, or the task is busy with
//! something else. The evidence:
//!
//! - The [`Watchdog`] knows when its own turns ran late. A late runtime delayed a stream only if the stream continued
//!   as soon as the runtime was no longer late.
//! - If one thread runs all tasks, they run in the order in which they were woken, and the watchdog can be asked for
//!   a turn at a certain place in that order. A turn that a consumer asks for runs once its task has yielded the
//!   thread; a turn that is asked for just before a consumer is woken runs just before the consumer.
//! - If there are several threads, a producer that the consumer woke may have to run on the consumer's thread, right
//!   after it. While the producer does not run although the runtime is not late, the consumer keeps it from running.
//!
//! Turns are asked for only for consumers that were slow recently and while the runtime is suspected to be late: a
//! fast stream pays nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::partition::add;
use crate::channel::clock::{Clock, Nanos};
use crate::channel::watchdog::{CATCH_UP, Watchdog};

/// A consumer that takes rows within this time takes them at once: a healthy runtime may need as long to run a task
/// that is ready.
pub(crate) const AT_ONCE: Nanos = 500_000;
/// The amount of evidence above which older evidence is halved.
const RECENT: Nanos = 500_000_000;
/// Others keep the thread for a good part of the time if their share is at least one part in this many.
const GOOD_PART: Nanos = 8;
/// The number of doubtful periods that are attributed to others without evidence.
const DOUBTS: u64 = 2;
/// A consumer that was slow is expected to be slow again within this many times the delay.
const SLOW_AGAIN: Nanos = 2;
const NEVER: Nanos = Nanos::MAX;

#[derive(Debug)]
pub(crate) struct Evidence {
    watchdog: Arc<Watchdog>,
    /// The time on the watchdog's clock when the stream began.
    offset: Nanos,
    /// When a turn was asked for as the consumer began to wait; `NEVER` if none was.
    asked_in_wait: AtomicU64,
    /// The same as rows arrived while it waited.
    asked_by_rows: AtomicU64,
    /// The same as it took rows.
    asked_in_hand: AtomicU64,
    /// The consumer runs in the order in which it was woken.
    is_in_order: AtomicBool,
    /// Until then the consumer is expected to be slow again.
    slow_until: AtomicU64,
    /// Since when a producer that the consumer woke has not run; `NEVER` if there is none.
    producer_woken: AtomicU64,
    /// The remembered evidence: how long the consumer may have kept the thread, and how long others certainly did.
    doubtful: AtomicU64,
    others: AtomicU64,
    doubts: AtomicU64,
}

/// Whose time a period is. The rest of the period belongs to nobody named here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Whose {
    /// The consumer's own task.
    pub(crate) own: Nanos,
    /// Others: the runtime was late.
    pub(crate) others: Nanos,
    /// Either of the two kept the thread.
    doubtful: Nanos,
}

/// Whether the caller runs in a task; not in tests, which poll by hand.
fn runs_in_task() -> bool {
    cfg!(test) || tokio::task::try_id().is_some()
}

impl Evidence {
    pub(crate) fn new(clock: &Clock, watchdog: Arc<Watchdog>) -> Self {
        Self {
            offset: clock.since(watchdog.clock()),
            watchdog,
            asked_in_wait: AtomicU64::new(NEVER),
            asked_by_rows: AtomicU64::new(NEVER),
            asked_in_hand: AtomicU64::new(NEVER),
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

    /// The consumer begins to wait.
    pub(crate) fn wait_begins(&self, now: Nanos) {
        let has_one_thread = self.watchdog.has_one_thread();
        // The future of `block_on` is no task: it does not take its place in the run queue.
        self.is_in_order.store(has_one_thread && runs_in_task(), Ordering::Relaxed);
        self.ask_if(has_one_thread && self.is_suspect(now), &self.asked_in_wait, now);
    }

    /// Rows arrived, and the consumer is about to be woken.
    pub(crate) fn rows_arrived(&self, now: Nanos) {
        let is_worth_it =
            if self.watchdog.has_one_thread() { self.is_suspect(now) } else { self.is_slow(now) };
        self.asked_by_rows.store(if is_worth_it { now } else { NEVER }, Ordering::Relaxed);
        if is_worth_it {
            self.watchdog.ask_for_rows(self.offset + now);
        }
    }

    /// The consumer takes rows that waited for it for `delay`.
    pub(crate) fn rows_taken(&self, delay: Nanos, now: Nanos) {
        self.note_pace(delay, now);
        self.ask_if(self.watchdog.has_one_thread() && self.is_slow(now), &self.asked_in_hand, now);
    }

    /// The consumer yields; turns that were asked for before prove nothing any more.
    pub(crate) fn forget(&self) {
        for asked in [&self.asked_in_wait, &self.asked_by_rows, &self.asked_in_hand] {
            asked.store(NEVER, Ordering::Relaxed);
        }
    }

    fn ask_if(&self, is_worth_it: bool, asked: &AtomicU64, now: Nanos) {
        asked.store(if is_worth_it { now } else { NEVER }, Ordering::Relaxed);
        if is_worth_it {
            self.watchdog.ask(self.offset + now);
        }
    }

    /// The consumer was busy, or let rows wait, for `time` up to `now`.
    pub(crate) fn note_pace(&self, time: Nanos, now: Nanos) {
        if time > AT_ONCE {
            self.slow_until.fetch_max(now + SLOW_AGAIN * time, Ordering::Relaxed);
        }
    }

    fn is_slow(&self, now: Nanos) -> bool {
        now < self.slow_until.load(Ordering::Relaxed)
    }

    fn is_suspect(&self, now: Nanos) -> bool {
        self.is_slow(now) || self.watchdog.is_alert(self.offset + now)
    }

    /// Whether a further poll in the current wait adds evidence.
    pub(crate) fn is_wanted(&self, now: Nanos) -> bool {
        self.asked_in_wait()
            || self.overdue_on_one_thread(now).is_some()
            || (self.watchdog.has_one_thread() && self.is_suspect(now))
    }

    /// Whether a turn was asked for when the current wait began; if not, nothing is certain about it.
    pub(crate) fn asked_in_wait(&self) -> bool {
        self.asked_in_wait.load(Ordering::Relaxed) != NEVER
    }

    /// Attributes a wait for rows.
    pub(crate) fn of_wait(&self, since: Nanos, now: Nanos) -> Whose {
        let life = now.saturating_sub(since);
        let doubtful = match self.asked_in_wait.load(Ordering::Relaxed) {
            NEVER => 0,
            asked => self.first_turn_after(asked).map_or(life, |turn| turn.saturating_sub(since)).min(life),
        };
        let others = self.late_up_to(since + doubtful, now);
        Whose { others, doubtful, ..Whose::default() }
    }

    /// Attributes a wait in which the consumer polls once more. If a turn is overdue then, the consumer's own task
    /// may have kept the thread.
    pub(crate) fn of_wait_up_to_poll(&self, since: Nanos, now: Nanos) -> Whose {
        match self.overdue_on_one_thread(now) {
            Some(from) => {
                let doubtful = now - from.saturating_sub(self.offset).clamp(since, now);
                Whose { doubtful, ..Whose::default() }
            }
            None => self.of_wait(since, now),
        }
    }

    fn overdue_on_one_thread(&self, now: Nanos) -> Option<Nanos> {
        self.watchdog.overdue_since(self.offset + now).filter(|_| self.watchdog.has_one_thread())
    }

    /// Attributes the time since rows arrived that were not taken yet.
    pub(crate) fn of_delay(&self, since: Nanos, now: Nanos) -> Whose {
        let life = now.saturating_sub(since);
        if life <= AT_ONCE {
            return Whose::default();
        }
        let asked = self.asked_by_rows.load(Ordering::Relaxed) != NEVER;
        // That turn's place in the run queue is just before the consumer.
        let turn = if asked { self.first_turn_for_rows(since) } else { None };
        if asked && self.is_in_order.load(Ordering::Relaxed) {
            return self.of_delay_in_order(turn, since, now);
        }
        if !self.watchdog.has_one_thread() && turn.is_some_and(|turn| turn <= since + CATCH_UP) {
            // A thread was free, so the runtime could have run the consumer.
            return Whose { own: life, ..Whose::default() };
        }
        let late = self.late_up_to(since, now);
        // If a turn is still overdue, the thread that it needs may be the one that the consumer had until now.
        let overdue = self.watchdog.overdue_since(self.offset + now);
        let doubtful =
            overdue.map_or(0, |from| now - from.saturating_sub(self.offset).clamp(since, now)).min(late);
        Whose { others: late - doubtful, doubtful, own: life - late }
    }

    /// Does the same if tasks run in the order in which they were woken: `turn` ran just before the consumer.
    fn of_delay_in_order(&self, turn: Option<Nanos>, since: Nanos, now: Nanos) -> Whose {
        let life = now.saturating_sub(since);
        let asked = self.asked_in_wait.load(Ordering::Relaxed);
        if asked != NEVER && self.first_turn_after(asked).is_none() {
            // The consumer has not yielded the thread since.
            return Whose { own: life, ..Whose::default() };
        }
        if let Some(turn) = turn {
            let others = turn.clamp(since, now) - since;
            return Whose { others, own: life - others, ..Whose::default() };
        }
        // Something else had woken the consumer before; it may have been queued behind an earlier turn.
        let others = self.first_turn_after(since).map_or(0, |turn| turn.clamp(since, now) - since);
        Whose { others, doubtful: life - others, ..Whose::default() }
    }

    /// How long a consumer that held rows certainly kept the only thread.
    pub(crate) fn kept_thread(&self, since: Nanos, now: Nanos) -> Nanos {
        let asked = self.asked_in_hand.load(Ordering::Relaxed);
        let kept = asked != NEVER && self.first_turn_after(asked).is_none();
        if kept { now.saturating_sub(since) } else { 0 }
    }

    /// How long the consumer kept a woken producer from running.
    pub(crate) fn kept_producer(&self, since: Nanos, now: Nanos) -> Nanos {
        let since = self.producer_woken.load(Ordering::Relaxed).max(since);
        let kept = now.saturating_sub(since);
        if kept <= AT_ONCE || self.watchdog.has_one_thread() {
            return 0;
        }
        kept - self.watchdog.late_between(self.offset + since, self.offset + now).min(kept)
    }

    /// The producer is about to be woken by the consumer.
    pub(crate) fn wake_producer(&self, now: Nanos) {
        self.producer_woken.store(now, Ordering::Relaxed);
    }

    /// Whether the producer has not run since the consumer woke it.
    pub(crate) fn producer_is_woken(&self) -> bool {
        self.producer_woken.load(Ordering::Relaxed) != NEVER
    }

    pub(crate) fn producer_runs(&self) {
        self.producer_woken.store(NEVER, Ordering::Relaxed);
    }

    /// Remembers the evidence, by which `resolve` attributes doubtful periods.
    pub(crate) fn weigh(&self, whose: &Whose) {
        if whose.doubtful == 0 && whose.others <= AT_ONCE {
            return;
        }
        let (doubtful, others) = (self.doubtful.load(Ordering::Relaxed), self.others.load(Ordering::Relaxed));
        let halve = u32::from(doubtful + others > RECENT);
        let surely_others = if whose.others > AT_ONCE { whose.others } else { 0 };
        self.doubtful.store((doubtful >> halve) + whose.doubtful, Ordering::Relaxed);
        self.others.store((others >> halve) + surely_others, Ordering::Relaxed);
        add(&self.doubts, u64::from(whose.doubtful > AT_ONCE));
    }

    /// Attributes doubtful time to others for the first `DOUBTS` times, and after that as long as others were seen to
    /// keep the thread for a good part of the time; otherwise to the consumer.
    pub(crate) fn resolve(&self, whose: Whose) -> Whose {
        let (doubtful, others) = (self.doubtful.load(Ordering::Relaxed), self.others.load(Ordering::Relaxed));
        let is_early = self.doubts.load(Ordering::Relaxed) < DOUBTS;
        // The future of `block_on` runs out of order: nothing is certain, so nothing is held against it.
        let is_out_of_order = self.watchdog.has_one_thread() && !self.is_in_order.load(Ordering::Relaxed);
        if is_early || is_out_of_order || others * GOOD_PART >= doubtful {
            Whose { others: whose.others + whose.doubtful, doubtful: 0, ..whose }
        } else {
            Whose { own: whose.own + whose.doubtful, doubtful: 0, ..whose }
        }
    }

    /// If `none`, attributes doubtful time to the consumer from the first time on.
    #[cfg(test)]
    pub(crate) fn give_no_benefit_of_the_doubt(&self, none: bool) {
        self.doubts.store(if none { DOUBTS } else { 0 }, Ordering::Relaxed);
        self.doubtful.store(u64::from(none), Ordering::Relaxed);
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
