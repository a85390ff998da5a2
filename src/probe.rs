//! `Probe`: tells a starved runtime from a slow source.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use crate::channel::Witness;
use crate::time::Nanos;

/// A timer in a task of its own beside each stream. A runtime that cannot run it in time is starved, and what
/// the stream waits meanwhile is not the source's doing - whatever the stream's own task is busy with.
///
/// A timer that is due soon costs a tenth of the CPU of a fast stream: the kernel is told of it each time a
/// thread goes to sleep. So it is near only where waits are long, which is where it is of use.
#[derive(Debug)]
pub(crate) struct Probe {
    witness: Witness,
    /// Up to here waits are likely to be long.
    alert: AtomicU64,
    hurry: Notify,
}

impl Probe {
    const NEAR: Duration = Duration::from_millis(2);
    const FAR: Duration = Duration::from_millis(250);
    /// A wait that was long enough for the near timer is likely to be followed by such, for so many times its
    /// length and for a second at most.
    const ALERT: Nanos = 8;
    const LONGEST_ALERT: Nanos = 1_000_000_000;

    pub(crate) fn new(witness: Witness) -> Arc<Self> {
        // Nothing is known of the first waits.
        let alert = AtomicU64::new(nanos(Self::NEAR));
        Arc::new(Self { witness, alert, hurry: Notify::new() })
    }

    /// Rows came at `now` after a wait since `polled`.
    pub(crate) fn rows_came(&self, polled: Nanos, now: Nanos) {
        let waited = now.saturating_sub(polled);
        if waited < nanos(Self::NEAR) {
            return;
        }
        let until = now.saturating_add(waited.saturating_mul(Self::ALERT).min(Self::LONGEST_ALERT));
        if self.alert.swap(until, Ordering::Relaxed) <= now {
            self.hurry.notify_one();
        }
    }

    /// The task; the stream's end is its own.
    pub(crate) async fn run(self: Arc<Self>) {
        loop {
            let period = self.period(self.witness.now());
            self.witness.expect_timer(nanos(period));
            tokio::select! {
                () = sleep(period) => {}
                () = self.hurry.notified() => {}
            }
        }
    }

    fn period(&self, now: Nanos) -> Duration {
        if now < self.alert.load(Ordering::Relaxed) { Self::NEAR } else { Self::FAR }
    }
}

fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::bounded;
    use crate::config::Limits;
    use crate::time::Clock;

    const MS: Nanos = 1_000_000;

    #[test]
    fn the_timer_is_near_only_while_waits_are_long() {
        let limits = Limits { rows: 1, bytes: 1, chunk_rows: 1, chunk_bytes: 1 };
        let (_sender, receiver) = bounded(limits, Clock::start());
        let probe = Probe::new(receiver.witness());
        assert_eq!(probe.period(MS), Probe::NEAR, "nothing is known yet");
        probe.rows_came(0, MS);
        assert_eq!(probe.period(20 * MS), Probe::FAR, "a wait of 1 ms");
        probe.rows_came(20 * MS, 25 * MS);
        assert_eq!((probe.period(64 * MS), probe.period(65 * MS)), (Probe::NEAR, Probe::FAR), "one of 5 ms");
        probe.rows_came(0, 3_600_000 * MS);
        assert_eq!(probe.period(3_601_001 * MS), Probe::FAR, "one of an hour");
    }
}
