//! `QuerySpan`: the span of a query. `BatchSpans`: the spans of its poll batches, within their budget.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::Empty;
use tracing::{Span, info_span, record_all};

use super::SCOPE;
use super::database::Database;
use crate::channel::Nanos;
use crate::sync::lock;

/// The number of spans that the poll batches of a stream get.
///
/// A poll-batch span lasts from the poll to the arrival of its rows. In a waterfall, long spans mean that Postgres is
/// slow, and gaps between them that the consumer is slow. Set the number with
/// [`ConnectionBuilder::poll_spans`](crate::ConnectionBuilder::poll_spans).
///
/// # Examples
///
/// ```
/// use fraiseql_stream::{Connection, PollSpans};
///
/// let builder = Connection::builder("postgres://localhost/shop").poll_spans(PollSpans::Budget(16));
/// assert_eq!(PollSpans::default(), PollSpans::Budget(64));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PollSpans {
    /// One span per poll batch. A fast stream produces tens of thousands per second, so this is for debugging.
    Every,
    /// One span per group of poll batches. A group ends when it has 256 rows or has lasted 10 ms, or when the consumer
    /// has not polled for 1 ms.
    ///
    /// After this number of spans, each further span covers two groups; after as many again, four groups, and so on.
    /// No poll batch is left out: the sums over all spans are complete. A budget of 0 is treated as 1.
    Budget(u32),
    /// No poll-batch spans. The query span remains.
    Off,
}

impl Default for PollSpans {
    /// Returns `Budget(64)`: about 300 spans for half a million small rows.
    fn default() -> Self {
        Self::Budget(64)
    }
}

/// The number of rows that completes a group.
const GROUP_ROWS: usize = 256;
/// The time that completes a group.
const GROUP_TIME: Nanos = 10_000_000;
/// The time without a poll that ends a group, so that it shows as a gap between two spans.
const GAP: Nanos = 1_000_000;
/// The time by which the end of a span may be too early, so that not every poll batch has to set it.
const END_INTERVAL: Nanos = 200_000;

/// The attributes that the query span has from its start.
#[derive(Debug)]
pub(crate) struct QueryInfo<'a> {
    pub(crate) entity: &'a str,
    pub(crate) summary: &'a str,
    /// The schema in the entity's name, if it has one.
    pub(crate) schema: Option<String>,
    pub(crate) database: &'a Arc<Database>,
    /// The text of the statement, if it may be recorded.
    pub(crate) text: Option<&'a str>,
}

/// The span of a query, shared by everything that records within it. It can be closed for all of them at once: a span is
/// exported when its last handle is dropped, and a task that has not run yet must not delay that.
#[derive(Clone, Debug)]
pub(crate) struct QuerySpan(Arc<SpanCell>);

#[derive(Debug)]
struct SpanCell {
    span: Mutex<Span>,
    database: Arc<Database>,
    /// The schema in the entity's name, if it has one.
    schema: Option<String>,
    /// Whether the span is counted in `DEFERRED`.
    is_deferred: AtomicBool,
}

impl QuerySpan {
    /// Opens the span, as a child of the caller's current span.
    pub(super) fn open(query: QueryInfo<'_>) -> Self {
        Self(Arc::new(SpanCell {
            span: Mutex::new(query_span(&query)),
            database: Arc::clone(query.database),
            schema: query.schema,
            is_deferred: AtomicBool::new(false),
        }))
    }

    /// Opens the span of the query's cancel requests, as a child of its span.
    pub(crate) fn open_cancel(&self) -> Span {
        let SpanCell { database, schema, .. } = &*self.0;
        info_span!(
            target: SCOPE,
            parent: &self.get(),
            "cancel",
            otel.kind = "client",
            otel.status_code = Empty,
            otel.status_description = Empty,
            db.system.name = "postgresql",
            db.namespace = database.namespace(schema.as_deref()).as_deref(),
            server.address = database.address,
            server.port = database.port.map(i64::from),
            error.type = Empty,
        )
    }

    /// Returns the database of the query.
    pub(super) fn database(&self) -> &Arc<Database> {
        &self.0.database
    }

