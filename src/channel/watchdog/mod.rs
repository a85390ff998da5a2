//! `Watchdog`: the evidence of whether an async runtime runs its tasks in time.
//!
//! Each runtime has one watchdog, which all of its streams share. Its main task sleeps on a timer; a turn that runs
//! late proves that the runtime was late. While a runtime is suspected to be late, or a consumer is slow, streams also
//! request turns at the moments that matter to them, so that the turn is queued right beside the consumer's task. A
//! second task runs the turns that are requested when rows arrive.

mod chores;
mod turns;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::{Handle, Id, RuntimeFlavor};
use tokio::time::sleep;

pub(crate) use self::chores::Chore;
use self::chores::Chores;
pub(crate) use self::turns::CATCH_UP;
use self::turns::{GRACE, Log, TurnRequests};
use super::clock::{Clock, Nanos};
use crate::sync::lock;

/// The watchdog of a runtime.
pub(crate) struct Watchdog {
    clock: Clock,
    /// Whether one thread runs all tasks, in the order in which they were woken.
    has_one_thread: bool,
    /// The time from which on a turn that has not run is late.
    overdue_at: AtomicU64,
    /// When the latest late turn ran.
    last_late: AtomicU64,
    /// Turns requested by consumers. They and those requested for rows have different places in the run queue.
    consumer_requests: TurnRequests,
    /// Turns requested when rows arrive.
    row_requests: TurnRequests,
    /// The timer is set near until then, because waits are long.
    watch_until: AtomicU64,
    /// The timer is set as near as possible until then, because the runtime was late.
    alert_until: AtomicU64,
    log: Mutex<Log>,
    /// The number of streams on the runtime.
    streams: AtomicUsize,
    chores: Chores,
    /// Whether the main task was dropped, and with it its runtime.
    is_gone: AtomicBool,
}

const MS: Nanos = 1_000_000;
const NEVER: Nanos = Nanos::MAX;

impl Watchdog {
    /// A timer that is due soon costs a fast stream a few percent of its CPU, because it is passed to the kernel each
    /// time a thread goes to sleep. So it is set near only if waits are long, and nearest if the runtime was late.
    const IDLE_PERIOD: Nanos = 250 * MS;
    const WATCH_PERIOD: Nanos = 10 * MS;
    const ALERT_PERIOD: Nanos = 2 * MS;
    /// How long a runtime that was late is suspected to be late again.
    const SUSPICION: Nanos = 250 * MS;
    /// A wait of this length is likely to be followed by others, for eight times its length and at most a second.
    const LONG_WAIT: Nanos = 2 * MS;
    const LONGEST_WATCH: Nanos = 1_000 * MS;
    /// A delay of this length is not caused by the operating system.
    const SURELY_LATE: Nanos = 10 * MS;

