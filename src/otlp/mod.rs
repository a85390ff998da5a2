//! Telemetry by OTLP, set up by the standard `OTEL_*` variables alone.
//!
//! ```no_run
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let telemetry = fraiseql_stream::otlp::init()?;
//!     // ... connect, stream ...
//!     let _ = telemetry.shutdown().await; // what could not be delivered is in the log
//!     Ok(())
//! }
//! ```
//!
//! | variable | meaning, default |
//! |---|---|
//! | `OTEL_EXPORTER_OTLP_ENDPOINT` | the collector, `http://localhost:4318` (gRPC: `:4317`) |
//! | `OTEL_EXPORTER_OTLP_PROTOCOL` | `http/protobuf`, or `grpc` with the feature `otlp-grpc` |
//! | `OTEL_EXPORTER_OTLP_TIMEOUT` | milliseconds of one export, 10000; `OTEL_BSP_EXPORT_TIMEOUT`, `OTEL_BLRP_EXPORT_TIMEOUT` and `OTEL_METRIC_EXPORT_TIMEOUT` bound it, 30000 |
//! | `OTEL_EXPORTER_OTLP_HEADERS`, `_COMPRESSION` | `key=value,...`; `gzip` or `none` |
//! | `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` | who you are |
//! | `OTEL_TRACES_EXPORTER`, `OTEL_METRICS_EXPORTER`, `OTEL_LOGS_EXPORTER` | `otlp`, `console`, `none` |
//! | `OTEL_TRACES_SAMPLER`, `OTEL_TRACES_SAMPLER_ARG` | `parentbased_always_on` |
//! | `OTEL_BSP_SCHEDULE_DELAY`, `_MAX_QUEUE_SIZE`, `_MAX_EXPORT_BATCH_SIZE` | 5000 ms, 2048, 512; for logs `OTEL_BLRP_*` with 1000 ms |
//! | `OTEL_METRIC_EXPORT_INTERVAL` | 60000 ms |
//! | `OTEL_SDK_DISABLED` | `true`: nothing is recorded or sent |
//!
//! `OTEL_EXPORTER_OTLP_{TRACES,METRICS,LOGS}_*` variants of endpoint, protocol, timeout, headers and
//! compression go before the general ones. A value that makes no sense is warned of once, and the default is used.
//!
//! Spans are recorded at level `info`. If a dependency limits `tracing` to less at compile time, by one of its
//! features `max_level_*` or `release_max_level_*`, there are none, and a warning says so. Turn that feature off
//! where it is enabled; `release_max_level_*` can also be undone in your `Cargo.toml`:
//!
//! ```toml
//! [profile.release.package.tracing]
//! debug-assertions = true
//! ```
//!
//! A failing collector costs telemetry and one line in the log, never a row.

mod env;
mod guard;
mod providers;
mod report;

use std::fmt;
use std::io::Write as _;
use std::sync::Arc;

use opentelemetry::trace::TracerProvider;
use opentelemetry::{InstrumentationScope, global};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::FilterFn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::telemetry::{FIRST_ROW, Instruments, SCOPE};
pub use guard::{Guard, ShutdownError};

use self::env::{Settings, Signal};
use self::providers::Providers;
use self::report::Health;

/// Sets up metrics, traces and logs from the environment: the global meter and tracer providers, and a
/// `tracing` subscriber that exports spans and logs and prints warnings on standard error.
///
/// If the service has a subscriber already, that one stays, with a warning; use [`providers`] and add
/// [`Guard::layer`] to it. Call this before the first connection is made.
///
/// # Errors
///
/// Only when an exporter can't be made at all. Values that make no sense are warned of, and a collector
/// that is away is no error.
pub fn init() -> Result<Guard, InitError> {
    let (guard, warnings) = start()?;
    let to_stderr = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .without_time();
    let to_stderr =
        to_stderr.with_filter(FilterFn::new(is_not_telemetry).with_max_level_hint(LevelFilter::WARN));
    let subscriber =
        tracing_subscriber::registry().with(guard.layer()).with(to_stderr.with_filter(LevelFilter::WARN));
    if subscriber.try_init().is_err() {
        tracing::warn!(
            "a tracing subscriber is installed already, so spans and logs do not reach OTLP: call otlp::providers() instead, and add guard.layer() to your subscriber"
        );
    }
    tell(&warnings);
    Ok(guard)
}

/// Like [`init`], but leaves the `tracing` subscriber to you: add [`Guard::layer`] to it.
///
/// ```no_run
/// use tracing_subscriber::prelude::*;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let telemetry = fraiseql_stream::otlp::providers()?;
/// tracing_subscriber::registry().with(telemetry.layer()).with(tracing_subscriber::fmt::layer()).init();
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Those of [`init`].
pub fn providers() -> Result<Guard, InitError> {
    let (guard, warnings) = start()?;
    tell(&warnings);
    Ok(guard)
}

fn tell(warnings: &[String]) {
    for warning in warnings {
        if STATIC_MAX_LEVEL >= LevelFilter::WARN {
            tracing::warn!("{warning}");
        } else {
            // Warnings by `tracing` are compiled out; one that is lost with standard error is lost.
            let _ = writeln!(std::io::stderr(), "WARN {warning}");
        }
    }
}

