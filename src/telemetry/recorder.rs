//! One stream's telemetry: what is recorded at its start, at each poll batch, and once at its end.

use opentelemetry::KeyValue;
use tracing::{debug, info};

use super::registry::Live;
use super::spans::{Batch, BatchSpans, Query, QuerySpan, int, seconds};
use super::{FIRST_ROW, Instruments, PollSpans, SCOPE};
use crate::error::Error;
use crate::stats::{Observer, Stats};
use crate::time::Nanos;

#[derive(Debug)]
pub(crate) struct Recorder {
    instruments: Instruments,
    stream: Observer,
    span: QuerySpan,
    batches: BatchSpans,
    entity: KeyValue,
    /// Attributes of the `db.client` metrics.
    database: Vec<KeyValue>,
    live: Option<Live>,
    first_row: bool,
}

impl Recorder {
    /// The stream begins: its query span opens below the caller's current span.
    pub(crate) fn start(
        instruments: &Instruments,
        stream: Observer,
        query: &Query<'_>,
        spans: PollSpans,
    ) -> Self {
        let entity = instruments.0.registry.entity(&stream.entity);
        let span = QuerySpan::open(query);
        span.get().in_scope(|| debug!(target: SCOPE, entity = &*stream.entity, "stream started"));
        Self {
            instruments: instruments.clone(),
            batches: BatchSpans::new(spans, &span),
            span,
            entity: entity.attribute.clone(),
            database: database(query, &entity.attribute),
            live: Some(Live::new(entity, stream.clone())),
            stream,
            first_row: false,
        }
    }

    pub(crate) fn span(&self) -> &QuerySpan {
        &self.span
    }

    /// A poll begins that is not served from the chunk in hand.
    pub(crate) fn polled(&mut self, now: Nanos) {
        if self.batches.is_wanted() {
            self.batches.begin(&self.span, now, self.stream.gauge.ledger.read_decode());
        }
    }

    /// The poll got a chunk.
    pub(crate) fn taken(&mut self, now: Nanos, batch: &Batch) {
        let (instruments, gauge) = (&self.instruments.0, &self.stream.gauge);
        let entity = std::slice::from_ref(&self.entity);
        let by_rows = batch.rows_before as f64 / gauge.row_limit as f64;
        let by_bytes = batch.bytes_before as f64 / gauge.byte_limit as f64;
        instruments.occupancy.record(batch.rows_before as u64, entity);
        instruments.utilization.record(by_rows.max(by_bytes), entity);
        instruments.chunk_size.record(batch.rows as u64, entity);
        if !self.first_row {
            self.first_row = true;
            instruments.time_to_first_row.record(seconds(now), entity);
            self.span.get().in_scope(|| debug!(target: FIRST_ROW, "first row"));
        }
        self.batches.taken(now, batch);
    }

    /// The stream is over; only the first call counts. `None`: it was dropped before its end.
    pub(crate) fn ended(&mut self, end: Option<Result<(), &Error>>) {
        // Folds the stream into its entity's totals.
        if self.live.take().is_none() {
            return;
        }
        let stats = self.stream.stats();
        let (outcome, error) = match end {
            None => ("dropped", None),
            Some(Ok(())) => ("complete", None),
            Some(Err(error)) => ("failed", Some(error)),
        };
        self.count_end(&stats, outcome, error);
        self.batches.close(self.stream.gauge.ledger.read_decode());
        self.end_span(&stats, outcome, error);
        match end {
            Some(_) => self.span.close(),
            // The query is cancelled now, and its cancel told below the span.
            None => self.span.linger(),
        }
    }

