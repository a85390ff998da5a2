//! Real servers for tests and for the demo: a private [`Postgres`], a private OpenTelemetry [`Collector`] and a private
//! [`Prometheus`].
//!
//! Each server is a native process with its own folder, on free loopback ports. The process and its folder are removed
//! as soon as their owner is gone, whether it was dropped, panicked, exited or was killed.
//!
//! Programs that are not installed are downloaded or built once, into a cache outside the checkout, and announced by one
//! line on standard error. If that is not possible either, the error names the package to install. Variables select a
//! program: `PG_BIN`, the folder of `initdb` and `postgres`, and `OTELCOL`, `PROMETHEUS` and `PROMTOOL`, the paths of these
//! programs.
//!
//! ```no_run
//! # fn main() -> Result<(), backends::Error> {
//! let server = backends::Postgres::start()?;
//! let collector = backends::Collector::start()?;
//! println!("{} {}", server.url(), collector.http_endpoint());
//! # Ok(())
//! # }
//! ```

mod account;
mod apt;
mod cache;
mod collector;
mod error;
pub mod go;
pub mod http;
mod postgres;
mod process;
mod prometheus;

use std::fmt::Display;
use std::process::Command;
use std::time::{Duration, Instant};

pub use collector::telemetry::{Event, Log, Metric, Point, Span};
pub use collector::{Collector, collector_program};
pub use error::Error;
pub use postgres::{Builder, Postgres};
pub use prometheus::{Prometheus, prometheus_program, promtool_program};

/// Checks `condition` every 10 ms and returns `true` as soon as it holds, or `false` after `timeout`.
///
/// Blocks the thread: in an async test, call it only where that does no harm.
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal, such as `TERM`, to a process. Returns `false` if the signal could not be sent, for example because
/// there is no such process.
pub fn send_signal(name: &str, pid: impl Display) -> bool {
    // The shell's builtin `kill`: the program of that name is not installed everywhere.
    let sent = Command::new("/bin/sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &pid.to_string()]).status();
    sent.is_ok_and(|status| status.success())
}
