//! The `tracing` layer: spans go to the tracer provider, events to the logger provider.

use opentelemetry::trace::{SpanBuilder, Tracer, TracerProvider};
use opentelemetry::{Context, InstrumentationScope, Value};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterFn, LevelFilter};
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

use super::Guard;
use crate::telemetry::{FIRST_ROW, SCHEMA_URL, SCOPE};

impl Guard {
    /// Returns the layer that exports `tracing` spans as OpenTelemetry spans, and events as log records.
    ///
    /// The instrumentation scope of a span or record is named after its emitter: `fraiseql_stream` for those of this
    /// crate, the `target` for all others. Spans and events of the libraries used for exporting are left out, since
    /// each export would otherwise cause another one. A signal without exporter is not recorded.
    ///
    /// A subscriber can have only one layer of tracing-opentelemetry, and this is one: a second one, or this layer of a
    /// second guard, makes tracing-subscriber panic at the first span.
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
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let providers = self.providers();
        let spans = providers.and_then(|providers| providers.tracer.as_ref()).map(|provider| {
            let layer = tracing_opentelemetry::layer().with_tracer(ScopedTracer::new(provider));
            // The target is for the tracer, which takes it out again.
            layer.with_target(true).with_threads(false).with_location(false).with_tracked_inactivity(false)
        });
        let records = providers.and_then(|providers| providers.logger.as_ref());
        let records = records.map(OpenTelemetryTracingBridge::new);
        // The filters enclose the options: an absent layer would disable its neighbour.
        let spans = spans.with_filter(wanted(belongs_to_trace));
        spans.and_then(records.with_filter(wanted(belongs_to_log)))
    }
}

/// A tracer that gives each span the scope of its emitter.
///
/// The layer has one tracer for all spans. A second layer for the spans of others would not do: each layer keeps its
/// own record of a span, so that a span could not find its parent in the other layer.
struct ScopedTracer {
    provider: SdkTracerProvider,
    /// For the spans of this crate.
    own: SdkTracer,
}

impl ScopedTracer {
    fn new(provider: &SdkTracerProvider) -> Self {
        let scope = InstrumentationScope::builder(SCOPE)
            .with_version(env!("CARGO_PKG_VERSION"))
            .with_schema_url(SCHEMA_URL)
            .build();
        Self { provider: provider.clone(), own: provider.tracer_with_scope(scope) }
    }
}

impl Tracer for ScopedTracer {
    type Span = Span;

    fn build_with_context(&self, mut builder: SpanBuilder, parent: &Context) -> Span {
        match take_target(&mut builder) {
            Some(target) if crate_of(&target.as_str()) != SCOPE => {
                self.provider.tracer(target.as_str().into_owned()).build_with_context(builder, parent)
            }
            _ => self.own.build_with_context(builder, parent),
        }
    }
}

/// Removes the attribute in which the layer passes the target of a span.
fn take_target(builder: &mut SpanBuilder) -> Option<Value> {
    let attributes = builder.attributes.as_mut()?;
    // The first one: a field of the span may have the same name.
    let at = attributes.iter().position(|attribute| attribute.key.as_str() == "target")?;
    Some(attributes.remove(at).value)
}

fn wanted(belongs: fn(&Metadata<'_>) -> bool) -> FilterFn<fn(&Metadata<'_>) -> bool> {
    // No one wants more than the DEBUG records of the streams.
    FilterFn::new(belongs).with_max_level_hint(LevelFilter::DEBUG)
}

/// Whether this is a span, or the first row as an event of its span. All other events go to the log only.
fn belongs_to_trace(about: &Metadata<'_>) -> bool {
    let wanted_span = about.is_span() && *about.level() <= Level::INFO && is_not_telemetry(about);
    wanted_span || about.target() == FIRST_ROW
}

fn belongs_to_log(about: &Metadata<'_>) -> bool {
    let finest = if about.target() == SCOPE { Level::DEBUG } else { Level::INFO };
    let wanted = *about.level() <= finest && about.target() != FIRST_ROW;
    about.is_event() && wanted && is_not_telemetry(about)
}

pub(super) fn is_not_telemetry(about: &Metadata<'_>) -> bool {
    !exports(about.target())
}

fn exports(target: &str) -> bool {
    let name = crate_of(target);
    name.starts_with("opentelemetry") || EXPORTERS.contains(&name)
}

fn crate_of(target: &str) -> &str {
    target.split("::").next().unwrap_or(target)
}

/// The crates used for exporting. These are whole names, since `tower_http` and the like belong to the service.
const EXPORTERS: [&str; 8] =
    ["h2", "hyper", "hyper_util", "reqwest", "rustls", "rustls_platform_verifier", "tonic", "tower"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_crates_used_for_exporting_are_left_out() {
        for target in [
            "opentelemetry-otlp",
            "opentelemetry_sdk",
            "hyper::client",
            "tower::buffer",
            "h2",
            "rustls_platform_verifier::verification::others",
        ] {
            assert!(exports(target), "{target}");
        }
        for target in ["tower_http::trace::make_span", "hyper_service", "h2o::pumps", SCOPE] {
            assert!(!exports(target), "{target}");
        }
    }
}
