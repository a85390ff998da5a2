//! Builds providers and exporters from the settings.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
#[cfg(not(feature = "otlp-grpc"))]
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::{BatchConfigBuilder as RecordBatch, BatchLogProcessor, SdkLoggerProvider};
use opentelemetry_sdk::metrics::{Instrument, PeriodicReader, SdkMeterProvider, Stream};
use opentelemetry_sdk::resource::{SdkProvidedResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{BatchConfigBuilder as SpanBatch, BatchSpanProcessor, SdkTracerProvider};
use uuid::Uuid;

use super::error::InitError;
use super::report::{Health, Reported};
use super::settings::{BatchLimits, Exporter, Protocol, Settings, Signal};
use crate::telemetry::{ENDS, MAX_ENTITIES};

/// Instruments with attributes beside `entity`, and their number of series per entity: the SDK's default limit of
/// 2,000 series would cut them off.
const WIDE: [(&str, usize); 5] = [
    ("fraiseql.stream.time", 5),
    ("fraiseql.stream.rows", 3),
    ("fraiseql.stream.ended", ENDS),
    ("fraiseql.producer.time", 2),
    ("fraiseql.chunk.adjustments", 2),
];
/// The values of `entity`: the entities, `_OTHER` and `_REFUSED`.
const MOST_VALUES: usize = MAX_ENTITIES + 2;
/// Room for rare series of one instrument, such as that of an unusual kind of error.
const SPARE: usize = 20;

/// The providers; a signal without exporter has none.
#[derive(Debug, Default)]
pub(super) struct Providers {
    pub(super) tracer: Option<SdkTracerProvider>,
    pub(super) meter: Option<SdkMeterProvider>,
    pub(super) logger: Option<SdkLoggerProvider>,
    /// Runs gRPC. On the runtime of the service, it could not flush at shutdown.
    #[cfg(feature = "otlp-grpc")]
    pub(super) runtime: GrpcRuntime,
}

/// A runtime that may be dropped anywhere, also on a thread of another runtime.
#[cfg(feature = "otlp-grpc")]
#[derive(Debug, Default)]
pub(super) struct GrpcRuntime(Option<tokio::runtime::Runtime>);

#[cfg(feature = "otlp-grpc")]
impl Drop for GrpcRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Builds the exporter of a signal. This is a macro because the builders of the three signals share no trait.
macro_rules! exporter {
    ($exporter:ident, $signal:expr, $transport:expr) => {{
        let signal: &Signal = $signal;
        let built = match signal.protocol {
            Protocol::HttpProtobuf => {
                let builder = $exporter::builder()
                    .with_http()
                    .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                    .with_timeout(signal.timeout)
                    .with_http_client($transport.http(signal.timeout)?);
                builder.with_endpoint(&signal.endpoint).build()
            }
            #[cfg(feature = "otlp-grpc")]
            Protocol::Grpc => {
                use opentelemetry_otlp::{WithTonicConfig, tonic_types::transport::ClientTlsConfig};
                let _within = $transport.runtime()?;
                let mut builder = $exporter::builder().with_tonic().with_timeout(signal.timeout);
                if signal.place.starts_with("https://") {
                    // Without this, TLS has no root certificates.
                    builder = builder.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
                }
                builder.with_endpoint(&signal.endpoint).build()
            }
            #[cfg(not(feature = "otlp-grpc"))]
            Protocol::Grpc => Err(ExporterBuildError::InvalidConfiguration(
                "gRPC needs the cargo feature otlp-grpc".to_owned(),
            )),
        };
        built.map_err(|error| InitError::exporter(signal, error))?
    }};
}

/// The HTTP clients and the gRPC runtime, created when the first exporter needs one.
struct Transport<'a> {
    /// No endpoint is `https`.
    plaintext: bool,
    /// A client for each timeout.
    http: Vec<(Duration, reqwest::blocking::Client)>,
    #[cfg(feature = "otlp-grpc")]
    runtime: &'a mut GrpcRuntime,
    #[cfg(not(feature = "otlp-grpc"))]
    _runtime: std::marker::PhantomData<&'a ()>,
}

impl Transport<'_> {
    /// Returns a blocking client, since exports run on threads without a runtime.
    fn http(&mut self, timeout: Duration) -> Result<reqwest::blocking::Client, InitError> {
        if let Some((_, client)) = self.http.iter().find(|(its, _)| *its == timeout) {
            return Ok(client.clone());
        }
        let client = reqwest::blocking::Client::builder().timeout(timeout);
        // Loading the certificates of the system is the slowest part of the set-up, and needed for TLS only.
        let client = if self.plaintext { client.tls_certs_only([]) } else { client };
        // A blocking client must not be built on a thread of a runtime.
        let built = std::thread::spawn(move || client.build()).join();
        let built = built.map_err(|_| InitError::transport("the HTTP client", "its thread panicked"))?;
        let client = built.map_err(|error| InitError::transport("the HTTP client", error))?;
        self.http.push((timeout, client.clone()));
        Ok(client)
    }

    #[cfg(feature = "otlp-grpc")]
    fn runtime(&mut self) -> Result<tokio::runtime::EnterGuard<'_>, InitError> {
        if self.runtime.0.is_none() {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .thread_name("fraiseql-otlp")
                .enable_all()
                .build();
            self.runtime.0 = Some(runtime.map_err(|error| InitError::transport("the gRPC runtime", error))?);
        }
        let runtime = self.runtime.0.as_ref().map(tokio::runtime::Runtime::enter);
        runtime.ok_or_else(|| InitError::transport("the gRPC runtime", "it is missing"))
    }
}

