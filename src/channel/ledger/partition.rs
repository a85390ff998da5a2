//! `Partition`: a lifetime divided into states, and `Window`: the sums of a partition over the last seconds.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::channel::clock::Nanos;

/// A lifetime divided into `N` states.
#[derive(Debug)]
pub(crate) struct Partition<const N: usize> {
    /// The time in each state, without the time since `since`.
    sums: [AtomicU64; N],
    /// The current state; `ENDED` once the lifetime is over.
    state: AtomicUsize,
    /// When the current state was entered.
    since: AtomicU64,
}

/// The state after the end of a lifetime. It has no sum.
pub(crate) const ENDED: usize = usize::MAX;

impl<const N: usize> Partition<N> {
    pub(crate) fn new(state: usize) -> Self {
        Self {
            sums: [const { AtomicU64::new(0) }; N],
            state: AtomicUsize::new(state),
            since: AtomicU64::new(0),
        }
    }

    /// Enters `state` and adds `parts`, the time in the previous state, to the sums. Does nothing once the lifetime is
    /// over.
    pub(crate) fn enter(&self, state: usize, now: Nanos, parts: [Nanos; N]) {
        if self.is(ENDED) {
            return;
        }
        self.sums.iter().zip(parts).for_each(|(sum, part)| add(sum, part));
        self.since.store(now.max(self.since()), Ordering::Relaxed);
        self.state.store(state, Ordering::Relaxed);
    }

    pub(crate) fn is(&self, state: usize) -> bool {
        self.state.load(Ordering::Relaxed) == state
    }

    pub(crate) fn state(&self) -> usize {
        self.state.load(Ordering::Relaxed)
    }

    pub(crate) fn since(&self) -> Nanos {
        self.since.load(Ordering::Relaxed)
    }

    /// Returns the time in the current state up to `now`, all of it attributed to that state.
    pub(crate) fn current_parts(&self, now: Nanos) -> [Nanos; N] {
        let mut parts = [0; N];
        if let Some(part) = parts.get_mut(self.state.load(Ordering::Relaxed)) {
            *part = now.saturating_sub(self.since());
        }
        parts
    }

    /// Returns the sums, with the time in the current state attributed as `current` says.
    pub(crate) fn read(&self, current: [Nanos; N]) -> [Nanos; N] {
        std::array::from_fn(|i| self.sums[i].load(Ordering::Relaxed) + current[i])
    }

    /// Moves `time` from the sum of one state to another, or the whole sum if it is smaller.
    pub(crate) fn shift(&self, from: usize, to: usize, time: Nanos) {
        let sum = self.sums[from].load(Ordering::Relaxed);
        let moved = time.min(sum);
        self.sums[from].store(sum - moved, Ordering::Relaxed);
        add(&self.sums[to], moved);
    }
}

/// Adds to a counter that has one writer at a time. This is cheaper than an atomic addition.
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(value), Ordering::Relaxed);
}

/// The sums of a partition at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums<const N: usize> {
    pub(crate) at: Nanos,
    pub(crate) sums: [Nanos; N],
}

/// The sums of a partition at about each of the last seconds.
#[derive(Debug)]
pub(crate) struct Window<const N: usize> {
    marks: [Mark<N>; MARKS],
    /// The number of marks written so far. The latest is at this index, modulo `MARKS`.
    marked: AtomicUsize,
}

/// The sums at the moment `at`.
#[derive(Debug)]
struct Mark<const N: usize> {
    at: AtomicU64,
    sums: [AtomicU64; N],
}

/// The length of the sliding window.
const WINDOW: Nanos = 10_000_000_000;
const MARK_EVERY: Nanos = 1_000_000_000;
/// One more than the window has seconds, and one for the mark that is being written.
const MARKS: usize = 12;

impl<const N: usize> Window<N> {
    pub(crate) fn new() -> Self {
        let mark = |_| Mark { at: AtomicU64::new(0), sums: [const { AtomicU64::new(0) }; N] };
        Self { marks: std::array::from_fn(mark), marked: AtomicUsize::new(0) }
    }

    /// Writes a mark if the last one is at least a second old.
    pub(crate) fn mark(&self, partition: &Partition<N>, now: Nanos) {
        let marked = self.marked.load(Ordering::Relaxed);
        let last = self.marks[marked % MARKS].at.load(Ordering::Relaxed);
        if now.saturating_sub(last) < MARK_EVERY {
            return;
        }
        let mark = &self.marks[(marked + 1) % MARKS];
        mark.at.store(now, Ordering::Relaxed);
        for (slot, sum) in mark.sums.iter().zip(partition.read([0; N])) {
            slot.store(sum, Ordering::Relaxed);
        }
        self.marked.store(marked + 1, Ordering::Relaxed);
    }

    /// Returns the sums one window before `now`, interpolated between the two marks around that moment.
    pub(crate) fn start(&self, now: Sums<N>) -> Sums<N> {
        let then = now.at.saturating_sub(WINDOW);
        let mut after = now;
        let newest = self.marked.load(Ordering::Relaxed);
        let oldest = newest.saturating_sub(MARKS - 2);
        for index in (oldest..=newest).rev() {
            let mark = &self.marks[index % MARKS];
            let sums = std::array::from_fn(|i| mark.sums[i].load(Ordering::Relaxed));
            let before = Sums { at: mark.at.load(Ordering::Relaxed), sums };
            if before.at <= then {
                return between(&before, &after, then);
            }
            after = before;
        }
        after
    }
}

/// Interpolates the sums at `then`.
fn between<const N: usize>(before: &Sums<N>, after: &Sums<N>, then: Nanos) -> Sums<N> {
    let span = u128::from(after.at.saturating_sub(before.at).max(1));
    let part = u128::from(then.saturating_sub(before.at)).min(span);
    let sums = std::array::from_fn(|i| {
        let grown = u128::from(after.sums[i].saturating_sub(before.sums[i]));
        before.sums[i] + u64::try_from(grown * part / span).unwrap_or(u64::MAX)
    });
    Sums { at: then, sums }
}
