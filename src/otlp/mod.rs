//! Exports metrics, traces and logs over OTLP, configured by the standard `OTEL_*` variables alone.
//!
//! ```no_run
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let telemetry = fraiseql_stream::otlp::init()?;
//!     // connect, stream
//!     telemetry.shutdown().await.ok(); // what could not be delivered is in the log
//!     Ok(())
//! }
//! ```
//!
//! Choose the function by what your service has already:
//!
//! | function | global providers and propagator | `tracing` subscriber |
//! |---|---|---|
//! | [`init`] | sets them | installs one |
//! | [`init_if_configured`] | sets them if any `OTEL_*` variable is set | installs one |
//! | [`set_global_providers`] | sets them | yours: add [`Guard::layer`] |
//! | [`build_providers`] | yours: pass [`Guard::meter_provider`] to [`Instruments`] | yours: add [`Guard::layer`] |
//!
//! A service that has providers of its own needs none of these; see [`Instruments`].
//!
//! # Variables
//!
//! | variable | meaning, default |
//! |---|---|
//! | `OTEL_EXPORTER_OTLP_ENDPOINT` | the collector, `http://localhost:4318` (gRPC: `:4317`) |
//! | `OTEL_EXPORTER_OTLP_PROTOCOL` | `http/protobuf`, or `grpc` with the feature `otlp-grpc` |
//! | `OTEL_EXPORTER_OTLP_TIMEOUT` | limit of one export in milliseconds, 10000; at most `OTEL_BSP_EXPORT_TIMEOUT`, `OTEL_BLRP_EXPORT_TIMEOUT` or `OTEL_METRIC_EXPORT_TIMEOUT`, 30000; 0 is no limit |
//! | `OTEL_EXPORTER_OTLP_HEADERS`, `_COMPRESSION` | `key=value,...`; `gzip` or `none` |
//! | `OTEL_EXPORTER_OTLP_CERTIFICATE`, `_CLIENT_CERTIFICATE`, `_CLIENT_KEY` | PEM files for `https` |
//! | `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` | name and attributes of the service |
//! | `OTEL_TRACES_EXPORTER`, `OTEL_METRICS_EXPORTER`, `OTEL_LOGS_EXPORTER` | `otlp`, `console`, `none` |
//! | `OTEL_TRACES_SAMPLER`, `OTEL_TRACES_SAMPLER_ARG` | `parentbased_always_on` |
//! | `OTEL_PROPAGATORS` | `tracecontext,baggage`; also `none` |
//! | `OTEL_METRIC_EXPORT_INTERVAL` | 60000 ms |
//! | `OTEL_SDK_DISABLED` | `true`: nothing is recorded or exported |
//!
//! `OTEL_EXPORTER_OTLP_{TRACES,METRICS,LOGS}_*` variants take precedence over the general ones. An invalid value is
//! replaced by the default with one warning, and a variable of the specification that has no effect causes one as well.
//! Warnings about variables are logged, or written to standard error while no subscriber accepts them. The [table of the
//! environment] describes all variables of the specification.
//!
//! [table of the environment]: https://github.com/fraiseql/fraiseql-stream/blob/main/docs/environment.md
//!
//! # Traces of several services
//!
//! The global propagator reads and writes the headers by which a trace continues in another service. `fraiseql-stream`
//! records its spans below the caller's span, so it is enough that the caller's span has the remote parent:
//!
//! ```
//! use opentelemetry::global;
//! use opentelemetry::propagation::Extractor;
//! use tracing_opentelemetry::OpenTelemetrySpanExt as _;
//!
//! /// Returns the span of a request, as a child of the span in its headers.
//! fn request_span(headers: &dyn Extractor) -> tracing::Span {
//!     let span = tracing::info_span!("GET /orders", otel.kind = "server");
//!     let parent = global::get_text_map_propagator(|propagator| propagator.extract(headers));
//!     span.set_parent(parent).ok(); // fails only if no layer exports spans
//!     span
//! }
//! ```
//!
//! # Compile-time levels of `tracing`
//!
//! Spans are recorded at level `info`. If a dependency disables that level at compile time, by one of the `tracing`
//! features `max_level_*` or `release_max_level_*`, no spans are exported, and a warning says so. Disable that feature
//! where it is enabled; `release_max_level_*` can also be overridden in your `Cargo.toml`:
//!
//! ```toml
//! [profile.release.package.tracing]
//! debug-assertions = true
//! ```
//!
//! # Failures
//!
//! If the collector is unreachable, telemetry is lost and one line is logged; rows are not affected. Another line follows
//! when export has recovered. If a queue is full, spans or records are dropped, and a line says how many, at most once a
//! minute. All of them are counted as well:
//!
//! | metric | counts, by `error.type` |
//! |---|---|
//! | `otel.sdk.processor.span.processed`, `otel.sdk.processor.log.processed` | what was handed to the exporter; `queue_full`: what was dropped |
//! | `otel.sdk.exporter.span.exported`, `.log.exported`, `.metric_data_point.exported` | what was delivered; `_OTHER`: what was not |

