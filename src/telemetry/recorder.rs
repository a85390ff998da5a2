//! `Recorder`: the telemetry of one stream, recorded at its start, at each poll batch, and once at its end.

use std::sync::Arc;

use opentelemetry::KeyValue;
use tokio_postgres::error::SqlState;
use tracing::{debug, info, record_all};

use super::ends::End;
use super::failure::log_failure;
use super::registry::{Live, REFUSED};
use super::spans::{BatchSpans, PollBatch, QueryInfo, QuerySpan, int, seconds};
use super::{FIRST_ROW, Instruments, PollSpans, SCOPE};
use crate::channel::{Nanos, Observer, Stats};
use crate::error::{Error, Recorded};

/// Records the metrics and spans of one stream.
#[derive(Debug)]
pub(crate) struct Recorder {
    instruments: Instruments,
    stream: Observer,
    span: QuerySpan,
    batches: BatchSpans,
    state: State,
    first_row: bool,
}

#[derive(Debug)]
enum State {
    /// Postgres has not accepted the query yet, so the entity may not exist.
    Pending,
    Accepted(Live),
    Ended,
}

impl Recorder {
    /// Opens the span of a query that is about to be sent, as a child of the caller's current span. In metrics, the
    /// stream begins when it is [`accepted`](Self::accepted).
    pub(crate) fn start(
        instruments: &Instruments,
        stream: Observer,
        query: QueryInfo<'_>,
        spans: PollSpans,
    ) -> Self {
        let span = QuerySpan::open(query);
        span.get().in_scope(|| {
            debug!(name: "fraiseql.stream.started", target: SCOPE, entity = &*stream.entity, "stream started");
        });
        Self {
            instruments: instruments.clone(),
            stream,
            batches: BatchSpans::new(spans, &span),
            span,
            state: State::Pending,
            first_row: false,
        }
    }

    /// Records that Postgres has accepted the query and that its values match the parameters. Begins the series of its
    /// entity.
    pub(crate) fn accepted(&mut self) {
        if let State::Pending = self.state {
            let registry = &self.instruments.0.registry;
            let live = Live::new(registry, &self.stream, self.span.database(), self.span.schema());
            self.state = State::Accepted(live);
        }
    }

    /// Returns the span of the query.
    pub(crate) fn span(&self) -> &QuerySpan {
        &self.span
    }

    /// Records that a poll began that needs a further chunk.
    pub(crate) fn polled(&mut self, now: Nanos) {
        if self.batches.is_enabled() {
            self.batches.begin(&self.span, now, self.stream.gauge.decode_time());
        }
    }

    /// Records that the poll took a chunk.
    pub(crate) fn taken(&mut self, now: Nanos, batch: &PollBatch) {
        // Only an accepted query has rows.
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
            // In a span, the message is the name of the event.
            debug!(name: "fraiseql.first_row", target: FIRST_ROW, parent: &self.span.get(), "fraiseql.first_row");
        }
        self.batches.taken(now, batch);
    }

    /// Records how the stream ended. A stream whose query was never accepted is counted under `REFUSED`. Further calls do
    /// nothing.
    pub(crate) fn ended(&mut self, end: End<'_>) {
        let registry = &self.instruments.0.registry;
        let database = match std::mem::replace(&mut self.state, State::Ended) {
            State::Ended => return,
            State::Accepted(live) => live.end(end),
            State::Pending => {
                registry.count_refused(end);
                self.span.database().attributes(&REFUSED.into(), None)
            }
        };
        let stats = self.stream.stats();
        self.record_operation(&stats, end, database);
        self.batches.close(self.stream.gauge.decode_time());
        if let Some(error) = end.error() {
            self.span.get().in_scope(|| log_failure(&self.stream.entity, error));
        }
        self.end_span(&stats, end);
        match end {
            // The query is cancelled next, in a span below this one.
            End::Dropped => self.span.defer_close(),
            End::Complete | End::Failed(_) => self.span.close(),
        }
    }

    fn record_operation(&self, stats: &Stats, end: End<'_>, mut attributes: Arc<[KeyValue]>) {
        if let Some(error) = end.error() {
            let error_type = KeyValue::new("error.type", error.type_name().to_owned());
            let code = |code: &SqlState| KeyValue::new("db.response.status_code", code.code().to_owned());
            let of_error = std::iter::once(error_type).chain(error.sqlstate().map(code));
            attributes = attributes.iter().cloned().chain(of_error).collect();
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
        let failure = error.map(|error| Recorded(error).to_string());
        // All fields in one call, because each call looks up the span.
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
            db.response.status_code = error.and_then(Error::sqlstate).map(SqlState::code),
            error.type = error.map(Error::type_name),
            otel.status_code = error.map(|_| "error"),
            otel.status_description = failure,
        );
        // The exporting layer takes the last exit of a span as its end, which is here and not after the clean-up.
        span.in_scope(|| ());
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.ended(End::Dropped);
    }
}

/// Logs the statistics of a live stream at intervals, together with its trace id. The query span itself is exported only
/// when the stream ends, which may be hours later.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    stream: Observer,
    query: QuerySpan,
}

impl Heartbeat {
    /// The time between two log records.
    pub(crate) const EVERY: std::time::Duration = std::time::Duration::from_secs(30);

    pub(crate) fn new(stream: Observer, query: QuerySpan) -> Self {
        Self { stream, query }
    }

    /// Logs one record within the query span.
    pub(crate) fn log(&self) {
        let stats = self.stream.stats();
        let span = self.query.get();
        let _in_query = span.enter();
        info!(
            name: "fraiseql.stream.heartbeat",
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
