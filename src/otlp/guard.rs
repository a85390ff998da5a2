//! The guard: owns the providers, and flushes all of them within one deadline.

use std::fmt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use opentelemetry_sdk::error::OTelSdkResult;

use super::providers::Providers;
use super::report::{Health, unreachable};
use crate::telemetry::spans_to_close;

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

    /// How long a shutdown may take. Defaults to 5 s.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), fraiseql_stream::otlp::InitError> {
    /// let telemetry = fraiseql_stream::otlp::init()?.with_timeout(std::time::Duration::from_secs(2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
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
        let deadline = Instant::now() + self.timeout;
        // A stream dropped just before still has its span open until its query is cancelled.
        if tokio::runtime::Handle::try_current().is_ok() {
            let _ = tokio::time::timeout(self.timeout / 4, spans_to_close()).await;
        }
        let (done, end) = tokio::sync::oneshot::channel();
        let Some(flush) = self.take() else { return Ok(()) };
        spawn("fraiseql-otlp-shutdown", move || {
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
        let mut flush = |signal: &'static str, work: Box<dyn FnOnce() -> OTelSdkResult + Send>| {
            let sent = sent.clone();
            pending.push(signal);
            spawn("fraiseql-otlp-flush", move || {
                // The receiver is gone only when the deadline has passed.
                let _ = sent.send((signal, work()));
            });
        };
        // Flushing first: a shutdown alone reports success even when its last export failed. Where flushing
        // fails, dropping the provider shuts it down.
        if let Some(tracer) = self.providers.tracer.take() {
            flush("traces", Box::new(move || tracer.force_flush().and_then(|()| tracer.shutdown())));
        }
        if let Some(meter) = self.providers.meter.take() {
            flush("metrics", Box::new(move || meter.force_flush().and_then(|()| meter.shutdown())));
        }
        if let Some(logger) = self.providers.logger.take() {
            flush("logs", Box::new(move || logger.force_flush().and_then(|()| logger.shutdown())));
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
        let end = self.conclude(&lost, &pending);
        #[cfg(feature = "otlp-grpc")]
        if let Some(runtime) = self.providers.runtime.take() {
            runtime.shutdown_background();
        }
        end
    }

    fn conclude(&self, lost: &[&'static str], late: &[&'static str]) -> Result<(), ShutdownError> {
        let signals = [lost, late].concat();
        let missed = self.places.iter().filter(|(signal, _)| signals.contains(signal));
        let mut places: Vec<_> = missed.map(|(_, place)| place.as_str()).collect();
        places.dedup();
        let Some(place) = places.first() else { return Ok(()) };
        let why = if late.is_empty() {
            unreachable(place).unwrap_or_else(|| "the collector refused it".to_owned())
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
