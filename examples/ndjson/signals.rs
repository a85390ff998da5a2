//! The signals that stop the program.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

/// A listener for SIGINT, SIGTERM and SIGHUP.
pub(crate) struct Signals(Vec<(SignalKind, Signal)>);

/// The number of a signal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(i32);

impl Number {
    /// Returns the exit code with which a shell reports a program killed by this signal.
    pub(crate) fn exit_code(self) -> i32 {
        128 + self.0
    }
}

impl Signals {
    pub(crate) fn listen() -> io::Result<Self> {
        let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
        // Under `nohup`, the signal must stay ignored.
        if !is_hangup_ignored() {
            kinds.push(SignalKind::hangup());
        }
        let listen = |kind| Ok((kind, signal(kind)?));
        Ok(Self(kinds.into_iter().map(listen).collect::<io::Result<_>>()?))
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> Number {
        Number(self.next_kind().await.as_raw_value())
    }

    /// Waits for a second signal, which aborts the clean-up. A SIGHUP does so only after `grace`, since the kernel
    /// and the shell may both send one when a terminal is closed.
    pub(crate) async fn abort_requested(&mut self, grace: Duration) {
        if self.next_kind().await == SignalKind::hangup() {
            let _ = timeout(grace, self.next_other_than_hangup()).await;
        }
    }

    async fn next_other_than_hangup(&mut self) {
        while self.next_kind().await == SignalKind::hangup() {}
    }

    async fn next_kind(&mut self) -> SignalKind {
        poll_fn(|cx| {
            let ready =
                self.0.iter_mut().find_map(|(kind, signal)| signal.poll_recv(cx).is_ready().then_some(*kind));
            ready.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Returns whether SIGHUP was ignored when the program started, as under `nohup`; `false` if `/proc` cannot be read.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    ignored & 1 << (SignalKind::hangup().as_raw_value() - 1) != 0
}
