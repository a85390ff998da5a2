//! `Clock`: the time since a stream was started.

use std::time::Instant;

#[cfg(test)]
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::{AtomicU64, Ordering};

/// A number of nanoseconds: a duration, or a moment as the time since a clock was started.
pub(crate) type Nanos = u64;

/// A clock that starts at zero.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    Monotonic(Instant),
    /// Moved by a test, so that its sums are exact to the nanosecond.
    #[cfg(test)]
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// Starts a clock.
    pub(crate) fn start() -> Self {
        Self::Monotonic(Instant::now())
    }

    /// Returns the time since the clock was started.
    pub(crate) fn now(&self) -> Nanos {
        match self {
            // A u64 of nanoseconds lasts for 584 years.
            Self::Monotonic(start) => {
                let elapsed = start.elapsed();
                elapsed.as_secs() * 1_000_000_000 + u64::from(elapsed.subsec_nanos())
            }
            #[cfg(test)]
            Self::Manual(now) => now.load(Ordering::Relaxed),
        }
    }

    /// Returns the time on `earlier` at which this clock was started, or 0 if this clock is the older one.
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

/// Returns a clock that shows the value of the returned atomic.
#[cfg(test)]
pub(crate) fn manual() -> (Clock, Arc<AtomicU64>) {
    let now = Arc::new(AtomicU64::new(0));
    (Clock::Manual(Arc::clone(&now)), now)
}
