//! Counts what becomes of the spans, log records and data points of a signal.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// The least time between two reports of dropped spans or records.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// The numbers of one signal.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Those that wait for export.
    queued: AtomicUsize,
    pub(super) processed: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) exported: AtomicU64,
    pub(super) failed: AtomicU64,
    /// When drops were last reported, and how many there were.
    reported: Mutex<(Option<Instant>, u64)>,
}

impl Tally {
    /// Returns whether a queue of `most` has room for one more; counts it as queued or as dropped.
    pub(super) fn admit(&self, most: usize) -> bool {
        let has_room = self.queued.fetch_add(1, Relaxed) < most;
        if !has_room {
            self.queued.fetch_sub(1, Relaxed);
            self.dropped.fetch_add(1, Relaxed);
        }
        has_room
    }

    /// Counts a batch that leaves the queue.
    pub(super) fn take(&self, number: usize) {
        self.queued.fetch_sub(number, Relaxed);
        self.processed.fetch_add(number as u64, Relaxed);
    }

    pub(super) fn count_export(&self, number: usize, is_ok: bool) {
        let counter = if is_ok { &self.exported } else { &self.failed };
        counter.fetch_add(number as u64, Relaxed);
    }

    /// Returns the number of drops since the last report, unless there are none or it was less than a minute ago.
    pub(super) fn drops_to_report(&self, now: Instant) -> Option<u64> {
        let dropped = self.dropped.load(Relaxed);
        let mut reported = lock(&self.reported);
        let (last, before) = *reported;
        let is_due = last.is_none_or(|last| now.duration_since(last) >= REPORT_INTERVAL);
        (dropped > before && is_due).then(|| {
            *reported = (Some(now), dropped);
            dropped - before
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_reported_at_most_once_a_minute() {
        let (tally, start) = (Tally::default(), Instant::now());
        let drop_some = |number: u32| (0..number).for_each(|_| assert!(!tally.admit(0)));
        assert_eq!(tally.drops_to_report(start), None);
        drop_some(3);
        assert_eq!(tally.drops_to_report(start), Some(3));
        drop_some(2);
        assert_eq!(tally.drops_to_report(start + Duration::from_secs(59)), None);
        assert_eq!(tally.drops_to_report(start + Duration::from_secs(60)), Some(2));
        assert_eq!(tally.drops_to_report(start + Duration::from_secs(200)), None);
    }

    #[test]
    fn queue_has_room_again_once_a_batch_has_left_it() {
        let tally = Tally::default();
        assert!(tally.admit(2) && tally.admit(2) && !tally.admit(2));
        tally.take(2);
        assert!(tally.admit(2));
        assert_eq!((tally.processed.into_inner(), tally.dropped.into_inner()), (2, 1));
    }
}
