//! One stream's telemetry: what is recorded at its start, at each poll batch, and once at its end.

use std::sync::Arc;

use opentelemetry::KeyValue;
use tokio_postgres::error::SqlState;
use tracing::{debug, info, record_all};

use super::database::Database;
use super::ends::End;
use super::registry::{Live, REFUSED};
use super::spans::{BatchSpans, PollBatch, QueryInfo, QuerySpan, int, seconds};
use super::{FIRST_ROW, Instruments, PollSpans, SCOPE};
use crate::channel::{Nanos, Observer, Stats};
use crate::error::Error;

#[derive(Debug)]
pub(crate) struct Recorder {
    instruments: Instruments,
    stream: Observer,
    span: QuerySpan,
    batches: BatchSpans,
    database: Arc<Database>,
    /// That of the entity's name, if it has one.
    schema: Option<String>,
    state: State,
    first_row: bool,
}

#[derive(Debug)]
enum State {
    /// Postgres has not accepted the query yet; the entity may be anything.
    Offered,
    Accepted(Live),
    Ended,
}

impl Recorder {
    /// A query is about to be sent: its span opens below the caller's current span. In metrics, the stream
    /// begins when it is [`accepted`](Self::accepted).
    pub(crate) fn start(
        instruments: &Instruments,
        stream: Observer,
        query: QueryInfo<'_>,
        spans: PollSpans,
    ) -> Self {
        let span = QuerySpan::open(&query);
        span.get().in_scope(|| debug!(target: SCOPE, entity = &*stream.entity, "stream started"));
        Self {
            instruments: instruments.clone(),
            stream,
            batches: BatchSpans::new(spans, &span),
            span,
            database: Arc::clone(query.database),
            schema: query.schema,
            state: State::Offered,
            first_row: false,
        }
    }

    /// Postgres has accepted the query, and its values fit: the series of its entity begin.
    pub(crate) fn accepted(&mut self) {
        if let State::Offered = self.state {
            let registry = &self.instruments.0.registry;
            let live = Live::new(registry, &self.stream, &self.database, self.schema.as_deref());
            self.state = State::Accepted(live);
        }
    }

    pub(crate) fn span(&self) -> &QuerySpan {
        &self.span
    }

    /// A poll begins that is not served from the chunk in hand.
    pub(crate) fn polled(&mut self, now: Nanos) {
        if self.batches.is_wanted() {
            self.batches.begin(&self.span, now, self.stream.gauge.decode_time());
        }
    }

    /// The poll got a chunk.
    pub(crate) fn taken(&mut self, now: Nanos, batch: &PollBatch) {
        // Only what was accepted has rows.
        let State::Accepted(live) = &self.state else { return };
        let (instruments, gauge) = (&self.instruments.0, &self.stream.gauge);
        let by_rows = batch.rows_before as f64 / gauge.row_limit as f64;
        let by_bytes = batch.bytes_before as f64 / gauge.byte_limit as f64;
        instruments.occupancy.record(batch.rows_before as u64, live.attributes());
        instruments.utilization.record(by_rows.max(by_bytes), live.attributes());
        instruments.chunk_size.record(batch.rows as u64, live.attributes());
        if !self.first_row {
            self.first_row = true;
            instruments.time_to_first_row.record(seconds(now), live.attributes());
            debug!(target: FIRST_ROW, parent: &self.span.get(), "first row");
        }
        self.batches.taken(now, batch);
    }

    /// The stream is over; only the first call counts. `None`: it was dropped before its end. One that was never
    /// accepted counts under `REFUSED`.
    pub(crate) fn ended(&mut self, end: Option<Result<(), &Error>>) {
        let end = match end {
            None => End::Dropped,
            Some(Ok(())) => End::Complete,
            Some(Err(error)) => End::Failed(error),
        };
        let registry = &self.instruments.0.registry;
        let database = match std::mem::replace(&mut self.state, State::Ended) {
            State::Ended => return,
            State::Accepted(live) => live.end(end),
            State::Offered => {
                registry.refused(end);
                self.database.attributes(&REFUSED.into(), None)
            }
        };
        let stats = self.stream.stats();
        self.record_operation(&stats, end, database);
        self.batches.close(self.stream.gauge.decode_time());
        self.end_span(&stats, end);
        match end {
            // The query is cancelled now, in a span below this one.
            End::Dropped => self.span.defer_close(),
            End::Complete | End::Failed(_) => self.span.close(),
        }
    }

    fn record_operation(&self, stats: &Stats, end: End<'_>, mut attributes: Arc<[KeyValue]>) {
        if let Some(error) = end.error() {
            let error_type = KeyValue::new("error.type", error.type_name().to_owned());
            let code = |code: &SqlState| KeyValue::new("db.response.status_code", code.code().to_owned());
            let own = std::iter::once(error_type).chain(error.sqlstate().map(code));
            attributes = attributes.iter().cloned().chain(own).collect();
        }
        let instruments = &self.instruments.0;
        instruments.operation_duration.record(stats.elapsed.as_secs_f64(), &attributes);
        instruments.returned_rows.record(stats.rows + stats.filtered + stats.failed, &attributes);
    }

    fn end_span(&self, stats: &Stats, end: End<'_>) {
        let (span, shares, time) = (self.span.get(), stats.shares(), &stats.time);
        if span.is_disabled() {
            return;
        }
        let error = end.error();
        // All at once: each recording finds the span anew.
        record_all!(
            span,
            fraiseql.outcome = end.outcome(),
            fraiseql.verdict = stats.verdict().as_str(),
            fraiseql.share.backlog = shares.backlog,
            fraiseql.share.source_wait = shares.source_wait,
            fraiseql.share.scheduled = shares.scheduled,
            fraiseql.share.overlap = shares.overlap,
            fraiseql.rows = int(stats.rows),
            fraiseql.bytes = int(stats.bytes),
            fraiseql.time.source_wait = time.source_wait.as_secs_f64(),
            fraiseql.time.scheduled = time.scheduled.as_secs_f64(),
            fraiseql.time.decode = time.decode.as_secs_f64(),
            fraiseql.time.consumer = time.consumer.as_secs_f64(),
            fraiseql.time.paused = time.paused.as_secs_f64(),
            db.response.returned_rows = int(stats.rows + stats.filtered + stats.failed),
            db.response.status_code = error.and_then(Error::sqlstate).map(SqlState::code),
            error.type = error.map(Error::type_name),
            otel.status_code = error.map(|_| "error"),
            otel.status_description = error.map(|error| description(error, stats)),
        );
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