/// Warns if spans are to be exported but `tracing` was compiled without them.
fn compiled_out(traces: &Signal, most: LevelFilter) -> Option<String> {
    if traces.exporters.is_empty() || most >= LevelFilter::INFO {
        return None;
    }
    Some(format!(
        "no spans are exported: tracing is limited to level {most} at compile time; find the feature max_level_* or release_max_level_* with \"cargo tree -e features -i tracing\" and turn it off"
    ))
}

fn start() -> Result<(Guard, Vec<String>), InitError> {
    let mut settings = Settings::from_env();
    if !settings.disabled {
        settings.warnings.extend(compiled_out(&settings.traces, STATIC_MAX_LEVEL));
    }
    let health = Arc::new(Health::default());
    let providers =
        if settings.disabled { Providers::default() } else { Providers::new(&settings, &health)? };
    if let Some(meter) = &providers.meter {
        global::set_meter_provider(meter.clone());
        Instruments::renew_global();
    }
    if let Some(tracer) = &providers.tracer {
        global::set_tracer_provider(tracer.clone());
    }
    let signals = [settings.traces, settings.metrics, settings.logs];
    let places = signals.map(|signal| (signal.name, signal.place)).to_vec();
    Ok((Guard::new(providers, health, places), settings.warnings))
}

impl Guard {
    /// The layer that turns `tracing` spans into OpenTelemetry's, and events into log records. Spans and
    /// events of the exporters' own libraries are left out, or exporting would feed itself.
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let providers = self.providers();
        let spans = providers.and_then(|providers| providers.tracer.as_ref()).map(|provider| {
            let scope = InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build();
            let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer_with_scope(scope));
            let lean = layer.with_threads(false).with_location(false).with_tracked_inactivity(false);
            lean.with_target(false)
        });
        let records = providers.and_then(|providers| providers.logger.as_ref());
        let records = records.map(OpenTelemetryTracingBridge::new);
        // The filters stand outside of the options: an absent layer would switch off its neighbour.
        let spans = spans.with_filter(wanted(belongs_to_trace));
        spans.and_then(records.with_filter(wanted(belongs_to_log)))
    }
}

/// The streams' own records are the finest that anyone wants.
fn wanted(belongs: fn(&Metadata<'_>) -> bool) -> FilterFn<fn(&Metadata<'_>) -> bool> {
    FilterFn::new(belongs).with_max_level_hint(LevelFilter::DEBUG)
}

/// Spans, and the first row as an event of its span; all other events go to the log, once.
fn belongs_to_trace(about: &Metadata<'_>) -> bool {
    let wanted_span = about.is_span() && *about.level() <= Level::INFO && is_not_telemetry(about);
    wanted_span || about.target() == FIRST_ROW
}

fn belongs_to_log(about: &Metadata<'_>) -> bool {
    let finest = if about.target() == SCOPE { Level::DEBUG } else { Level::INFO };
    let wanted = *about.level() <= finest && about.target() != FIRST_ROW;
    about.is_event() && wanted && is_not_telemetry(about)
}

fn is_not_telemetry(about: &Metadata<'_>) -> bool {
    !exports(about.target())
}

fn exports(target: &str) -> bool {
    let name = target.split("::").next().unwrap_or(target);
    name.starts_with("opentelemetry") || EXPORTERS.contains(&name)
}

/// The crates that exports run through: whole names, since `tower_http` and the like are the service's.
const EXPORTERS: [&str; 7] = ["h2", "hyper", "hyper_util", "reqwest", "rustls", "tonic", "tower"];

/// Telemetry that can't be set up.
///
/// ```no_run
/// match fraiseql_stream::otlp::init() {
///     Ok(telemetry) => drop(telemetry),
///     Err(error) => eprintln!("going on without telemetry: {error}"),
/// }
/// ```
#[derive(Debug)]
pub struct InitError(String);

impl InitError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InitError {}

#[cfg(test)]
mod tests {
    use super::env::Exporter;
    use super::*;

    #[test]
    fn spans_that_are_compiled_out_are_warned_of_where_they_would_be_exported() {
        let none = Signal::default();
        let traces = Signal { exporters: vec![Exporter::Otlp], ..Signal::default() };
        for most in [LevelFilter::OFF, LevelFilter::ERROR, LevelFilter::WARN] {
            let warning = compiled_out(&traces, most).unwrap();
            assert!(warning.contains(&format!("tracing is limited to level {most} at")), "{warning}");
            assert!(warning.contains("cargo tree -e features -i tracing"), "what to do: {warning}");
            assert_eq!(compiled_out(&none, most), None);
        }
        for most in [LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::TRACE] {
            assert_eq!(compiled_out(&traces, most), None);
        }
    }

    #[test]
    fn only_the_exporters_own_crates_are_left_out() {
        for target in ["opentelemetry-otlp", "opentelemetry_sdk", "hyper::client", "tower::buffer", "h2"] {
            assert!(exports(target), "{target}");
        }
        for target in ["tower_http::trace::make_span", "hyper_service", "h2o::pumps", SCOPE] {
            assert!(!exports(target), "{target}");
        }
    }
}
