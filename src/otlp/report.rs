//! Export failures, told once: a collector that is away must not fill the service's log.

use std::fmt;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{LogBatch, LogExporter};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use reqwest::Url;

/// Whether telemetry arrives, over all signals of one guard.
#[derive(Debug, Default)]
pub(super) struct Health {
    failing: AtomicBool,
}

impl Health {
    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    fn note(&self, place: &str, result: &OTelSdkResult) {
        match result {
            Ok(()) if self.failing.swap(false, Ordering::Relaxed) => {
                tracing::info!("telemetry is delivered to {place} again");
            }
            Err(error) if !self.failing.swap(true, Ordering::Relaxed) => {
                let why = unreachable(place).unwrap_or_else(|| error.to_string());
                tracing::warn!(
                    "telemetry is not delivered to {place}: {why}; rows are not affected, and this is said once until it works again"
                );
            }
            _ => {}
        }
    }
}

/// The exporter says "network error"; a plain connection attempt says which.
pub(super) fn unreachable(place: &str) -> Option<String> {
    let url = Url::parse(place).ok()?;
    let host = url.host_str()?.trim_matches(['[', ']']);
    let addresses = match (host, url.port_or_known_default()?).to_socket_addrs() {
        Ok(addresses) => addresses,
        Err(error) => return Some(error.to_string()),
    };
    let attempt = |address| TcpStream::connect_timeout(&address, Duration::from_secs(1));
    let attempts: Vec<_> = addresses.map(attempt).collect();
    if attempts.iter().any(Result::is_ok) {
        return None;
    }
    attempts.into_iter().find_map(Result::err).map(|error| error.to_string())
}

/// An exporter whose failures are told.
pub(super) struct Reported<E> {
    exporter: E,
    place: String,
    health: Arc<Health>,
}

impl<E> Reported<E> {
    pub(super) fn new(exporter: E, place: &str, health: &Arc<Health>) -> Self {
        Self { exporter, place: place.to_owned(), health: Arc::clone(health) }
    }

    fn note(&self, result: OTelSdkResult) -> OTelSdkResult {
        self.health.note(&self.place, &result);
        result
    }
}

impl<E> fmt::Debug for Reported<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reported").field("place", &self.place).finish_non_exhaustive()
    }
}

impl<E: SpanExporter> SpanExporter for Reported<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.note(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Reported<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        self.note(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Reported<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.note(self.exporter.export(metrics).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}
