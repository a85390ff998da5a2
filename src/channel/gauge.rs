//! `Gauge`: the levels and times of a channel, which are read without its lock.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::clock::Nanos;
use super::ledger::{Ledger, Times};

/// The levels and times of a channel. Written under the channel's lock; reading takes no lock and never waits.
#[derive(Debug)]
pub(crate) struct Gauge {
    pub(crate) row_limit: usize,
    pub(crate) byte_limit: usize,
    ledger: Ledger,
    rows: AtomicUsize,
    bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
    received_bytes: AtomicU64,
}

impl Gauge {
    pub(super) fn new(row_limit: usize, byte_limit: usize, ledger: Ledger) -> Self {
        Self {
            row_limit,
            byte_limit,
            ledger,
            rows: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            peak_bytes: AtomicUsize::new(0),
            received_bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Returns whether the stream has ended.
    pub(super) fn is_ended(&self) -> bool {
        self.ledger.is_ended()
    }

    /// Returns the times up to now.
    pub(super) fn times(&self) -> Times {
        self.ledger.read()
    }

    /// Returns the times of the consumer since the start of the sliding window.
    pub(super) fn recent_times(&self, now: &Times) -> Times {
        let then = self.ledger.read_window_start();
        Times { consumer: std::array::from_fn(|i| now.consumer[i].saturating_sub(then[i])), ..*now }
    }

    /// Returns the time since the stream was started.
    pub(crate) fn now(&self) -> Nanos {
        self.ledger.now()
    }

    /// Returns the times without a delay that cannot be attributed yet, so that no sum ever decreases.
    pub(crate) fn settled_times(&self) -> Times {
        self.ledger.read_settled()
    }

    /// Returns the time spent decoding.
    pub(crate) fn decode_time(&self) -> Nanos {
        self.ledger.read_decode()
    }

    /// Adds `spent` to the time spent decoding.
    pub(crate) fn record_decode(&self, spent: Nanos) {
        self.ledger.record_decode(spent);
    }

    /// Records that the consumer waited for rows for `waited`.
    pub(crate) fn record_wait(&self, waited: Nanos) {
        self.ledger.watchdog().record_wait(waited);
    }

    /// Returns the number of rows that wait in the channel.
    pub(crate) fn rows(&self) -> usize {
        self.rows.load(Ordering::Relaxed)
    }

    /// Returns the number of payload bytes that wait in the channel.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns the highest number of payload bytes that ever waited at once.
    pub(crate) fn peak_bytes(&self) -> usize {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Returns the number of payload bytes sent into the channel so far.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// Records what waits in the channel now.
    pub(super) fn set_level(&self, rows: usize, bytes: usize) {
        self.rows.store(rows, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.peak_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    /// Adds `bytes` to the payload bytes sent into the channel.
    pub(super) fn count_received(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
