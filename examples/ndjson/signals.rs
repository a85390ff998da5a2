//! Being told to stop.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Ctrl-C and SIGTERM, from now on.
pub(crate) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

/// A signal's number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(i32);

impl Number {
    /// As a shell tells that a program was ended by a signal.
    pub(crate) fn exit_code(self) -> i32 {
        128 + self.0
    }
}

impl Signals {
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Number {
        let kind = tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        };
        Number(kind.as_raw_value())
    }
}
