//! The guard: owns the providers, and flushes all of them within one deadline.

use std::fmt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use opentelemetry_sdk::error::OTelSdkResult;

use super::providers::Providers;
use super::report::{Health, unreachable};
use crate::telemetry::spans_are_open;

/// Each signal and where it goes.
pub(super) type Places = Vec<(&'static str, String)>;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps telemetry going, and flushes it at the end.
///
/// Keep it until all streams are gone, then call [`shutdown`](Self::shutdown). Dropping it flushes as well,
/// but blocks the thread meanwhile, up to its timeout, and loses the span of a stream that was dropped just
/// before and whose query is still being cancelled.
#[derive(Debug)]
#[must_use = "dropped at once, it ends telemetry at once: keep it as long as the service runs"]
pub struct Guard {
    providers: Option<Providers>,
    health: Arc<Health>,
    places: Places,
    timeout: Duration,
}

impl Guard {
    pub(super) fn new(providers: Providers, health: Arc<Health>, places: Places) -> Self {
        Self { providers: Some(providers), health, places, timeout: TIMEOUT }
    }

    /// How long a shutdown may take. Defaults to 5 s, which is also what the SDK gives traces and logs at most.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), fraiseql_stream::otlp::InitError> {
    /// let telemetry = fraiseql_stream::otlp::init()?.with_timeout(std::time::Duration::from_secs(2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        // A day is for ever, and can be added to any moment.
        self.timeout = timeout.min(Duration::from_secs(24 * 60 * 60));
        self
    }

    pub(super) fn providers(&self) -> Option<&Providers> {
        self.providers.as_ref()
    }

    /// Flushes traces, metrics and logs, and ends them. Returns within the timeout, whatever the collector
    /// does; works on every runtime, also on a current-thread one, and blocks none.
    ///
    /// # Errors
    ///
    /// If something was not delivered. It is in the log as well, so a program may ignore the error.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the flush to end by itself.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), fraiseql_stream::otlp::InitError> {
    /// let telemetry = fraiseql_stream::otlp::init()?;
    /// // ... streams ...
    /// telemetry.shutdown().await.ok(); // what was lost is in the log
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shutdown(mut self) -> Result<(), ShutdownError> {
        let start = Instant::now();
        let (patience, deadline) = (start + self.timeout / 4, start + self.timeout);
        let (done, end) = tokio::sync::oneshot::channel();
        let Some(flush) = self.take() else { return Ok(()) };
        spawn("fraiseql-otlp-shutdown", move || {
            // A stream dropped just before still has its span open until its query is cancelled. Not by a timer
            // of the runtime: it may have none.
            while spans_are_open() && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Nobody waits any more if the future was dropped.
            let _ = done.send(flush.run(deadline));
        });
        end.await.unwrap_or_else(|_| Err(ShutdownError::new("no thread could be started to flush telemetry")))
    }

    fn take(&mut self) -> Option<Flush> {
        let providers = self.providers.take()?;
        Some(Flush {
            providers,
            health: Arc::clone(&self.health),
            places: self.places.clone(),
            timeout: self.timeout,
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(flush) = self.take() {
            // What was lost is in the log.
            let _ = flush.run(Instant::now() + self.timeout);
        }
    }
}

type Work = Box<dyn FnOnce() -> OTelSdkResult + Send>;

struct Flush {
    providers: Providers,
    health: Arc<Health>,
    places: Places,
    timeout: Duration,
}

impl Flush {
    /// Blocks for at most the timeout. Each signal has a thread of its own: some of the SDK's calls know no
    /// timeout, and one that hangs must not take the others with it.
    fn run(mut self, deadline: Instant) -> Result<(), ShutdownError> {
        let (sent, results) = mpsc::channel();
        let mut pending = Vec::new();
        let mut flush = |signal: &'static str, flush: Work, shutdown: Work| {
            let sent = sent.clone();
            pending.push(signal);
            // The receiver is gone only when the deadline has passed.
            let tell = move |result| drop(sent.send((signal, result)));
            spawn("fraiseql-otlp-flush", move || end(flush, shutdown, tell));
        };
        if let Some(tracer) = self.providers.tracer.take() {
            let flushed = tracer.clone();
            flush("traces", Box::new(move || flushed.force_flush()), Box::new(move || tracer.shutdown()));
        }
        if let Some(meter) = self.providers.meter.take() {
            let flushed = meter.clone();
            flush("metrics", Box::new(move || flushed.force_flush()), Box::new(move || meter.shutdown()));
        }
        if let Some(logger) = self.providers.logger.take() {
            let flushed = logger.clone();
            flush("logs", Box::new(move || flushed.force_flush()), Box::new(move || logger.shutdown()));
        }
        let mut lost = Vec::new();
        while !pending.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok((signal, result)) = results.recv_timeout(left) else {
                break;
            };
            pending.retain(|other| *other != signal);
            if result.is_err() {
                lost.push(signal);
            }
        }
        self.conclude(&lost, &pending, deadline)
    }

    fn conclude(
        &self,
        lost: &[&'static str],
        late: &[&'static str],
        deadline: Instant,
    ) -> Result<(), ShutdownError> {
        let signals = [lost, late].concat();
        let missed = self.places.iter().filter(|(signal, _)| signals.contains(signal));
        let mut places: Vec<_> = missed.map(|(_, place)| place.as_str()).collect();
        places.dedup();
        let Some(place) = places.first() else { return Ok(()) };
        let why = if late.is_empty() {
            reason(place, deadline).unwrap_or_else(|| "the collector did not take them".to_owned())
        } else {
            format!("no answer within {:.1} s", self.timeout.as_secs_f64())
        };
        let error = ShutdownError::new(format!(
            "the last {} were not delivered to {}: {why}",
            signals.join(", "),
            places.join(", ")
        ));
        if self.health.is_news(&signals) {
            tracing::warn!("{error}");
        }
        Err(error)
    }
}

/// Flushing first: a shutdown alone reports success even when its last export failed.
fn end(flush: Work, shutdown: Work, tell: impl FnOnce(OTelSdkResult)) {
    match flush() {
        Ok(()) => tell(shutdown()),
        Err(error) => {
            tell(Err(error));
            // A global provider is never dropped: its thread would go on. What is lost has been told.
            let _ = shutdown();
        }
    }
}

/// Why a place can't be reached, if that is found out before the deadline: a name may take long to resolve.
fn reason(place: &str, deadline: Instant) -> Option<String> {
    let (found, reason) = mpsc::channel();
    let place = place.to_owned();
    spawn("fraiseql-otlp-reason", move || {
        // Too late if nobody waits.
        let _ = found.send(unreachable(&place));
    });
    reason.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok().flatten()
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    // Without a thread the channel closes, and the waiting side says so.
    let _ = std::thread::Builder::new().name(name.to_owned()).spawn(work);
}

/// Telemetry that could not be delivered at the end.
///
/// ```no_run
/// # async fn example(telemetry: fraiseql_stream::otlp::Guard) {
/// if let Err(error) = telemetry.shutdown().await {
///     eprintln!("{error}"); // the last traces, metrics were not delivered to http://localhost:4318: ...
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct ShutdownError(String);

impl ShutdownError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for ShutdownError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ShutdownError {}