mod bounded;
mod env;
mod error;
mod guard;
mod layer;
mod propagators;
mod providers;
mod report;
mod self_metrics;
mod settings;
mod signal;
mod tally;
mod tls;
mod unsupported;

use std::ffi::OsString;
use std::io::Write as _;
use std::sync::Arc;

use opentelemetry::global;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::{Level, Subscriber};
use tracing_subscriber::filter::{FilterExt, FilterFn, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

pub use error::{InitError, InitErrorKind, ShutdownError, ShutdownErrorKind};
pub use guard::Guard;

use self::propagators::Propagator;
use self::providers::Providers;
use self::report::Health;
use self::settings::Settings;
use self::signal::Signal;
use crate::telemetry::{Instruments, SCOPE};

/// Sets up metrics, traces and logs from the environment: sets the global meter and tracer providers and the global
/// propagator, and installs a `tracing` subscriber that exports spans and logs and prints warnings to standard error, or
/// what `RUST_LOG` asks for. That variable never affects what is exported.
///
/// Call it before the first connection is made. If a subscriber is already installed, it stays, spans and logs are not
/// exported, and a warning says so: use [`set_global_providers`] and add [`Guard::layer`] to your subscriber.
///
/// # Errors
///
/// Fails if an exporter cannot be created, if the file of a certificate or key is unusable, or if `OTEL_CONFIG_FILE` or
/// `OTEL_EXPERIMENTAL_CONFIG_FILE` is set. Any other invalid value is logged and is not an error; neither is an
/// unreachable collector.
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
pub fn init() -> Result<Guard, InitError> {
    let Started { guard, propagators, mut warnings } = start()?;
    set_global(&guard, &propagators);
    let (print, warning) = printer();
    warnings.extend(warning);
    let subscriber = tracing_subscriber::registry().with(guard.layer()).with(print);
    if subscriber.try_init().is_err() {
        tracing::warn!(
            target: SCOPE,
            "spans and logs are not exported: a tracing subscriber is already installed; call otlp::set_global_providers() instead of otlp::init(), and add guard.layer() to your subscriber"
        );
    }
    log(&warnings);
    Ok(guard)
}

/// Calls [`init`] if any variable whose name starts with `OTEL_` has a value, for programs that export telemetry on
/// request only.
///
/// Otherwise returns `None` and exports nothing; warnings are printed to standard error as `init` does, unless a
/// `tracing` subscriber is already installed. An empty variable counts as unset. With `OTEL_SDK_DISABLED=true` the
/// guard exports nothing.
///
/// # Errors
///
/// Those of [`init`].
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> Result<(), fraiseql_stream::otlp::InitError> {
/// let telemetry = fraiseql_stream::otlp::init_if_configured()?;
/// // connect, stream
/// if let Some(telemetry) = telemetry {
///     telemetry.shutdown().await.ok(); // what could not be delivered is in the log
/// }
/// # Ok(())
/// # }
/// ```
pub fn init_if_configured() -> Result<Option<Guard>, InitError> {
    if is_configured(std::env::vars_os()) {
        return init().map(Some);
    }
    let (print, warning) = printer();
    // A subscriber that is already installed gets the warnings instead.
    let _ = tracing_subscriber::registry().with(print).try_init();
    log(warning.as_slice());
    Ok(None)
}

/// Sets the global meter and tracer providers and the global propagator from the environment, and leaves the `tracing`
/// subscriber to you: add [`Guard::layer`] to it.
///
/// Call it before the first connection is made. Use it if your service has a subscriber; [`init`] if it has none;
/// [`build_providers`] if the global providers are yours.
///
/// # Errors
///
/// Those of [`init`].
///
/// # Examples
///
/// ```no_run
/// use tracing_subscriber::prelude::*;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let telemetry = fraiseql_stream::otlp::set_global_providers()?;
/// tracing_subscriber::registry().with(telemetry.layer()).with(tracing_subscriber::fmt::layer()).init();
/// # Ok(())
/// # }
/// ```
pub fn set_global_providers() -> Result<Guard, InitError> {
    let Started { guard, propagators, warnings } = start()?;
    set_global(&guard, &propagators);
    log(&warnings);
    Ok(guard)
}

/// Builds the providers from the environment without making anything global.
///
/// Use it if the global providers belong to another part of your service, or in tests. Pass [`Guard::meter_provider`]
/// to [`Instruments::new`], and those to each connection; add [`Guard::layer`] to your
/// `tracing` subscriber.
///
/// # Errors
///
/// Those of [`init`].
///
/// # Examples
///
/// ```no_run
/// use fraiseql_stream::{Connection, Instruments, otlp};
/// use tracing_subscriber::prelude::*;
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let telemetry = otlp::build_providers()?;
/// tracing_subscriber::registry().with(telemetry.layer()).init();
/// let instruments = Instruments::new(&*telemetry.meter_provider());
/// let db = Connection::builder("postgres://localhost/shop").instruments(&instruments).connect().await?;
/// # Ok(())
/// # }
/// ```
pub fn build_providers() -> Result<Guard, InitError> {
    let Started { guard, warnings, .. } = start()?;
    log(&warnings);
    Ok(guard)
}

/// The providers, and what remains to be done with the settings.
struct Started {
    guard: Guard,
    propagators: Vec<Propagator>,
    warnings: Vec<String>,
}

fn start() -> Result<Started, InitError> {
    let mut settings = Settings::from_env()?;
    if !settings.disabled {
        settings.warnings.extend(compiled_out(&settings.traces, STATIC_MAX_LEVEL));
    }
    let health = Arc::new(Health::default());
    let providers =
        if settings.disabled { Providers::default() } else { Providers::new(&settings, &health)? };
    let signals = [settings.traces, settings.metrics, settings.logs];
    let places = signals.map(|signal| (signal.name, signal.place)).to_vec();
    let guard = Guard::new(providers, health, places);
    Ok(Started { guard, propagators: settings.propagators, warnings: settings.warnings })
}

fn set_global(guard: &Guard, propagators: &[Propagator]) {
    // Also if the SDK is disabled: the service remains a part of the traces of others.
    propagators::set_global(propagators);
    let Some(providers) = guard.providers() else { return };
    if let Some(meter) = &providers.meter {
        global::set_meter_provider(meter.clone());
        Instruments::renew_global();
    }
    if let Some(tracer) = &providers.tracer {
        global::set_tracer_provider(tracer.clone());
    }
}

fn is_configured(mut variables: impl Iterator<Item = (OsString, OsString)>) -> bool {
    variables.any(|(name, value)| {
        name.as_encoded_bytes().starts_with(b"OTEL_") && !value.as_encoded_bytes().trim_ascii().is_empty()
    })
}

/// Returns the layer that prints to standard error what `RUST_LOG` asks for, or warnings, and a warning if the variable
/// is invalid.
fn printer<S>() -> (impl Layer<S>, Option<String>)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let asked = std::env::var("RUST_LOG").ok().filter(|directives| !directives.trim().is_empty());
    let parsed = asked.as_ref().map(|directives| directives.parse::<Targets>());
    let warning = matches!(parsed, Some(Err(_))).then(|| {
        let expected = "targets and levels such as warn,fraiseql_stream=debug";
        format!("RUST_LOG={:?} is invalid (expected {expected}); using warn", asked.unwrap_or_default())
    });
    let asked = parsed.and_then(Result::ok);
    // Without a wish, the libraries used for exporting are left out: their failures are reported by this crate.
    let wants_all = asked.is_some();
    let wanted = FilterFn::new(move |about| wants_all || layer::is_not_telemetry(about));
    let targets = asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN));
    let print = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    (print.with_filter(wanted.with_max_level_hint(LevelFilter::TRACE).and(targets)), warning)
}

