//! The guard, which owns the providers and flushes all of them within one deadline.

use std::io;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use opentelemetry::metrics::{MeterProvider, NoopMeterProvider};
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};

use super::error::{ShutdownError, ShutdownErrorKind};
use super::providers::Providers;
use super::report::{Health, unreachable};
use crate::telemetry::{SCOPE, spans_are_open};

/// Each signal and the place it is exported to.
pub(super) type Places = Vec<(&'static str, String)>;

const TIMEOUT: Duration = Duration::from_secs(5);

/// A guard that owns the providers: telemetry is exported while it lives, and flushed when it is shut down or dropped.
///
/// Keep it until all streams have ended, then call [`shutdown`](Self::shutdown). Dropping the guard also flushes, but
/// blocks the thread for up to the timeout, and loses the span of a stream that was dropped just before and whose query
/// is still being cancelled.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> Result<(), fraiseql_stream::otlp::InitError> {
/// let telemetry = fraiseql_stream::otlp::init()?;
/// // connect, stream
/// telemetry.shutdown().await.ok(); // what could not be delivered is in the log
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping the guard ends telemetry: keep it as long as the service runs"]
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

    /// Limits how long a shutdown or drop may take. Defaults to 5 s, which is also the SDK's own limit for traces and
    /// logs; a timeout of more than a day counts as a day.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn main() -> Result<(), fraiseql_stream::otlp::InitError> {
    /// let telemetry = fraiseql_stream::otlp::init()?.with_timeout(std::time::Duration::from_secs(2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        // The deadline must be representable as an `Instant`.
        self.timeout = timeout.min(Duration::from_secs(24 * 60 * 60));
        self
    }

    /// Returns the meter provider, for metrics of your own or for [`Instruments::new`](crate::Instruments::new). It
    /// records nothing if metrics are not exported.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use fraiseql_stream::{Instruments, otlp};
    ///
    /// # fn main() -> Result<(), otlp::InitError> {
    /// let telemetry = otlp::build_providers()?;
    /// let instruments = Instruments::new(&*telemetry.meter_provider());
    /// # Ok(())
    /// # }
    /// ```
    pub fn meter_provider(&self) -> Arc<dyn MeterProvider + Send + Sync> {
        match self.providers().and_then(|providers| providers.meter.as_ref()) {
            Some(meter) => Arc::new(meter.clone()),
            None => Arc::new(NoopMeterProvider::new()),
        }
    }

    pub(super) fn providers(&self) -> Option<&Providers> {
        self.providers.as_ref()
    }

    /// Flushes traces, metrics and logs, and shuts the providers down. Returns within the timeout, whatever the
    /// collector does. Works on every runtime, also on a current-thread one, and never blocks its threads.
    ///
    /// # Errors
    ///
    /// Fails if something was not delivered. The failure is also logged, so the error may be ignored.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped after its first poll, the flush continues on its own thread.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), fraiseql_stream::otlp::InitError> {
    /// let telemetry = fraiseql_stream::otlp::init()?;
    /// // connect, stream
    /// telemetry.shutdown().await.ok(); // what could not be delivered is in the log
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shutdown(mut self) -> Result<(), ShutdownError> {
        let start = Instant::now();
        let (spans_deadline, deadline) = (start + self.timeout / 4, start + self.timeout);
        let (done, end) = tokio::sync::oneshot::channel();
        let Some(flush) = self.take() else { return Ok(()) };
        let flushing = spawn("fraiseql-otlp-shutdown", move || {
            // The span of a stream dropped just before stays open until its query is cancelled. This sleeps because
            // the runtime may have no timer.
            while spans_are_open() && Instant::now() < spans_deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            // The receiver is closed if the future was dropped.
            let _ = done.send(flush.run(deadline));
        });
        flushing.map_err(ShutdownError::no_thread)?;
        end.await.unwrap_or_else(|_| Err(ShutdownError::panicked()))
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
            // The failure is in the log.
            let _ = flush.run(Instant::now() + self.timeout);
        }
    }
}

type Step = Box<dyn FnOnce() -> OTelSdkResult + Send>;

struct Flush {
    providers: Providers,
    health: Arc<Health>,
    places: Places,
    timeout: Duration,
}

impl Flush {
    /// Flushes and shuts down all signals; blocks until the deadline at most.
    ///
    /// Each signal has its own thread: some calls of the SDK have no timeout, and one that hangs must not hold up the
    /// others.
    fn run(mut self, deadline: Instant) -> Result<(), ShutdownError> {
        let (sent, results) = mpsc::channel();
        let mut pending = Vec::new();
        let mut flush = |signal: &'static str, flush: Step, shutdown: Step| {
            let sent = sent.clone();
            pending.push(signal);
            // The receiver is gone only when the deadline has passed.
            let report = move |result| drop(sent.send((signal, result)));
            // Without a thread, the deadline ends the wait.
            let _ = spawn("fraiseql-otlp-flush", move || end(flush, shutdown, report));
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
            if let Err(error) = result {
                lost.push((signal, error));
            }
        }
        self.conclude(lost, &pending, deadline)
    }

    fn conclude(
        &self,
        lost: Vec<(&'static str, OTelSdkError)>,
        late: &[&'static str],
        deadline: Instant,
    ) -> Result<(), ShutdownError> {
        let signals: Vec<_> = lost.iter().map(|(signal, _)| *signal).chain(late.iter().copied()).collect();
        let missed = self.places.iter().filter(|(signal, _)| signals.contains(signal));
        let mut places: Vec<_> = missed.map(|(_, place)| place.as_str()).collect();
        places.dedup();
        let Some(place) = places.first() else { return Ok(()) };
        let (kind, why, source) = match lost.into_iter().next() {
            Some((_, error)) if late.is_empty() => {
                let why = reason(place, deadline).or_else(|| self.health.cause(place));
                let why = why.unwrap_or_else(|| error.to_string());
                (ShutdownErrorKind::Export, why, Some(error))
            }
            _ => {
                let why = format!("no answer within {:.1} s", self.timeout.as_secs_f64());
                (ShutdownErrorKind::Timeout, why, None)
            }
        };
        let (signals_text, places) = (signals.join(" and "), places.join(" and "));
        let message = format!("the last {signals_text} were not delivered to {places}: {why}");
        let error = ShutdownError::new(kind, message, source);
        if self.health.is_first_failure(&signals) {
            tracing::warn!(target: SCOPE, "{error}");
        }
        Err(error)
    }
}

/// Flushes, then shuts down: a shutdown alone reports success even if its last export failed.
fn end(flush: Step, shutdown: Step, report: impl FnOnce(OTelSdkResult)) {
    match flush() {
        Ok(()) => report(shutdown()),
        Err(error) => {
            report(Err(error));
            // Without it, the thread of a global provider, which is never dropped, would go on. The failure has
            // been reported.
            let _ = shutdown();
        }
    }
}

/// Returns why a place cannot be reached, unless finding out takes longer than the deadline, as resolving a name may.
fn reason(place: &str, deadline: Instant) -> Option<String> {
    let (found, reason) = mpsc::channel();
    let place = place.to_owned();
    let search = spawn("fraiseql-otlp-reason", move || {
        // The receiver is gone after the deadline.
        let _ = found.send(unreachable(&place));
    });
    search.ok()?;
    reason.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok().flatten()
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}