    fn count_end(&self, stats: &Stats, outcome: &'static str, error: Option<&Error>) {
        let instruments = &self.instruments.0;
        let error_type = error.map(|error| KeyValue::new("error.type", error.type_name().to_owned()));
        let attributes: Vec<_> = [self.entity.clone(), KeyValue::new("outcome", outcome)]
            .into_iter()
            .chain(error_type.clone())
            .collect();
        instruments.ended.add(1, &attributes);
        let mut database = self.database.clone();
        database.extend(error_type);
        if let Some(code) = error.and_then(Error::sqlstate) {
            database.push(KeyValue::new("db.response.status_code", code.code().to_owned()));
        }
        instruments.operation_duration.record(stats.elapsed.as_secs_f64(), &database);
        instruments.returned_rows.record(stats.rows + stats.filtered + stats.failed, &database);
    }

    fn end_span(&self, stats: &Stats, outcome: &str, error: Option<&Error>) {
        let (span, shares, time) = (&self.span.get(), stats.shares(), &stats.time);
        if span.is_disabled() {
            return;
        }
        span.record("fraiseql.outcome", outcome);
        span.record("fraiseql.verdict", stats.verdict().as_str());
        span.record("fraiseql.share.backlog", shares.backlog);
        span.record("fraiseql.share.source_wait", shares.source_wait);
        span.record("fraiseql.share.scheduled", shares.scheduled);
        span.record("fraiseql.share.overlap", shares.overlap);
        span.record("fraiseql.rows", int(stats.rows));
        span.record("fraiseql.bytes", int(stats.bytes));
        span.record("fraiseql.time.source_wait", time.source_wait.as_secs_f64());
        span.record("fraiseql.time.scheduled", time.scheduled.as_secs_f64());
        span.record("fraiseql.time.decode", time.decode.as_secs_f64());
        span.record("fraiseql.time.consumer", time.consumer.as_secs_f64());
        span.record("fraiseql.time.paused", time.paused.as_secs_f64());
        span.record("db.response.returned_rows", int(stats.rows + stats.filtered + stats.failed));
        if let Some(error) = error {
            span.record("error.type", error.type_name());
            span.record("otel.status_code", "error");
            span.record("otel.status_description", description(error, stats));
            if let Some(code) = error.sqlstate() {
                span.record("db.response.status_code", code.code());
            }
        }
        // The exporting layer takes the last exit of a span as its end: here, before any clean-up.
        span.in_scope(|| ());
    }
}

/// What went wrong, without the server's words where they quote values of the query or of rows: in data
/// exceptions (class 22) and violated constraints (class 23).
fn description(error: &Error, stats: &Stats) -> String {
    match error.type_name() {
        code if code.starts_with("22") || code.starts_with("23") => format!("{code} {}", stats.summary()),
        _ => error.to_string(),
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.ended(None);
    }
}

fn database(query: &Query<'_>, entity: &KeyValue) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("db.system.name", "postgresql"),
        // Not the entity's own name, but that of its series: bounded in number.
        KeyValue::new("db.collection.name", entity.value.clone()),
        KeyValue::new("db.operation.name", "SELECT"),
        KeyValue::new("server.address", query.address.to_owned()),
    ];
    if let Some(namespace) = &query.namespace {
        attributes.push(KeyValue::new("db.namespace", namespace.clone()));
    }
    if let Some(port) = query.port {
        attributes.push(KeyValue::new("server.port", i64::from(port)));
    }
    attributes
}

/// Logs now and then how a stream is, with its trace id: its root span is exported only at its end, which may be
/// hours away.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    stream: Observer,
    query: QuerySpan,
}

impl Heartbeat {
    pub(crate) const EVERY: std::time::Duration = std::time::Duration::from_secs(30);

    pub(crate) fn new(stream: Observer, query: QuerySpan) -> Self {
        Self { stream, query }
    }

    pub(crate) fn log(&self) {
        let stats = self.stream.stats();
        let span = self.query.get();
        let _in_query = span.enter();
        info!(
            target: SCOPE,
            entity = &*stats.entity,
            rows = int(stats.rows),
            bytes = int(stats.bytes),
            buffered_rows = int(stats.buffered_rows as u64),
            verdict = stats.verdict().as_str(),
            verdict_recent = stats.recent().verdict().as_str(),
            "{stats}",
        );
    }
}
