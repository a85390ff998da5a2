//! `--pause-ms`.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Sleeps of the right length on average: the timer has a grain of 1 ms, so what one sleep takes too long is
/// taken off the next ones.
pub(crate) struct Pause {
    each: f64,
    /// Seconds still to be slept; below 0 what was slept too long.
    owed: f64,
}

impl Pause {
    /// A machine that stood still for longer than this is not a sleep to make up for.
    const MOST_AHEAD: f64 = 0.1;

    pub(crate) fn new(each: Duration) -> Self {
        Self { each: each.as_secs_f64(), owed: 0.0 }
    }

    pub(crate) async fn take(&mut self) {
        self.owed += self.each;
        if self.owed <= 0.0 {
            return;
        }
        let start = Instant::now();
        sleep(Duration::from_secs_f64(self.owed)).await;
        self.owed = (self.owed - start.elapsed().as_secs_f64()).max(-Self::MOST_AHEAD);
    }
}
