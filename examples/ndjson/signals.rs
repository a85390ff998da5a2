//! The signals that end the program.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

/// Ctrl-C, SIGTERM and a closed terminal, from now on.
pub(crate) struct Signals(Vec<(SignalKind, Signal)>);

/// A signal's number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(i32);

impl Number {
    /// The exit code by which a shell reports a program that a signal ended.
    pub(crate) fn exit_code(self) -> i32 {
        128 + self.0
    }
}

impl Signals {
    pub(crate) fn listen() -> io::Result<Self> {
        let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
        // Listening would undo what `nohup` did.
        if !is_hangup_ignored() {
            kinds.push(SignalKind::hangup());
        }
        let listen = |kind| Ok((kind, signal(kind)?));
        Ok(Self(kinds.into_iter().map(listen).collect::<io::Result<_>>()?))
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Number {
        Number(self.next_kind().await.as_raw_value())
    }

    /// Waits for the signal that ends the clean-up as well. A closed terminal leaves it the time of `grace`: the
    /// kernel and the shell may both send SIGHUP.
    pub(crate) async fn insist(&mut self, grace: Duration) {
        if self.next_kind().await == SignalKind::hangup() {
            let _ = timeout(grace, self.next_deliberate()).await;
        }
    }

    async fn next_deliberate(&mut self) {
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

/// Whether the program was started by `nohup` or the like. Where the system does not say so, it was not.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    ignored & 1 << (SignalKind::hangup().as_raw_value() - 1) != 0
}
