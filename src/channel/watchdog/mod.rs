//! `Watchdog`: the evidence of whether an async runtime runs its tasks in time.
//!
//! Each runtime has one watchdog, shared by all of its streams. Its main task sleeps on a timer, and a turn that runs
//! late proves that the runtime was late. While a runtime is suspected to be late, or a consumer is slow, streams also
//! ask for turns at the moments that matter to them, so that the turn is queued right beside the consumer's task. A
//! second task serves the turns that are asked for by rows.

mod turns;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::{Handle, Id, RuntimeFlavor};
use tokio::time::sleep;

pub(crate) use self::turns::CATCH_UP;
use self::turns::{Bell, GRACE, Log, NEVER};
use super::clock::{Clock, Nanos};
use crate::sync::lock;

/// Something to do for a stream now and then, at times that need not be exact.
pub(crate) trait Chore: Send + Sync {
    /// Runs the chore; returns the time after which to run it again.
    fn run(&self) -> Option<Duration>;
}

/// A chore and when it is due. A chore whose owner is gone is removed.
type Due = (Nanos, Weak<dyn Chore>);

pub(crate) struct Watchdog {
    clock: Clock,
    /// One thread runs all tasks, in the order in which they were woken.
    has_one_thread: bool,
    /// A turn that has not run by then is late.
    overdue_at: AtomicU64,
    /// The end of the latest interval in `Log::late`.
    last_late: AtomicU64,
    /// Turns asked for by consumers and turns asked for by rows: each has its own place in the run queue.
    by_consumers: Bell,
    by_rows: Bell,
    /// Until then the timer is set near, because waits are long.
    watch_until: AtomicU64,
    /// Until then the timer is set as near as possible, because the runtime was late.
    alert_until: AtomicU64,
    log: Mutex<Log>,
    streams: AtomicUsize,
    chores: Mutex<Vec<Due>>,
    /// No chore is due before then. Changes under the lock of `chores` only.
    next_chore: AtomicU64,
    /// The task is gone, and with it its runtime.
    is_gone: AtomicBool,
}

const MS: Nanos = 1_000_000;

impl Watchdog {
    /// A timer that is due soon costs a fast stream a few percent of its CPU, because it is passed to the kernel each
    /// time a thread goes to sleep. So it is near only if waits are long, and nearest if the runtime was late.
    const FAR: Nanos = 250 * MS;
    const WATCH: Nanos = 10 * MS;
    const ALERT: Nanos = 2 * MS;
    /// How long a runtime that was late is suspected to be late again.
    const SUSPICION: Nanos = 250 * MS;
    /// A wait of this length is likely to be followed by others, for eight times its length and at most a second.
    const LONG_WAIT: Nanos = 2 * MS;
    const LONGEST_WATCH: Nanos = 1_000 * MS;
    /// A delay of this length is not caused by the operating system.
    const SURELY_LATE: Nanos = 10 * MS;

    /// Returns the watchdog of a runtime.
    pub(crate) fn of(runtime: &Handle) -> Arc<Self> {
        static ALL: Mutex<Option<HashMap<Id, Weak<Watchdog>>>> = Mutex::new(None);
        let mut all = lock(&ALL);
        let all = all.get_or_insert_default();
        // The id of a runtime that is gone may be used again.
        let known = all.get(&runtime.id()).and_then(Weak::upgrade);
        if let Some(watchdog) = known.filter(|watchdog| !watchdog.is_gone()) {
            return watchdog;
        }
        all.retain(|_, watchdog| watchdog.strong_count() > 0);
        let has_one_thread = runtime.runtime_flavor() == RuntimeFlavor::CurrentThread;
        let watchdog = Arc::new(Self::new(Clock::start(), has_one_thread));
        all.insert(runtime.id(), Arc::downgrade(&watchdog));
        runtime.spawn(Task(Arc::clone(&watchdog)).run());
        let answering = Arc::clone(&watchdog);
        runtime.spawn(async move { answering.answer_rows().await });
        watchdog
    }

    pub(crate) fn new(clock: Clock, has_one_thread: bool) -> Self {
        Self {
            clock,
            has_one_thread,
            overdue_at: AtomicU64::new(NEVER),
            last_late: AtomicU64::new(0),
            by_consumers: Bell::default(),
            by_rows: Bell::default(),
            watch_until: AtomicU64::new(0),
            alert_until: AtomicU64::new(0),
            log: Mutex::default(),
            streams: AtomicUsize::new(0),
            chores: Mutex::default(),
            next_chore: AtomicU64::new(NEVER),
            is_gone: AtomicBool::new(false),
        }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }

