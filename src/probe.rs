//! `RuntimeProbe`: tells a starved runtime from a slow source.

use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::channel::Receiver;
use crate::time::Nanos;

/// A timer that runs beside each wait for rows. A runtime that cannot even fire it in time is starved, and
/// the wait is not the source's doing.
///
/// A timer that is due soon costs a tenth of the CPU of a fast stream: the kernel is told of it each time a
/// thread goes to sleep. So it is near only where waits are long, which is where it is of use.
pub(crate) struct RuntimeProbe {
    // Made within the runtime, so that the stream may be polled from anywhere.
    timer: Pin<Box<Sleep>>,
    period: Duration,
    armed: bool,
    /// Up to here waits are likely to be long.
    alert: Nanos,
}

impl RuntimeProbe {
    const NEAR: Duration = Duration::from_millis(2);
    const FAR: Duration = Duration::from_millis(100);
    const LAST: Duration = Duration::from_secs(1);
    /// After a wait that was long enough for the near timer, it is set for as many times its length.
    const ALERT: Nanos = 8;

    pub(crate) fn new() -> Self {
        Self { timer: Box::pin(tokio::time::sleep(Self::NEAR)), period: Self::NEAR, armed: false, alert: 0 }
    }

    /// Rows came at `now` after a wait since `polled`. A timer that still runs is left to the next wait:
    /// setting one costs more.
    pub(crate) fn rows_came(&mut self, polled: Nanos, now: Nanos) {
        let waited = now.saturating_sub(polled);
        if u128::from(waited) >= Self::NEAR.as_nanos() {
            self.alert = now.saturating_add(waited.saturating_mul(Self::ALERT));
            let near = Instant::now() + Self::NEAR;
            if self.timer.deadline() > near {
                self.timer.as_mut().reset(near);
                self.armed = false;
            }
        }
        self.period = if now < self.alert { Self::NEAR } else { Self::FAR };
    }

    pub(crate) fn watch(&mut self, cx: &mut Context<'_>, receiver: &mut Receiver) {
        while self.timer.as_mut().poll(cx).is_ready() {
            self.timer.as_mut().reset(Instant::now() + self.period);
            self.period = (self.period * 2).min(Self::LAST);
            self.armed = false;
        }
        if !self.armed {
            self.armed = true;
            receiver.expect_timer(self.timer.deadline().saturating_duration_since(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    #[tokio::test]
    async fn the_timer_is_near_only_while_waits_are_long() {
        let mut probe = RuntimeProbe::new();
        assert_eq!(probe.period, RuntimeProbe::NEAR, "nothing is known yet");
        probe.rows_came(0, MS);
        assert_eq!(probe.period, RuntimeProbe::FAR);
        probe.timer.as_mut().reset(Instant::now() + RuntimeProbe::FAR);
        probe.rows_came(MS, 6 * MS);
        assert_eq!(probe.period, RuntimeProbe::NEAR, "a wait of 5 ms");
        assert!(probe.timer.deadline() <= Instant::now() + RuntimeProbe::NEAR, "it is moved up");
        probe.rows_came(45 * MS, 45 * MS + 1);
        assert_eq!(probe.period, RuntimeProbe::NEAR, "40 ms later it still is");
        probe.rows_came(46 * MS, 46 * MS + 1);
        assert_eq!(probe.period, RuntimeProbe::FAR);
    }
}
