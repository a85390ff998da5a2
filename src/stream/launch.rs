//! `Launch`: the work that produces a stream's rows, run by the consumer's own polls until it pays to spawn a task.
//!
//! A short result arrives with the first answer of Postgres. It needs no task, and no row changes threads, because the
//! consumer, which has to wait anyway, reads it itself. Work that takes longer, or needs timers or sockets, moves into
//! a task.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;

use crate::channel::{Chore, Watchdog};
use crate::sync::lock;
use crate::telemetry::Heartbeat;

/// The future that produces the rows of a stream.
pub(crate) type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The work of one stream. If it is dropped before the work is done, the work, including the clean-up, completes in a
/// task.
#[derive(Debug)]
pub(crate) struct Launch(Arc<Inner>);

struct Inner {
    runtime: Handle,
    watchdog: Arc<Watchdog>,
    handover: Handover,
    /// `None` once the work has moved into a task or is done.
    work: Mutex<Option<Work>>,
    heartbeat: Heartbeat,
    /// Set once the chore has run.
    has_run: AtomicBool,
}

impl Launch {
    /// Prepares the launch of work, which starts with the first poll.
    pub(crate) fn new(
        runtime: Handle,
        watchdog: Arc<Watchdog>,
        (work, handover): (Work, Handover),
        heartbeat: Heartbeat,
    ) -> Self {
        watchdog.stream_begins();
        let work = Mutex::new(Some(work));
        let inner =
            Arc::new(Inner { runtime, watchdog, handover, work, heartbeat, has_run: AtomicBool::new(false) });
        let chore: Weak<dyn Chore> = Arc::<Inner>::downgrade(&inner);
        inner.watchdog.add_chore(chore);
        Self(inner)
    }

    /// Polls the work, and moves it into a task if it has requested one. Returns whether it still depends on the
    /// caller's polls.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> bool {
        let inner = &self.0;
        let mut slot = lock(&inner.work);
        let Some(work) = slot.as_mut() else { return false };
        if work.as_mut().poll(cx).is_ready() {
            *slot = None;
        } else if inner.handover.is_requested() {
            inner.spawn(slot.take());
        }
        slot.is_some()
    }

    /// Moves the work into a task.
    pub(crate) fn hand_over(&self) {
        let work = lock(&self.0.work).take();
        self.0.spawn(work);
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        self.hand_over();
        self.0.watchdog.stream_ends();
    }
}

impl Inner {
    fn spawn(&self, work: Option<Work>) {
        if let Some(work) = work {
            self.handover.0.store(IN_TASK, Ordering::Relaxed);
            self.runtime.spawn(work);
        }
    }
}

impl Chore for Inner {
    /// Moves the work into a task the first time, because its consumer has been waiting for long or is busy elsewhere.
    /// Logs the heartbeat after that.
    fn run(&self) -> Option<Duration> {
        if self.has_run.swap(true, Ordering::Relaxed) {
            self.heartbeat.log();
            return Some(Heartbeat::EVERY);
        }
        // If the lock is held, the work is being polled at this moment, so try again soon.
        if let Ok(mut slot) = self.work.try_lock() {
            let work = slot.take();
            drop(slot);
            self.spawn(work);
        } else {
            self.has_run.store(false, Ordering::Relaxed);
            return Some(Duration::ZERO);
        }
        Some(Heartbeat::EVERY)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("handover", &self.handover).finish_non_exhaustive()
    }
}

/// Records where the work runs. Shared with the work itself, which requests a task when it needs one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Handover(Arc<AtomicU8>);

const BY_POLLS: u8 = 0;
const REQUESTED: u8 = 1;
const IN_TASK: u8 = 2;

impl Handover {
    /// Waits until the work runs in a task, where it can use timers and sockets and does not depend on the consumer's
    /// polls.
    pub(crate) async fn ensure_task(&self) {
        std::future::poll_fn(|_| {
            let state = self.0.compare_exchange(BY_POLLS, REQUESTED, Ordering::Relaxed, Ordering::Relaxed);
            if state == Err(IN_TASK) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Returns whether the work runs in a task.
    pub(crate) fn is_in_task(&self) -> bool {
        self.0.load(Ordering::Relaxed) == IN_TASK
    }

    /// Returns whether the work has requested a task.
    fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed) == REQUESTED
    }

    /// Creates the handover of work that runs in a task already.
    #[cfg(test)]
    pub(crate) fn in_task() -> Self {
        Self(Arc::new(AtomicU8::new(IN_TASK)))
    }
}