impl Providers {
    pub(super) fn new(settings: &Settings, health: &Arc<Health>) -> Result<Self, InitError> {
        let mut providers = Self::default();
        let signals = [&settings.traces, &settings.metrics, &settings.logs];
        let mut transport = Transport {
            plaintext: signals.iter().all(|signal| signal.place.starts_with("http://")),
            http: Vec::new(),
            #[cfg(feature = "otlp-grpc")]
            runtime: &mut providers.runtime,
            #[cfg(not(feature = "otlp-grpc"))]
            _runtime: std::marker::PhantomData,
        };
        let resource = resource(settings);
        let tracer = tracer(settings, &mut transport, health, &resource)?;
        let meter = meter(settings, &mut transport, health, &resource)?;
        let logger = logger(settings, &mut transport, health, &resource)?;
        (providers.tracer, providers.meter, providers.logger) = (tracer, meter, logger);
        Ok(providers)
    }
}

/// Describes the service. The SDK's detector for `OTEL_RESOURCE_ATTRIBUTES` does not decode them, so it is left out.
fn resource(settings: &Settings) -> Resource {
    let resource = Resource::builder_empty()
        .with_detector(Box::new(SdkProvidedResourceDetector))
        .with_detector(Box::new(TelemetryResourceDetector))
        // Without it, the series of all instances of a service would be the same.
        .with_attribute(KeyValue::new("service.instance.id", Uuid::new_v4().to_string()))
        .with_attributes(settings.resource.clone());
    match &settings.service_name {
        // Takes precedence over a service.name among the attributes.
        Some(name) => resource.with_service_name(name.clone()).build(),
        None => resource.build(),
    }
}

fn tracer(
    settings: &Settings,
    transport: &mut Transport<'_>,
    health: &Arc<Health>,
    resource: &Resource,
) -> Result<Option<SdkTracerProvider>, InitError> {
    let signal = &settings.traces;
    let mut builder =
        SdkTracerProvider::builder().with_resource(resource.clone()).with_sampler(settings.sampler.clone());
    for exporter in &signal.exporters {
        builder = match exporter {
            Exporter::Console => builder.with_simple_exporter(opentelemetry_stdout::SpanExporter::default()),
            Exporter::Otlp => {
                let exporter = Reported::new(exporter!(SpanExporter, signal, transport), signal, health);
                let BatchLimits { queue, most, delay } = settings.spans;
                let bounds = SpanBatch::default()
                    .with_max_queue_size(queue)
                    .with_max_export_batch_size(most)
                    .with_scheduled_delay(delay);
                builder.with_span_processor(
                    BatchSpanProcessor::builder(exporter).with_batch_config(bounds.build()).build(),
                )
            }
        };
    }
    Ok((!signal.exporters.is_empty()).then(|| builder.build()))
}

fn meter(
    settings: &Settings,
    transport: &mut Transport<'_>,
    health: &Arc<Health>,
    resource: &Resource,
) -> Result<Option<SdkMeterProvider>, InitError> {
    let signal = &settings.metrics;
    let wide = |instrument: &Instrument| {
        let (_, series) = WIDE.iter().find(|(name, _)| *name == instrument.name())?;
        Stream::builder().with_cardinality_limit(MOST_VALUES * series + SPARE).build().ok()
    };
    let mut builder = SdkMeterProvider::builder().with_resource(resource.clone()).with_view(wide);
    let interval = settings.metric_interval;
    for exporter in &signal.exporters {
        builder = match exporter {
            Exporter::Console => builder.with_reader(
                PeriodicReader::builder(opentelemetry_stdout::MetricExporter::default())
                    .with_interval(interval)
                    .build(),
            ),
            Exporter::Otlp => {
                let exporter = Reported::new(exporter!(MetricExporter, signal, transport), signal, health);
                builder.with_reader(PeriodicReader::builder(exporter).with_interval(interval).build())
            }
        };
    }
    Ok((!signal.exporters.is_empty()).then(|| builder.build()))
}

fn logger(
    settings: &Settings,
    transport: &mut Transport<'_>,
    health: &Arc<Health>,
    resource: &Resource,
) -> Result<Option<SdkLoggerProvider>, InitError> {
    let signal = &settings.logs;
    let mut builder = SdkLoggerProvider::builder().with_resource(resource.clone());
    for exporter in &signal.exporters {
        builder = match exporter {
            Exporter::Console => builder.with_simple_exporter(opentelemetry_stdout::LogExporter::default()),
            Exporter::Otlp => {
                let exporter = Reported::new(exporter!(LogExporter, signal, transport), signal, health);
                let BatchLimits { queue, most, delay } = settings.records;
                let bounds = RecordBatch::default()
                    .with_max_queue_size(queue)
                    .with_max_export_batch_size(most)
                    .with_scheduled_delay(delay);
                builder.with_log_processor(
                    BatchLogProcessor::builder(exporter).with_batch_config(bounds.build()).build(),
                )
            }
        };
    }
    Ok((!signal.exporters.is_empty()).then(|| builder.build()))
}