    /// A stream begins; its first waits may be long.
    pub(crate) fn stream_begins(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        if let Some(now) = self.watch(2 * Self::WATCH) {
            // The turn that sets the timer is due at once: if it does not run, the runtime is late already.
            let mut log = lock(&self.log);
            self.set_due(&mut log, now, Self::ALERT);
        }
    }

    pub(crate) fn stream_ends(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// A stream waited for `waited`.
    pub(crate) fn record_wait(&self, waited: Nanos) {
        if waited >= Self::LONG_WAIT {
            let _ = self.watch(waited.saturating_mul(8).min(Self::LONGEST_WATCH));
        }
    }

    /// Keeps the timer near for a while; returns the current time if the task had to be woken for that.
    fn watch(&self, span: Nanos) -> Option<Nanos> {
        let now = self.clock.now();
        let until = self.watch_until.load(Ordering::Relaxed);
        // Extended only when half of the span is over, so that not every short stream writes here.
        let wakes =
            until < now + span / 2 && self.watch_until.fetch_max(now + span, Ordering::Relaxed) <= now;
        wakes.then(|| {
            self.by_consumers.wake.notify_one();
            now
        })
    }

    fn set_due(&self, log: &mut Log, now: Nanos, period: Nanos) {
        log.due = now.saturating_add(period);
        log.late_from = now.max(log.due.saturating_sub(Self::ALERT));
        self.overdue_at.store(log.due.saturating_add(GRACE), Ordering::Relaxed);
    }

    /// Adds a chore that is first due in `Self::WATCH`.
    pub(crate) fn add_chore(&self, chore: Weak<dyn Chore>) {
        self.push_chore(self.clock.now() + Self::WATCH, chore);
    }

    /// Whether the runtime was late a moment ago.
    pub(crate) fn is_alert(&self, now: Nanos) -> bool {
        now < self.alert_until.load(Ordering::Relaxed)
    }

    /// Asks for a turn, which is queued behind a consumer that runs now.
    pub(crate) fn ask(&self, now: Nanos) {
        self.by_consumers.ring(now);
    }

    /// Asks for a turn, which is queued just before a consumer that is woken next.
    pub(crate) fn ask_for_rows(&self, now: Nanos) {
        self.by_rows.ring(now);
    }

    /// Returns for how long the runtime is known to have been late between two moments.
    pub(crate) fn late_between(&self, from: Nanos, to: Nanos) -> Nanos {
        if to <= self.overdue_at.load(Ordering::Relaxed) && self.last_late.load(Ordering::Relaxed) <= from {
            return 0;
        }
        lock(&self.log).late_between(from, to)
    }

    /// Returns for how long the runtime was late without interruption up to the end of an interval.
    pub(crate) fn late_up_to(&self, from: Nanos, to: Nanos) -> Nanos {
        if to <= self.overdue_at.load(Ordering::Relaxed) && self.last_late.load(Ordering::Relaxed) <= from {
            return 0;
        }
        lock(&self.log).late_up_to(from, to)
    }

    /// Whether one thread runs all tasks, in the order in which they were woken.
    pub(crate) fn has_one_thread(&self) -> bool {
        self.has_one_thread
    }

    /// Returns since when a turn is overdue, if one is at `now`.
    pub(crate) fn overdue_since(&self, now: Nanos) -> Option<Nanos> {
        if now <= self.overdue_at.load(Ordering::Relaxed) {
            return None;
        }
        let log = lock(&self.log);
        (now > log.due.saturating_add(GRACE)).then_some(log.late_from)
    }

    /// Returns when the first turn after `moment` ran.
    pub(crate) fn first_turn_after(&self, moment: Nanos) -> Option<Nanos> {
        // If nobody asked for that turn, it was the last one.
        let last = Some(lock(&self.log).last_turn).filter(|ran| *ran > moment);
        self.by_consumers.first_turn(|turn| turn.ran > moment).or(last)
    }

    /// Returns when the first of the turns ran that rows asked for at `moment` or later.
    pub(crate) fn first_turn_for_rows(&self, moment: Nanos) -> Option<Nanos> {
        self.by_rows.first_turn(|turn| turn.queued >= moment)
    }

    /// Records a turn of the task; returns when the next is due, or `NEVER` if there is no stream to watch.
    fn turn(&self, now: Nanos) -> Nanos {
        let mut log = lock(&self.log);
        if log.is_late(now) {
            // One late turn may be caused by the operating system; from the second on the runtime is suspect.
            let watched_until = self.watch_until.fetch_max(now + Self::SUSPICION, Ordering::Relaxed);
            if now < watched_until || now - log.due >= Self::SURELY_LATE {
                self.alert_until.store(now + Self::SUSPICION, Ordering::Relaxed);
            }
            log.add_late(now);
            self.last_late.store(now, Ordering::Relaxed);
        }
        log.last_turn = now;
        let period = self.period(now);
        let is_idle = period == Self::FAR && self.streams.load(Ordering::Relaxed) == 0;
        self.set_due(&mut log, now, if is_idle { NEVER } else { period });
        log.due
    }

    /// Runs a turn now.
    #[cfg(test)]
    pub(crate) fn turn_now(&self) {
        let now = self.clock.now();
        self.by_consumers.answer(now);
        self.by_rows.answer(now);
        self.turn(now);
    }

    fn period(&self, now: Nanos) -> Nanos {
        if self.is_alert(now) {
            Self::ALERT
        } else if now < self.watch_until.load(Ordering::Relaxed) {
            Self::WATCH
        } else {
            Self::FAR
        }
    }

    fn push_chore(&self, due: Nanos, chore: Weak<dyn Chore>) {
        let mut chores = lock(&self.chores);
        chores.push((due, chore));
        self.next_chore.fetch_min(due, Ordering::Relaxed);
    }

    fn do_chores(&self, now: Nanos) {
        if now < self.next_chore.load(Ordering::Relaxed) {
            return;
        }
        let mut chores = lock(&self.chores);
        let all = std::mem::take(&mut *chores);
        self.next_chore.store(NEVER, Ordering::Relaxed);
        drop(chores);
        let (due, later): (Vec<_>, Vec<_>) =
            all.into_iter().filter(|(_, chore)| chore.strong_count() > 0).partition(|(due, _)| *due <= now);
        for (due, chore) in later {
            self.push_chore(due, chore);
        }
        for (_, chore) in due {
            if let Some(after) = chore.upgrade().and_then(|chore| chore.run()) {
                let after = u64::try_from(after.as_nanos()).unwrap_or(NEVER);
                self.push_chore(now.saturating_add(after), chore);
            }
        }
    }
}

/// The main task, which runs on the watched runtime.
struct Task(Arc<Watchdog>);

impl Task {
    async fn run(self) {
        let watchdog = &self.0;
        let bell = &watchdog.by_consumers;
        loop {
            let now = watchdog.clock.now();
            let again = bell.answer(now);
            let due = watchdog.turn(now);
            watchdog.do_chores(now);
            if again {
                to_the_end_of_the_run_queue().await;
            } else if due == NEVER {
                bell.wake.notified().await;
            } else {
                let left = Duration::from_nanos(due.saturating_sub(now));
                tokio::select! {
                    () = sleep(left) => {}
                    () = bell.wake.notified() => {}
                }
            }
        }
    }
}

impl Watchdog {
    /// Serves the turns that rows ask for, in a second task, so that they do not wait for those of consumers.
    async fn answer_rows(&self) {
        loop {
            self.by_rows.wake.notified().await;
            while self.by_rows.answer(self.clock.now()) {
                to_the_end_of_the_run_queue().await;
            }
        }
    }
}

/// Yields to the end of the run queue. Unlike tokio's `yield_now`, it does not wait until the runtime has polled its
/// timers and sockets.
async fn to_the_end_of_the_run_queue() {
    let mut is_queued = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut is_queued, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.is_gone.store(true, Ordering::Relaxed);
        // A runtime that is gone cannot be late.
        lock(&self.0.log).due = NEVER;
        self.0.overdue_at.store(NEVER, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watchdog").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts its runs.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Chore for Count {
        fn run(&self) -> Option<Duration> {
            self.0.fetch_add(1, Ordering::Relaxed);
            None
        }
    }

    #[test]
    fn a_chore_that_is_added_while_others_are_done_is_not_forgotten() {
        const ROUNDS: usize = 20_000;
        let watchdog = Watchdog::new(Clock::start(), false);
        let count = Arc::new(Count::default());
        let chore: Weak<dyn Chore> = Arc::<Count>::downgrade(&count);
        let done = || count.0.load(Ordering::Relaxed);
        let start = std::time::Instant::now();
        let wait_for = |runs| {
            while done() < runs && start.elapsed() < Duration::from_secs(20) {
                std::thread::yield_now();
            }
        };
        // Two that add one each, and wait until both are done.
        let add = || {
            for round in 1..=ROUNDS {
                watchdog.push_chore(1, Weak::clone(&chore));
                wait_for(2 * round);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(add);
            scope.spawn(add);
            while done() < 2 * ROUNDS && start.elapsed() < Duration::from_secs(20) {
                watchdog.do_chores(1);
                std::thread::yield_now();
            }
        });
        assert_eq!(done(), 2 * ROUNDS);
    }
}
