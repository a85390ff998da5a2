//! Logs export failures once, so that an unreachable collector does not fill the log of the service.

use std::fmt;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{LogBatch, LogExporter};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use reqwest::Url;

use super::signal::Signal;
use crate::sync::lock;
use crate::telemetry::SCOPE;

/// The export health of all signals of one guard.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// The signals whose last export failed.
    failing: Mutex<Vec<&'static str>>,
}

impl Health {
    /// Records that these signals fail. Returns whether no signal was failing before.
    pub(super) fn is_first_failure(&self, signals: &[&'static str]) -> bool {
        let mut failing = lock(&self.failing);
        let is_first = failing.is_empty();
        failing.extend(signals);
        is_first
    }

    /// Records the result of an export. Logs the first failure, and the recovery of the last failing signal.
    fn record(&self, signal: &'static str, place: &str, result: &OTelSdkResult) {
        let mut failing = lock(&self.failing);
        let before = failing.len();
        failing.retain(|other| *other != signal);
        match result {
            Ok(()) if before > 0 && failing.is_empty() => {
                drop(failing);
                tracing::info!(target: SCOPE, "exporting to {place} recovered");
            }
            Ok(()) => {}
            Err(error) => {
                failing.push(signal);
                drop(failing);
                if before == 0 {
                    let why = unreachable(place).unwrap_or_else(|| error.to_string());
                    tracing::warn!(
                        target: SCOPE,
                        "exporting {signal} to {place} failed: {why}; rows are not affected, and further failures are not logged until export recovers"
                    );
                }
            }
        }
    }
}

/// Returns why a connection to a place fails, or `None` if it succeeds. The exporter says "network error" only.
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

/// An exporter whose failures are logged.
pub(super) struct Reported<E> {
    exporter: E,
    signal: &'static str,
    place: String,
    health: Arc<Health>,
}

impl<E> Reported<E> {
    pub(super) fn new(exporter: E, signal: &Signal, health: &Arc<Health>) -> Self {
        Self { exporter, signal: signal.name, place: signal.place.clone(), health: Arc::clone(health) }
    }

    fn record(&self, result: OTelSdkResult) -> OTelSdkResult {
        self.health.record(self.signal, &self.place, &result);
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
        self.record(self.exporter.export(batch).await)
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
        self.record(self.exporter.export(batch).await)
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
        self.record(self.exporter.export(metrics).await)
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
