//! The turns of a watchdog, and what they prove: `Log` records when turns were late, and `TurnRequests` holds the turns
//! that streams request.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use super::{MS, NEVER};
use crate::channel::clock::Nanos;
use crate::sync::lock;

/// How late a timer may fire: its resolution is 1 ms.
pub(super) const GRACE: Nanos = 3 * MS / 2;
/// A task that was kept from the thread catches up within this time.
pub(crate) const CATCH_UP: Nanos = 2 * MS;
/// The maximum number of late intervals, and of requested turns, that are remembered.
const MAX_ENTRIES: usize = 256;

/// The recent turns of the main task.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// When the next turn is due; 0 before the first turn.
    pub(super) due: Nanos,
    /// The moment from which the runtime counts as late if the next turn is overdue.
    pub(super) late_from: Nanos,
    late: VecDeque<LateInterval>,
    pub(super) last_turn: Nanos,
}

/// An interval in which the runtime was late for `total`.
#[derive(Clone, Copy, Debug)]
struct LateInterval {
    from: Nanos,
    to: Nanos,
    total: Nanos,
}

/// Requests for turns at one place in the run queue, and when such turns ran.
#[derive(Debug)]
pub(super) struct TurnRequests {
    /// When the turn that waits in the run queue was put there; `NEVER` if none waits.
    queued: AtomicU64,
    last_request: AtomicU64,
    turns: Mutex<VecDeque<Turn>>,
    /// Wakes the task that runs the turns.
    pub(super) notify: Notify,
}

/// A turn that was requested.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub(super) queued: Nanos,
    pub(super) ran: Nanos,
}

impl Log {
    /// Returns whether a turn that has not run by `now` is overdue.
    pub(super) fn is_overdue(&self, now: Nanos) -> bool {
        self.due != 0 && now > self.due.saturating_add(GRACE)
    }

    /// Records that the turn that runs at `now` is late.
    pub(super) fn add_late(&mut self, now: Nanos) {
        let late = LateInterval { from: self.late_from, to: now, total: now - self.late_from };
        if self.late.len() == MAX_ENTRIES
            && let (Some(oldest), Some(next)) = (self.late.pop_front(), self.late.front_mut())
        {
            // A wait may be longer than the log. Merging the oldest entries makes them coarser but loses no time.
            (next.from, next.total) = (oldest.from, next.total + oldest.total);
        }
        self.late.push_back(late);
    }

    /// Returns for how long the runtime was late without interruption at the end of the interval from `from` to `to`.
    pub(super) fn late_up_to(&self, from: Nanos, to: Nanos) -> Nanos {
        let mut start = if self.is_overdue(to) { self.late_from.max(from) } else { to };
        let mut late = to.saturating_sub(start);
        for interval in self.late.iter().rev() {
            if start <= from || interval.to + CATCH_UP < start {
                break;
            }
            late += interval.late_between(from, start);
            start = interval.from;
        }
        late
    }

    /// Returns for how long the runtime was late between `from` and `to`.
    pub(super) fn late_between(&self, from: Nanos, to: Nanos) -> Nanos {
        let logged = self.late.iter().rev().take_while(|interval| interval.to > from);
        let logged: Nanos = logged.map(|interval| interval.late_between(from, to)).sum();
        let current = if self.is_overdue(to) { to.saturating_sub(self.late_from.max(from)) } else { 0 };
        (logged + current).min(to.saturating_sub(from))
    }
}

impl LateInterval {
    /// Returns the part of `total` between `from` and `to`, as if it were spread evenly over the interval.
    fn late_between(&self, from: Nanos, to: Nanos) -> Nanos {
        let covered = self.to.min(to).saturating_sub(self.from.max(from));
        let (covered, total) = (u128::from(covered), u128::from(self.total));
        let part = covered * total / u128::from(self.to.saturating_sub(self.from).max(1));
        u64::try_from(part).unwrap_or(NEVER)
    }
}

impl Default for TurnRequests {
    fn default() -> Self {
        Self {
            queued: AtomicU64::new(NEVER),
            last_request: AtomicU64::new(0),
            turns: Mutex::default(),
            notify: Notify::new(),
        }
    }
}

impl TurnRequests {
    /// Requests a turn. If one is queued already, another is queued after it has run.
    pub(super) fn request(&self, now: Nanos) {
        self.last_request.store(now, Ordering::Relaxed);
        if self.queued.compare_exchange(NEVER, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.notify.notify_one();
        }
    }

    /// Records a turn if one was requested. Returns whether a further turn was requested while this one waited. The
    /// further turn belongs at the back of the run queue, behind the consumer that it concerns.
    pub(super) fn serve(&self, now: Nanos) -> bool {
        let queued = self.queued.swap(NEVER, Ordering::Relaxed);
        if queued == NEVER {
            return false;
        }
        self.record(Turn { queued, ran: now });
        let last_request = self.last_request.load(Ordering::Relaxed);
        let is_requested_again = last_request > queued;
        if is_requested_again {
            self.queued.store(last_request.max(now), Ordering::Relaxed);
        }
        is_requested_again
    }

    fn record(&self, turn: Turn) {
        let mut turns = lock(&self.turns);
        if turns.len() == MAX_ENTRIES {
            turns.pop_front();
        }
        turns.push_back(turn);
    }

    /// Returns when the first of the latest turns ran that all satisfy `is_after`.
    pub(super) fn first_turn(&self, is_after: impl Fn(&Turn) -> bool) -> Option<Nanos> {
        lock(&self.turns).iter().rev().take_while(|turn| is_after(turn)).last().map(|turn| turn.ran)
    }
}
