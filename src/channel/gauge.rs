//! What a channel tells of itself without being locked.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::clock::Nanos;
use super::ledger::{Ledger, Times};

/// Written under the channel's lock; read by whoever looks, who never waits.
#[derive(Debug)]
pub(crate) struct Gauge {
    pub(crate) row_limit: usize,
    pub(crate) byte_limit: usize,
    pub(super) ledger: Ledger,
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

    /// Returns the age of the stream.
    pub(crate) fn now(&self) -> Nanos {
        self.ledger.now()
    }

    /// Returns where the time went without a delay that cannot be attributed yet, so that nothing has to be taken back.
    pub(crate) fn settled_times(&self) -> Times {
        self.ledger.read_settled()
    }

    /// Returns the time spent decoding.
    pub(crate) fn decode_time(&self) -> Nanos {
        self.ledger.read_decode()
    }

    /// Counts `spent` as decoding.
    pub(crate) fn record_decode(&self, spent: Nanos) {
        self.ledger.decoded(spent);
    }

    /// Records that the consumer waited for `waited`.
    pub(crate) fn record_wait(&self, waited: Nanos) {
        self.ledger.watchdog().record_wait(waited);
    }

    /// Rows that wait in the channel.
    pub(crate) fn rows(&self) -> usize {
        self.rows.load(Ordering::Relaxed)
    }

    /// Payload bytes that wait in the channel.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The most payload bytes that ever waited at once.
    pub(crate) fn peak_bytes(&self) -> usize {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Payload bytes that ever came into the channel.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// The channel holds this much now.
    pub(crate) fn hold(&self, rows: usize, bytes: usize) {
        self.rows.store(rows, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.peak_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    /// So much came in.
    pub(crate) fn received(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
