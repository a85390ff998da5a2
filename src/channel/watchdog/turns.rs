//! The turns of a watchdog, and what they prove: `Log`, which knows when turns were late, and `Bell`, by which turns
//! are asked for.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::channel::clock::Nanos;
use crate::sync::lock;

/// How late a timer may fire: its resolution is 1 ms.
pub(crate) const GRACE: Nanos = 3 * MS / 2;
/// A task that was kept from the thread catches up within this time.
pub(crate) const CATCH_UP: Nanos = 2 * MS;
pub(crate) const LOGGED: usize = 256;
pub(crate) const NEVER: Nanos = Nanos::MAX;
const MS: Nanos = 1_000_000;

/// The recent turns.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// When the next turn is due; 0 before the first.
    pub(crate) due: Nanos,
    /// The moment from which an overdue turn counts as late.
    pub(crate) late_from: Nanos,
    late: VecDeque<Late>,
    pub(crate) last_turn: Nanos,
}

/// A way to ask for a turn.
#[derive(Debug)]
pub(crate) struct Bell {
    /// When the turn that waits in the run queue was put there; `NEVER` if none waits.
    queued: AtomicU64,
    /// When a turn was last asked for.
    asked: AtomicU64,
    turns: Mutex<VecDeque<Turn>>,
    pub(crate) wake: Notify,
}

/// An interval in which the runtime was late for `total`.
#[derive(Clone, Copy, Debug)]
struct Late {
    from: Nanos,
    to: Nanos,
    total: Nanos,
}

/// A turn that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    pub(crate) queued: Nanos,
    pub(crate) ran: Nanos,
}

impl Log {
    pub(crate) fn is_late(&self, now: Nanos) -> bool {
        self.due != 0 && now > self.due.saturating_add(GRACE)
    }

    pub(crate) fn add_late(&mut self, now: Nanos) {
        let late = Late { from: self.late_from, to: now, total: now - self.late_from };
        if self.late.len() == LOGGED
            && let (Some(oldest), Some(next)) = (self.late.pop_front(), self.late.front_mut())
        {
            // A wait may be longer than the log. Merging the oldest entries makes them coarser but loses no time.
            (next.from, next.total) = (oldest.from, next.total + oldest.total);
        }
        self.late.push_back(late);
    }

    pub(crate) fn late_up_to(&self, from: Nanos, to: Nanos) -> Nanos {
        let mut start = if self.is_late(to) { self.late_from.max(from) } else { to };
        let mut late = to.saturating_sub(start);
        for interval in self.late.iter().rev() {
            if start <= from || interval.to + CATCH_UP < start {
                break;
            }
            late += interval.within(from, start);
            start = interval.from;
        }
        late
    }

    pub(crate) fn late_between(&self, from: Nanos, to: Nanos) -> Nanos {
        let logged = self.late.iter().rev().take_while(|late| late.to > from);
        let logged: Nanos = logged.map(|late| late.within(from, to)).sum();
        let running = if self.is_late(to) { to.saturating_sub(self.late_from.max(from)) } else { 0 };
        (logged + running).min(to.saturating_sub(from))
    }
}

impl Late {
    fn within(&self, from: Nanos, to: Nanos) -> Nanos {
        let covered = self.to.min(to).saturating_sub(self.from.max(from));
        let (covered, total) = (u128::from(covered), u128::from(self.total));
        let part = covered * total / u128::from(self.to.saturating_sub(self.from).max(1));
        u64::try_from(part).unwrap_or(NEVER)
    }
}

impl Default for Bell {
    fn default() -> Self {
        Self {
            queued: AtomicU64::new(NEVER),
            asked: AtomicU64::new(0),
            turns: Mutex::default(),
            wake: Notify::new(),
        }
    }
}

impl Bell {
    pub(crate) fn ring(&self, now: Nanos) {
        self.asked.store(now, Ordering::Relaxed);
        if self.queued.compare_exchange(NEVER, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.wake.notify_one();
        }
    }

    /// Records a turn, if one was asked for. Returns whether a further turn was asked for while this one waited: that
    /// one belongs at the end of the run queue, behind the consumer that it is about.
    pub(crate) fn answer(&self, now: Nanos) -> bool {
        let queued = self.queued.swap(NEVER, Ordering::Relaxed);
        if queued == NEVER {
            return false;
        }
        push(&mut lock(&self.turns), Turn { queued, ran: now }, LOGGED);
        let asked = self.asked.load(Ordering::Relaxed);
        let again = asked > queued;
        if again {
            self.queued.store(asked.max(now), Ordering::Relaxed);
        }
        again
    }

    pub(crate) fn first_turn(&self, is_after: impl Fn(&Turn) -> bool) -> Option<Nanos> {
        lock(&self.turns).iter().rev().take_while(|turn| is_after(turn)).last().map(|turn| turn.ran)
    }
}

fn push<T>(log: &mut VecDeque<T>, entry: T, most: usize) {
    if log.len() == most {
        log.pop_front();
    }
    log.push_back(entry);
}
