//! Real servers for tests and for the demo: a private [`Postgres`] and a private OpenTelemetry [`Collector`].
//!
//! Each is a native process in a folder of its own, on free loopback ports. It goes away, with its folder, as soon as
//! the process that started it is gone, however that happened: dropped, panicked, exited, or killed. What is not
//! installed is fetched or built once into a cache outside the checkout, and said so in one line on standard error.
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

use std::fmt::Display;
use std::process::Command;
use std::time::{Duration, Instant};

pub use collector::telemetry::{Event, Log, Metric, Point, Span};
pub use collector::{Collector, collector_program};
pub use error::Error;
pub use postgres::{Builder, Postgres};

/// Asks `condition` every 10 ms until it holds (`true`) or `timeout` has passed (`false`).
///
/// It blocks the thread: in an async test, call it where that harms nobody.
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

/// Sends a signal, such as `TERM`, to a process; false if there is none of that id.
///
/// By the shell's own `kill`: the program of that name is not on every machine.
pub fn send_signal(name: &str, pid: impl Display) -> bool {
    let sent = Command::new("/bin/sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &pid.to_string()]).status();
    sent.is_ok_and(|status| status.success())
}
