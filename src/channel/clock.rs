//! The clock of a stream.

use std::time::Instant;

#[cfg(test)]
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::{AtomicU64, Ordering};

/// Nanoseconds since the stream began.
pub(crate) type Nanos = u64;

/// Tells a stream's age.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    Monotonic(Instant),
    /// Moved by hand, so that tests can state sums to the nanosecond.
    #[cfg(test)]
    Manual(Arc<AtomicU64>),
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self::Monotonic(Instant::now())
    }

    pub(crate) fn now(&self) -> Nanos {
        match self {
            // 584 years fit into a u64 of nanoseconds.
            Self::Monotonic(start) => {
                let age = start.elapsed();
                age.as_secs() * 1_000_000_000 + u64::from(age.subsec_nanos())
            }
            #[cfg(test)]
            Self::Manual(now) => now.load(Ordering::Relaxed),
        }
    }

    /// How old `earlier` was when this clock was started.
    pub(crate) fn since(&self, earlier: &Self) -> Nanos {
        match (self, earlier) {
            (Self::Monotonic(start), Self::Monotonic(earlier)) => {
                u64::try_from(start.saturating_duration_since(*earlier).as_nanos()).unwrap_or(Nanos::MAX)
            }
            #[cfg(test)]
            _ => 0,
        }
    }
}

#[cfg(test)]
pub(crate) fn manual() -> (Clock, Arc<AtomicU64>) {
    let hand = Arc::new(AtomicU64::new(0));
    (Clock::Manual(Arc::clone(&hand)), hand)
}