/// Logs warnings about variables.
fn log(warnings: &[String]) {
    for warning in warnings {
        if tracing::enabled!(Level::WARN) {
            tracing::warn!(target: SCOPE, "{warning}");
        } else {
            // No subscriber is installed yet, or warnings are compiled out. A time that cannot be written and a
            // standard error that is closed are no reasons to fail.
            let mut time = String::new();
            let _ = SystemTime.format_time(&mut Writer::new(&mut time));
            let _ = writeln!(std::io::stderr(), "{time}  WARN {SCOPE}: {warning}");
        }
    }
}

/// Warns if spans are to be exported but `tracing` was compiled without them.
fn compiled_out(traces: &Signal, most: LevelFilter) -> Option<String> {
    if traces.exporters.is_empty() || most >= LevelFilter::INFO {
        return None;
    }
    Some(format!(
        "no spans are exported: tracing is limited to level {most} at compile time; find the feature max_level_* or release_max_level_* with \"cargo tree -e features -i tracing\" and disable it"
    ))
}

#[cfg(test)]
mod tests {
    use super::signal::Exporter;
    use super::*;

    #[test]
    fn exported_spans_that_are_compiled_out_cause_a_warning() {
        let none = Signal::default();
        let traces = Signal { exporters: vec![Exporter::Otlp], ..Signal::default() };
        for most in [LevelFilter::OFF, LevelFilter::ERROR, LevelFilter::WARN] {
            let warning = compiled_out(&traces, most).unwrap();
            assert!(warning.contains(&format!("tracing is limited to level {most} at")), "{warning}");
            assert!(warning.contains("cargo tree -e features -i tracing"), "no advice: {warning}");
            assert_eq!(compiled_out(&none, most), None);
        }
        for most in [LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::TRACE] {
            assert_eq!(compiled_out(&traces, most), None);
        }
    }

    #[test]
    fn any_variable_of_opentelemetry_with_a_value_configures_telemetry() {
        let configured = |name: &str, value: &str| is_configured([(name.into(), value.into())].into_iter());
        assert!(configured("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"));
        assert!(configured("OTEL_SDK_DISABLED", "true"));
        assert!(!configured("OTEL_SERVICE_NAME", "") && !configured("OTEL_SERVICE_NAME", " "));
        assert!(!configured("HOTEL_NAME", "Ritz"));
        assert!(!is_configured(std::iter::empty()));
    }
}
