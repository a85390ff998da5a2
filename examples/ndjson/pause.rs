//! The sleep after each row (`--pause-ms`).

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Sleeps that have the requested length on average. The timer's resolution is 1 ms, so the excess of one sleep is
/// subtracted from the next ones.
pub(crate) struct Pause {
    length: f64,
    /// Seconds still to sleep; negative after sleeping too long.
    owed: f64,
}

impl Pause {
    /// Limits the excess carried over: a machine that was suspended must not cancel all further sleeps.
    const MAX_EXCESS: f64 = 0.1;

    pub(crate) fn new(length: Duration) -> Self {
        Self { length: length.as_secs_f64(), owed: 0.0 }
    }

    pub(crate) async fn sleep(&mut self) {
        self.owed += self.length;
        if self.owed <= 0.0 {
            return;
        }
        let start = Instant::now();
        sleep(Duration::from_secs_f64(self.owed)).await;
        self.owed = (self.owed - start.elapsed().as_secs_f64()).max(-Self::MAX_EXCESS);
    }
}