    /// Returns the watchdog of a runtime. Starts it if the runtime has none.
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
        runtime.spawn(MainTask(Arc::clone(&watchdog)).run());
        let row_task = Arc::clone(&watchdog);
        runtime.spawn(async move { row_task.serve_row_requests().await });
        watchdog
    }

    /// Creates a watchdog without its tasks.
    pub(crate) fn new(clock: Clock, has_one_thread: bool) -> Self {
        Self {
            clock,
            has_one_thread,
            overdue_at: AtomicU64::new(NEVER),
            last_late: AtomicU64::new(0),
            consumer_requests: TurnRequests::default(),
            row_requests: TurnRequests::default(),
            watch_until: AtomicU64::new(0),
            alert_until: AtomicU64::new(0),
            log: Mutex::default(),
            streams: AtomicUsize::new(0),
            chores: Chores::new(),
            is_gone: AtomicBool::new(false),
        }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Returns whether the runtime is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }

    /// Records that a stream begins. Its first waits may be long.
    pub(crate) fn stream_begins(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        if let Some(now) = self.watch(2 * Self::WATCH_PERIOD) {
            // The turn that sets the timer is due at once: if it does not run, the runtime is late already.
            let mut log = lock(&self.log);
            self.set_due(&mut log, now, Self::ALERT_PERIOD);
        }
    }

    /// Records that a stream ends.
    pub(crate) fn stream_ends(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// Records that a stream waited for `waited`.
    pub(crate) fn record_wait(&self, waited: Nanos) {
        if waited >= Self::LONG_WAIT {
            let _ = self.watch(waited.saturating_mul(8).min(Self::LONGEST_WATCH));
        }
    }

    /// Keeps the timer near for `span`. Returns the current time if the main task had to be woken for that.
    fn watch(&self, span: Nanos) -> Option<Nanos> {
        let now = self.clock.now();
        let until = self.watch_until.load(Ordering::Relaxed);
        // Extended only when half of the span is over, so that not every short stream writes here.
        let wakes =
            until < now + span / 2 && self.watch_until.fetch_max(now + span, Ordering::Relaxed) <= now;
        wakes.then(|| {
            self.consumer_requests.notify.notify_one();
            now
        })
    }

    fn set_due(&self, log: &mut Log, now: Nanos, period: Nanos) {
        log.due = now.saturating_add(period);
        log.late_from = now.max(log.due.saturating_sub(Self::ALERT_PERIOD));
        self.overdue_at.store(log.due.saturating_add(GRACE), Ordering::Relaxed);
    }

    /// Adds a chore that is first due in `Self::WATCH_PERIOD`.
    pub(crate) fn add_chore(&self, chore: Weak<dyn Chore>) {
        self.chores.push(self.clock.now() + Self::WATCH_PERIOD, chore);
    }

    /// Returns whether the runtime was late a moment ago.
    pub(crate) fn is_alert(&self, now: Nanos) -> bool {
        now < self.alert_until.load(Ordering::Relaxed)
    }

    /// Requests a turn that is queued behind the consumer that runs now.
    pub(crate) fn request_turn(&self, now: Nanos) {
        self.consumer_requests.request(now);
    }

    /// Requests a turn that is queued just before a consumer that is woken next.
    pub(crate) fn request_turn_for_rows(&self, now: Nanos) {
        self.row_requests.request(now);
    }

    /// Returns for how long the runtime is known to have been late between two moments.
    pub(crate) fn late_between(&self, from: Nanos, to: Nanos) -> Nanos {
        if to <= self.overdue_at.load(Ordering::Relaxed) && self.last_late.load(Ordering::Relaxed) <= from {
            return 0;
        }
        lock(&self.log).late_between(from, to)
    }

    /// Returns for how long the runtime was late without interruption at the end of the interval from `from` to `to`.
    pub(crate) fn late_up_to(&self, from: Nanos, to: Nanos) -> Nanos {
        if to <= self.overdue_at.load(Ordering::Relaxed) && self.last_late.load(Ordering::Relaxed) <= from {
            return 0;
        }
        lock(&self.log).late_up_to(from, to)
    }

    /// Returns whether one thread runs all tasks, in the order in which they were woken.
    pub(crate) fn has_one_thread(&self) -> bool {
        self.has_one_thread
    }

    /// Returns the moment from which the runtime counts as late, if a turn is overdue at `now`.
    pub(crate) fn overdue_since(&self, now: Nanos) -> Option<Nanos> {
        if now <= self.overdue_at.load(Ordering::Relaxed) {
            return None;
        }
        let log = lock(&self.log);
        log.is_overdue(now).then_some(log.late_from)
    }

    /// Returns when the first turn after `moment` ran.
    pub(crate) fn first_turn_after(&self, moment: Nanos) -> Option<Nanos> {
        // A turn that was not requested is not listed. In that case it was the last one.
        let last = Some(lock(&self.log).last_turn).filter(|ran| *ran > moment);
        self.consumer_requests.first_turn(|turn| turn.ran > moment).or(last)
    }

    /// Returns when the first turn ran that was requested for rows at `moment` or later.
    pub(crate) fn first_turn_for_rows(&self, moment: Nanos) -> Option<Nanos> {
        self.row_requests.first_turn(|turn| turn.queued >= moment)
    }

    /// Records a turn of the main task. Returns when the next is due, or `NEVER` if there is no stream to watch.
    fn record_turn(&self, now: Nanos) -> Nanos {
        let mut log = lock(&self.log);
        if log.is_overdue(now) {
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
        let is_idle = period == Self::IDLE_PERIOD && self.streams.load(Ordering::Relaxed) == 0;
        self.set_due(&mut log, now, if is_idle { NEVER } else { period });
        log.due
    }

    /// Runs a turn now.
    #[cfg(test)]
    pub(crate) fn turn_now(&self) {
        let now = self.clock.now();
        self.consumer_requests.serve(now);
        self.row_requests.serve(now);
        self.record_turn(now);
    }

    fn period(&self, now: Nanos) -> Nanos {
        if self.is_alert(now) {
            Self::ALERT_PERIOD
        } else if now < self.watch_until.load(Ordering::Relaxed) {
            Self::WATCH_PERIOD
        } else {
            Self::IDLE_PERIOD
        }
    }

    /// Runs the turns that are requested for rows. This is a second task, so that they do not wait for the turns of
    /// consumers.
    async fn serve_row_requests(&self) {
        loop {
            self.row_requests.notify.notified().await;
            while self.row_requests.serve(self.clock.now()) {
                move_to_back_of_run_queue().await;
            }
        }
    }
}

impl std::fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watchdog").finish_non_exhaustive()
    }
}

/// The main task, which runs on the watched runtime.
struct MainTask(Arc<Watchdog>);

impl MainTask {
    async fn run(self) {
        let watchdog = &self.0;
        let requests = &watchdog.consumer_requests;
        loop {
            let now = watchdog.clock.now();
            let is_requested_again = requests.serve(now);
            let due = watchdog.record_turn(now);
            watchdog.chores.run_due(now);
            if is_requested_again {
                move_to_back_of_run_queue().await;
            } else if due == NEVER {
                requests.notify.notified().await;
            } else {
                let left = Duration::from_nanos(due.saturating_sub(now));
                tokio::select! {
                    () = sleep(left) => {}
                    () = requests.notify.notified() => {}
                }
            }
        }
    }
}

impl Drop for MainTask {
    fn drop(&mut self) {
        self.0.is_gone.store(true, Ordering::Relaxed);
        // A runtime that is gone cannot be late.
        lock(&self.0.log).due = NEVER;
        self.0.overdue_at.store(NEVER, Ordering::Relaxed);
    }
}

/// Yields the thread until all tasks that are queued now have run. Unlike tokio's `yield_now`, this does not wait until
/// the runtime has polled its timers and sockets.
async fn move_to_back_of_run_queue() {
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
