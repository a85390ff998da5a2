//! `Chores`: work that a watchdog does for its streams from time to time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Weak};
use std::time::Duration;

use super::NEVER;
use crate::channel::clock::Nanos;
use crate::sync::lock;

/// Work for a stream that is repeated from time to time, at times that need not be exact.
pub(crate) trait Chore: Send + Sync {
    /// Does the work. Returns the time after which to do it again, or `None` if it is done.
    fn run(&self) -> Option<Duration>;
}

/// The chores of all streams of a runtime. A chore whose owner was dropped is removed.
pub(super) struct Chores {
    queued: Mutex<Vec<QueuedChore>>,
    /// No chore is due before then. Changes only under the lock of `queued`.
    next_due: AtomicU64,
}

struct QueuedChore {
    due: Nanos,
    chore: Weak<dyn Chore>,
}

impl Chores {
    pub(super) fn new() -> Self {
        Self { queued: Mutex::default(), next_due: AtomicU64::new(NEVER) }
    }

    /// Adds a chore that is due at `due`.
    pub(super) fn push(&self, due: Nanos, chore: Weak<dyn Chore>) {
        let mut queued = lock(&self.queued);
        queued.push(QueuedChore { due, chore });
        self.next_due.fetch_min(due, Ordering::Relaxed);
    }

    /// Runs the chores that are due at `now`.
    pub(super) fn run_due(&self, now: Nanos) {
        if now < self.next_due.load(Ordering::Relaxed) {
            return;
        }
        let mut queued = lock(&self.queued);
        let all = std::mem::take(&mut *queued);
        self.next_due.store(NEVER, Ordering::Relaxed);
        drop(queued);
        let (due, later): (Vec<_>, Vec<_>) = all
            .into_iter()
            .filter(|queued| queued.chore.strong_count() > 0)
            .partition(|queued| queued.due <= now);
        for queued in later {
            self.push(queued.due, queued.chore);
        }
        for QueuedChore { chore, .. } in due {
            if let Some(after) = chore.upgrade().and_then(|chore| chore.run()) {
                let after = u64::try_from(after.as_nanos()).unwrap_or(NEVER);
                self.push(now.saturating_add(after), chore);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::time::Instant;

    use super::*;

    /// Counts its runs.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Chore for Counter {
        fn run(&self) -> Option<Duration> {
            self.0.fetch_add(1, Ordering::Relaxed);
            None
        }
    }

    #[test]
    fn a_chore_that_is_added_while_others_run_is_not_lost() {
        const ROUNDS: usize = 20_000;
        let chores = Chores::new();
        let counter = Arc::new(Counter::default());
        let chore: Weak<dyn Chore> = Arc::<Counter>::downgrade(&counter);
        let runs = || counter.0.load(Ordering::Relaxed);
        let start = Instant::now();
        let is_waiting_for = |expected| runs() < expected && start.elapsed() < Duration::from_secs(20);
        let wait_for = |expected| {
            while is_waiting_for(expected) {
                std::thread::yield_now();
            }
        };
        // In each round, two threads add a chore each and wait until both have run.
        let add = || {
            for round in 1..=ROUNDS {
                chores.push(1, Weak::clone(&chore));
                wait_for(2 * round);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(add);
            scope.spawn(add);
            while is_waiting_for(2 * ROUNDS) {
                chores.run_due(1);
                std::thread::yield_now();
            }
        });
        assert_eq!(runs(), 2 * ROUNDS);
    }
}
