//! Counts exports, and logs failures once, so that an unreachable collector does not fill the log of the service.

use std::error::Error;
use std::fmt;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::{LogBatch, LogExporter};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData, ResourceMetrics, ScopeMetrics};
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use reqwest::Url;
use reqwest::blocking::Client;

use super::signal::Signal;
use super::tally::Tally;
use crate::sync::lock;
use crate::telemetry::SCOPE;

/// The export health of all signals of one guard.
#[derive(Debug, Default)]
pub(super) struct Health {
    outage: Mutex<Outage>,
    pub(super) spans: Tally,
    pub(super) records: Tally,
    pub(super) points: Tally,
}

/// The time from the first failed export until every signal is delivered again.
#[derive(Debug, Default)]
struct Outage {
    /// The signals whose last export failed.
    failing: Vec<&'static str>,
    since: Option<Instant>,
    /// Where the first of them failed, and why.
    cause: Option<(String, String)>,
    /// The numbers of spans and records that were lost in the outages before.
    before: [u64; 2],
}

impl Health {
    /// Records that these signals fail. Returns whether no signal was failing before.
    pub(super) fn is_first_failure(&self, signals: &[&'static str]) -> bool {
        let mut outage = lock(&self.outage);
        let is_first = outage.failing.is_empty();
        outage.failing.extend(signals);
        is_first
    }

    /// Returns why the current outage began, if it began at this place.
    pub(super) fn cause(&self, at: &str) -> Option<String> {
        lock(&self.outage).cause.as_ref().filter(|(place, _)| place == at).map(|(_, why)| why.clone())
    }

    fn tally(&self, signal: &str) -> &Tally {
        match signal {
            "traces" => &self.spans,
            "logs" => &self.records,
            _ => &self.points,
        }
    }

    /// Returns the numbers of spans and records that could not be delivered so far.
    fn lost(&self) -> [u64; 2] {
        [&self.spans, &self.records].map(|tally| tally.failed.load(Ordering::Relaxed))
    }

    /// Records the result of an export. Logs the first failure, and the recovery of the last failing signal.
    fn record(&self, (signal, place): (&'static str, &str), error: Option<impl FnOnce() -> String>) {
        let mut outage = lock(&self.outage);
        let was_failing = !outage.failing.is_empty();
        outage.failing.retain(|other| *other != signal);
        match error {
            None if was_failing && outage.failing.is_empty() => {
                let lost = self.lost();
                let before = std::mem::replace(&mut outage.before, lost);
                outage.cause = None;
                let seconds = outage.since.take().map_or(0.0, |since| since.elapsed().as_secs_f64());
                drop(outage);
                let [spans, records] = [lost[0] - before[0], lost[1] - before[1]];
                // As a warning, since it is for those who saw the first one, and says what is missing.
                tracing::warn!(
                    target: SCOPE,
                    "exporting to {place} recovered after {seconds:.1} s, in which {spans} spans and {records} log records were lost"
                );
            }
            None => {}
            Some(find_why) => {
                outage.failing.push(signal);
                if was_failing {
                    return;
                }
                outage.since = Some(Instant::now());
                drop(outage);
                let why = find_why();
                lock(&self.outage).cause = Some((place.to_owned(), why.clone()));
                tracing::warn!(
                    target: SCOPE,
                    "exporting {signal} to {place} failed: {why}; rows are not affected, and further failures are not logged until export recovers"
                );
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

/// An exporter whose failures are logged and counted.
pub(super) struct Reported<E> {
    exporter: E,
    signal: &'static str,
    place: String,
    health: Arc<Health>,
    /// The client whose connections show why encrypted ones fail, unless the exporter says so itself.
    probe: Option<Client>,
}

impl<E> Reported<E> {
    pub(super) fn new(exporter: E, signal: &Signal, health: &Arc<Health>) -> Self {
        let (place, health) = (signal.place.clone(), Arc::clone(health));
        Self { exporter, signal: signal.name, place, health, probe: None }
    }

    pub(super) fn with_probe(self, probe: Option<Client>) -> Self {
        Self { probe, ..self }
    }

    /// Records the result of exporting a number of items.
    fn record(&self, number: usize, result: OTelSdkResult) -> OTelSdkResult {
        let tally = self.health.tally(self.signal);
        tally.count_export(number, result.is_ok());
        let why = result.as_ref().err().map(|error| || self.why(error));
        self.health.record((self.signal, &self.place), why);
        if let Some(dropped) = tally.drops_to_report(Instant::now()) {
            let (what, kind) =
                if self.signal == "traces" { ("spans", "BSP") } else { ("log records", "BLRP") };
            tracing::warn!(
                target: SCOPE,
                "{dropped} {what} were dropped: they are recorded faster than exported, and their queue was full; record fewer, or raise OTEL_{kind}_MAX_QUEUE_SIZE"
            );
        }
        result
    }

    fn why(&self, error: &OTelSdkError) -> String {
        unreachable(&self.place).or_else(|| self.refusal()).unwrap_or_else(|| error.to_string())
    }

    /// Returns why an encrypted connection fails.
    fn refusal(&self) -> Option<String> {
        let request = self.probe.as_ref()?.head(&self.place).timeout(Duration::from_secs(1));
        let error = request.send().err()?;
        let causes = std::iter::successors(Some(&error as &dyn Error), |error| (*error).source());
        causes.last().map(ToString::to_string)
    }
}

impl<E> fmt::Debug for Reported<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reported").field("place", &self.place).finish_non_exhaustive()
    }
}

impl<E: SpanExporter> SpanExporter for Reported<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let number = batch.len();
        self.health.spans.take(number);
        self.record(number, self.exporter.export(batch).await)
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
        let number = batch.iter().count();
        self.health.records.take(number);
        self.record(number, self.exporter.export(batch).await)
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
        self.record(points(metrics), self.exporter.export(metrics).await)
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

/// Returns the number of data points.
fn points(metrics: &ResourceMetrics) -> usize {
    let metrics = metrics.scope_metrics().flat_map(ScopeMetrics::metrics);
    let numbers = metrics.map(|metric| match metric.data() {
        AggregatedMetrics::F64(data) => points_of(data),
        AggregatedMetrics::U64(data) => points_of(data),
        AggregatedMetrics::I64(data) => points_of(data),
    });
    numbers.sum()
}

fn points_of<T>(data: &MetricData<T>) -> usize {
    match data {
        MetricData::Gauge(gauge) => gauge.data_points().count(),
        MetricData::Sum(sum) => sum.data_points().count(),
        MetricData::Histogram(histogram) => histogram.data_points().count(),
        MetricData::ExponentialHistogram(histogram) => histogram.data_points().count(),
    }
}
