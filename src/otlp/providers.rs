//! Builds providers and exporters from the settings.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
#[cfg(not(feature = "otlp-grpc"))]
use opentelemetry_otlp::ExporterBuildError;
#[cfg(feature = "otlp-grpc")]
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::{BatchConfigBuilder as RecordBatch, BatchLogProcessor, SdkLoggerProvider};
use opentelemetry_sdk::metrics::{
    Aggregation, Instrument, InstrumentKind, PeriodicReader, SdkMeterProvider, Stream,
};
use opentelemetry_sdk::resource::TelemetryResourceDetector;
use opentelemetry_sdk::trace::{BatchConfigBuilder as SpanBatch, BatchSpanProcessor, SdkTracerProvider};
use reqwest::header::{HeaderName, HeaderValue};
use uuid::Uuid;

use super::bounded::Bounded;
use super::error::InitError;
use super::report::{Health, Reported};
use super::self_metrics;
use super::settings::{BatchLimits, Settings};
use super::signal::{Exporter, Protocol, Signal};
use super::tls::{Pem, Tls};
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
    ($builder:expr, $signal:expr, $transport:expr) => {{
        let signal: &Signal = $signal;
        let built = match signal.protocol {
            Protocol::HttpProtobuf => {
                let builder = $builder
                    .with_http()
                    .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                    .with_timeout(signal.timeout)
                    .with_headers(encoded_headers(signal))
                    .with_http_client($transport.http(signal)?);
                builder.with_endpoint(&signal.endpoint).build()
            }
            #[cfg(feature = "otlp-grpc")]
            Protocol::Grpc => {
                use opentelemetry_otlp::{WithTonicConfig, tonic_types::metadata::MetadataMap};
                let _within = $transport.runtime()?;
                let mut builder = $builder.with_tonic().with_timeout(signal.timeout);
                builder = builder.with_metadata(MetadataMap::from_headers(signal.headers.clone()));
                if signal.is_encrypted() {
                    builder = builder.with_tls_config(grpc_tls(&signal.tls.load()?));
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

/// Returns the headers in the form that the exporter decodes.
fn encoded_headers(signal: &Signal) -> HashMap<String, String> {
    let text = |(key, value): (&HeaderName, &HeaderValue)| {
        Some((key.as_str().to_owned(), value.to_str().ok()?.replace('%', "%25")))
    };
    signal.headers.iter().filter_map(text).collect()
}

#[cfg(feature = "otlp-grpc")]
fn grpc_tls(pem: &Pem) -> ClientTlsConfig {
    let tls = match &pem.authorities {
        Some(authorities) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities)),
        // Without this, TLS has no root certificates.
        None => ClientTlsConfig::new().with_enabled_roots(),
    };
    match &pem.identity {
        Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
        None => tls,
    }
}

/// The HTTP clients and the gRPC runtime, created when the first exporter needs one.
struct Transport<'a> {
    /// A client for each timeout and way of encryption.
    http: Vec<(HttpKind, reqwest::blocking::Client)>,
    #[cfg(feature = "otlp-grpc")]
    runtime: &'a mut GrpcRuntime,
    #[cfg(not(feature = "otlp-grpc"))]
    _runtime: std::marker::PhantomData<&'a ()>,
}

impl Transport<'_> {
    /// Returns a blocking client, since exports run on threads without a runtime.
    fn http(&mut self, signal: &Signal) -> Result<reqwest::blocking::Client, InitError> {
        let kind = (signal.timeout, signal.is_encrypted().then(|| signal.tls.clone()));
        if let Some((_, client)) = self.http.iter().find(|(its, _)| *its == kind) {
            return Ok(client.clone());
        }
        let pem = kind.1.as_ref().map(Tls::load).transpose()?;
        let timeout = signal.timeout;
        // A blocking client must not be built on a thread of a runtime.
        let built = std::thread::spawn(move || http_client(timeout, pem)).join();
        let built = built.map_err(|_| InitError::transport("the HTTP client", "its thread panicked"))?;
        let client = built.map_err(|error| InitError::transport("the HTTP client", error))?;
        self.http.push((kind, client.clone()));
        Ok(client)
    }

    /// Returns the client that shows why an encrypted connection fails. The exporter for gRPC says so itself.
    fn probe(&mut self, signal: &Signal) -> Result<Option<reqwest::blocking::Client>, InitError> {
        let is_needed = signal.protocol == Protocol::HttpProtobuf && signal.is_encrypted();
        is_needed.then(|| self.http(signal)).transpose()
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

/// The timeout of a client, and how it encrypts.
type HttpKind = (Duration, Option<Tls>);

fn http_client(timeout: Duration, pem: Option<Pem>) -> reqwest::Result<reqwest::blocking::Client> {
    let client = reqwest::blocking::Client::builder().timeout(timeout);
    let Some(pem) = pem else {
        // Loading the certificates of the system is the slowest part of the set-up, and needed for TLS only.
        return client.tls_certs_only([]).build();
    };
    let client = match pem.authorities {
        Some(authorities) => client.tls_certs_only(reqwest::Certificate::from_pem_bundle(&authorities)?),
        None => client,
    };
    match pem.identity {
        Some((certificate, key)) => {
            client.identity(reqwest::Identity::from_pem(&[key.as_slice(), b"\n", &certificate].concat())?)
        }
        None => client,
    }
    .build()
}

impl Providers {
    pub(super) fn new(settings: &Settings, health: &Arc<Health>) -> Result<Self, InitError> {
        let mut providers = Self::default();
        let mut transport = Transport {
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
        if let Some(meter) = &meter {
            self_metrics::observe(meter, health, settings);
        }
        (providers.tracer, providers.meter, providers.logger) = (tracer, meter, logger);
        Ok(providers)
    }
}

/// Describes the service. The SDK's own detectors of variables are left out.
fn resource(settings: &Settings) -> Resource {
    Resource::builder_empty()
        .with_detector(Box::new(TelemetryResourceDetector))
        // Without it, the series of all instances of a service would be the same.
        .with_attribute(KeyValue::new("service.instance.id", Uuid::new_v4().to_string()))
        .with_attributes(settings.resource.clone())
        .build()
}

fn tracer(
    settings: &Settings,
    transport: &mut Transport<'_>,
    health: &Arc<Health>,
    resource: &Resource,
) -> Result<Option<SdkTracerProvider>, InitError> {
    let signal = &settings.traces;
    let mut builder = SdkTracerProvider::builder()
        .with_resource(resource.clone())
        .with_sampler(settings.sampler.clone())
        .with_span_limits(settings.span_limits);
    for exporter in &signal.exporters {
        builder = match exporter {
            Exporter::Console => builder.with_simple_exporter(opentelemetry_stdout::SpanExporter::default()),
            Exporter::Otlp => {
                let exporter = exporter!(SpanExporter::builder(), signal, transport);
                let exporter = Reported::new(exporter, signal, health).with_probe(transport.probe(signal)?);
                let BatchLimits { queue, most, delay } = settings.spans;
                let bounds = SpanBatch::default()
                    .with_max_queue_size(queue)
                    .with_max_export_batch_size(most)
                    .with_scheduled_delay(delay);
                let processor = BatchSpanProcessor::builder(exporter).with_batch_config(bounds.build());
                builder.with_span_processor(Bounded::new(processor.build(), queue, health))
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
    let exponential = settings.exponential;
    let view = move |instrument: &Instrument| stream(instrument, exponential);
    let mut provider = SdkMeterProvider::builder().with_resource(resource.clone()).with_view(view);
    let interval = settings.metric_interval;
    for exporter in &signal.exporters {
        provider = match exporter {
            Exporter::Console => provider.with_reader(
                PeriodicReader::builder(opentelemetry_stdout::MetricExporter::default())
                    .with_interval(interval)
                    .build(),
            ),
            Exporter::Otlp => {
                let builder = MetricExporter::builder().with_temporality(settings.temporality);
                let exporter = exporter!(builder, signal, transport);
                let exporter = Reported::new(exporter, signal, health).with_probe(transport.probe(signal)?);
                provider.with_reader(PeriodicReader::builder(exporter).with_interval(interval).build())
            }
        };
    }
    Ok((!signal.exporters.is_empty()).then(|| provider.build()))
}

/// Returns how an instrument is aggregated, if the SDK's default would not do.
fn stream(instrument: &Instrument, exponential: bool) -> Option<Stream> {
    let wide = WIDE.iter().find(|(name, _)| *name == instrument.name());
    let mut stream = Stream::builder();
    if let Some((_, series)) = wide {
        stream = stream.with_cardinality_limit(MOST_VALUES * series + SPARE);
    }
    let is_exponential = exponential && instrument.kind() == InstrumentKind::Histogram;
    if is_exponential {
        // The specification gives these figures.
        stream = stream.with_aggregation(Aggregation::Base2ExponentialHistogram {
            max_size: 160,
            max_scale: 20,
            record_min_max: true,
        });
    }
    (wide.is_some() || is_exponential).then(|| stream.build().ok()).flatten()
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
                let exporter = exporter!(LogExporter::builder(), signal, transport);
                let exporter = Reported::new(exporter, signal, health).with_probe(transport.probe(signal)?);
                let BatchLimits { queue, most, delay } = settings.records;
                let bounds = RecordBatch::default()
                    .with_max_queue_size(queue)
                    .with_max_export_batch_size(most)
                    .with_scheduled_delay(delay);
                let processor = BatchLogProcessor::builder(exporter).with_batch_config(bounds.build());
                builder.with_log_processor(Bounded::new(processor.build(), queue, health))
            }
        };
    }
    Ok((!signal.exporters.is_empty()).then(|| builder.build()))
}