    /// Returns the schema in the entity's name, if it has one.
    pub(super) fn schema(&self) -> Option<&str> {
        self.0.schema.as_deref()
    }

    /// Returns the span, or a disabled one once it is closed.
    pub(crate) fn get(&self) -> Span {
        lock(&self.0.span).clone()
    }

    /// Closes the span, which exports it.
    pub(super) fn close(&self) {
        let mut span = lock(&self.0.span);
        let closed = std::mem::replace(&mut *span, Span::none());
        drop(span);
        // This exports the span, which runs foreign code and therefore must not happen under the lock.
        drop(closed);
    }

    /// Leaves the span open until the last handle is dropped, after the query was cancelled. A shutdown waits for that.
    pub(super) fn defer_close(&self) {
        if !self.0.is_deferred.swap(true, Ordering::Relaxed) {
            DEFERRED.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Drop for SpanCell {
    fn drop(&mut self) {
        // Close the span before it is no longer waited for.
        *self.span.get_mut().unwrap_or_else(PoisonError::into_inner) = Span::none();
        if *self.is_deferred.get_mut() {
            DEFERRED.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// The number of spans of dropped streams whose query is not cancelled yet. A shutdown waits for them.
static DEFERRED: AtomicUsize = AtomicUsize::new(0);

/// Returns whether spans of dropped streams are not closed yet.
#[cfg(feature = "otlp")]
pub(crate) fn spans_are_open() -> bool {
    DEFERRED.load(Ordering::Acquire) > 0
}

/// Creates a CLIENT span after the semantic conventions for databases, as a child of the caller's current span.
fn query_span(query: &QueryInfo<'_>) -> Span {
    let database = query.database;
    info_span!(
        target: SCOPE,
        "query",
        otel.name = query.summary,
        otel.kind = "client",
        otel.status_code = Empty,
        otel.status_description = Empty,
        db.system.name = "postgresql",
        db.namespace = database.namespace(query.schema.as_deref()).as_deref(),
        db.collection.name = query.entity,
        db.operation.name = "SELECT",
        db.query.summary = query.summary,
        db.query.text = query.text,
        db.response.status_code = Empty,
        server.address = database.address,
        server.port = database.port.map(i64::from),
        error.type = Empty,
        fraiseql.outcome = Empty,
        fraiseql.verdict = Empty,
        fraiseql.share.backlog = Empty,
        fraiseql.share.source_wait = Empty,
        fraiseql.share.scheduled = Empty,
        fraiseql.share.overlap = Empty,
        fraiseql.rows = Empty,
        fraiseql.bytes = Empty,
        fraiseql.time.source_wait = Empty,
        fraiseql.time.scheduled = Empty,
        fraiseql.time.decode = Empty,
        fraiseql.time.consumer = Empty,
        fraiseql.time.paused = Empty,
    )
}

/// A poll batch: the chunk that one poll took from the channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PollBatch {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
    /// The rows that waited in the channel when the poll began.
    pub(crate) rows_before: usize,
    pub(crate) bytes_before: usize,
    /// The rows that remained in the channel.
    pub(crate) rows_after: usize,
    /// The time at which the poll began.
    pub(crate) polled: Nanos,
}

/// Sums over the poll batches of one span.
#[derive(Debug, Default)]
struct Sums {
    batches: u64,
    rows: usize,
    bytes: usize,
    wait: Nanos,
    /// The occupancy before the first poll batch.
    rows_before: usize,
    /// The occupancy after the last poll batch.
    rows_after: usize,
}

impl Sums {
    fn add(&mut self, now: Nanos, batch: &PollBatch) {
        if self.batches == 0 {
            self.rows_before = batch.rows_before;
        }
        self.batches += 1;
        self.rows += batch.rows;
        self.bytes += batch.bytes;
        self.wait += now.saturating_sub(batch.polled);
        self.rows_after = batch.rows_after;
    }
}

/// Opens and closes the spans of one stream's poll batches.
#[derive(Debug)]
pub(super) struct BatchSpans {
    mode: PollSpans,
    /// Whether a subscriber records the query span, and therefore these.
    is_enabled: bool,
    /// The number of spans that were closed.
    closed: u32,
    /// The number of groups that one span covers at present.
    groups_per_span: u32,
    open: Option<Open>,
}

/// The span that is open.
#[derive(Debug)]
struct Open {
    span: Span,
    sums: Sums,
    /// The number of groups that have ended.
    groups: u32,
    group_rows: usize,
    group_since: Nanos,
    /// The time at which a chunk was last taken.
    taken: Nanos,
    /// The time at which the end of the span was last set.
    end_set: Nanos,
    /// The decoding time of the stream when the span began.
    decoded: Nanos,
}

impl Open {
    fn end_group(&mut self, now: Nanos) {
        self.groups += 1;
        (self.group_rows, self.group_since) = (0, now);
    }
}

impl BatchSpans {
    pub(super) fn new(mode: PollSpans, query: &QuerySpan) -> Self {
        let is_enabled = mode != PollSpans::Off && !query.get().is_disabled();
        Self { mode, is_enabled, closed: 0, groups_per_span: 1, open: None }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.is_enabled
    }

    /// Records that a poll began, in a new span if the open one covers enough. `decoded` is the stream's decoding time
    /// so far.
    pub(super) fn begin(&mut self, query: &QuerySpan, now: Nanos, decoded: Nanos) {
        if let Some(open) = &mut self.open {
            if open.group_rows > 0 && now.saturating_sub(open.taken) >= GAP {
                open.end_group(now);
            }
            if open.groups < self.groups_per_span {
                return;
            }
            self.close(decoded);
        }
        let span = info_span!(
            target: SCOPE,
            parent: &query.get(),
            "poll_batch",
            fraiseql.batches = Empty,
            fraiseql.rows = Empty,
            fraiseql.bytes = Empty,
            fraiseql.occupancy.before = Empty,
            fraiseql.occupancy.after = Empty,
            fraiseql.time.wait = Empty,
            fraiseql.time.decode = Empty,
        );
        self.open = Some(Open {
            span,
            sums: Sums::default(),
            groups: 0,
            group_rows: 0,
            group_since: now,
            taken: now,
            end_set: 0,
            decoded,
        });
    }

    /// Records that the poll took a chunk. If nothing more is added, the span ends here, whatever the consumer does next.
    pub(super) fn taken(&mut self, now: Nanos, batch: &PollBatch) {
        let Some(open) = &mut self.open else { return };
        open.sums.add(now, batch);
        open.group_rows += batch.rows;
        let long = now.saturating_sub(open.group_since) >= GROUP_TIME;
        open.taken = now;
        let due = now.saturating_sub(open.end_set) >= END_INTERVAL;
        if self.mode == PollSpans::Every || open.group_rows >= GROUP_ROWS || long {
            open.end_group(now);
        }
        if due || open.groups >= self.groups_per_span {
            open.end_set = now;
            // The exporting layer takes the last exit of a span as its end.
            open.span.in_scope(|| ());
        }
    }

    /// Closes the open span, if there is one. `decoded` is the stream's decoding time so far.
    pub(super) fn close(&mut self, decoded: Nanos) {
        let Some(Open { span, sums, decoded: before, .. }) = self.open.take() else {
            return;
        };
        record_all!(
            span,
            fraiseql.batches = int(sums.batches),
            fraiseql.rows = int(sums.rows as u64),
            fraiseql.bytes = int(sums.bytes as u64),
            fraiseql.occupancy.before = int(sums.rows_before as u64),
            fraiseql.occupancy.after = int(sums.rows_after as u64),
            fraiseql.time.wait = seconds(sums.wait),
            fraiseql.time.decode = seconds(decoded.saturating_sub(before)),
        );
        self.closed += 1;
        if let PollSpans::Budget(budget) = self.mode
            && self.closed.is_multiple_of(budget.max(1))
        {
            self.groups_per_span = self.groups_per_span.saturating_mul(2);
        }
    }
}

/// Converts a value for a span field. Integers are signed in OpenTelemetry; an unsigned one would be exported as text.
pub(super) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Converts nanoseconds to seconds.
pub(super) fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / 1e9
}
