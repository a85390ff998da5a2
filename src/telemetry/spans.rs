//! The query span, and the spans of poll batches within their budget.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::Empty;
use tracing::{Span, info_span, record_all};

use super::SCOPE;
use super::database::Database;
use crate::channel::Nanos;
use crate::sync::lock;

/// How many spans poll batches get.
///
/// A poll-batch span lasts from the poll to the rows in hand: in a waterfall, long spans mean that Postgres
/// is slow, and gaps between them that the consumer is.
///
/// ```
/// use fraiseql_stream::{Connection, PollSpans};
/// let builder = Connection::builder("postgres://localhost/shop").poll_spans(PollSpans::Budget(16));
/// assert_eq!(PollSpans::default(), PollSpans::Budget(64));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PollSpans {
    /// One for every poll batch. A fast stream makes tens of thousands a second: for debugging.
    Every,
    /// A span covers poll batches of together at least 256 rows or 10 ms, or up to a pause of the consumer
    /// of 1 ms. After so many spans each covers
    /// two such groups, after as many again four, and so on; the sums over all spans stay complete.
    Budget(u32),
    /// None; the query span remains.
    Off,
}

impl Default for PollSpans {
    /// `Budget(64)`: about 300 spans for half a million small rows.
    fn default() -> Self {
        Self::Budget(64)
    }
}

/// A group is worth a span when it has so many rows, or took so long.
const GROUP_ROWS: usize = 256;
const GROUP_TIME: Nanos = 10_000_000;
/// A consumer that is away for so long ends the group: its time must show as a gap.
const GAP: Nanos = 1_000_000;
/// A span's end may be so much too early, so that not every poll batch pays for it.
const STAMP: Nanos = 200_000;

/// What the query span says from its start.
#[derive(Debug)]
pub(crate) struct QueryInfo<'a> {
    pub(crate) entity: &'a str,
    pub(crate) summary: &'a str,
    /// That of the entity's name, if it has one.
    pub(crate) schema: Option<String>,
    pub(crate) database: &'a Arc<Database>,
    /// Only on request.
    pub(crate) text: Option<&'a str>,
}

/// The span of a query, shared by all who tell something below it. It ends for all of them at once: a span is
/// exported when the last handle is gone, and must not be kept from that by a task that has not run yet.
#[derive(Clone, Debug)]
pub(crate) struct QuerySpan(Arc<SharedSpan>);

#[derive(Debug)]
struct SharedSpan {
    span: Mutex<Span>,
    /// Among those that a shutdown waits for; see `DEFERRED`.
    is_deferred: AtomicBool,
}

impl QuerySpan {
    pub(super) fn open(query: &QueryInfo<'_>) -> Self {
        Self(Arc::new(SharedSpan {
            span: Mutex::new(query_span(query)),
            is_deferred: AtomicBool::new(false),
        }))
    }

    /// The span, or none once it is closed.
    pub(crate) fn get(&self) -> Span {
        lock(&self.0.span).clone()
    }

    pub(super) fn close(&self) {
        let mut span = lock(&self.0.span);
        let closed = std::mem::replace(&mut *span, Span::none());
        drop(span);
        // Exported here, by code that needs none of our locks.
        drop(closed);
    }

    /// The stream is over; the span closes with the last handle, behind the cancel.
    pub(super) fn defer_close(&self) {
        if !self.0.is_deferred.swap(true, Ordering::Relaxed) {
            DEFERRED.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Drop for SharedSpan {
    fn drop(&mut self) {
        // Closed before it is counted out.
        *self.span.get_mut().unwrap_or_else(PoisonError::into_inner) = Span::none();
        if *self.is_deferred.get_mut() {
            DEFERRED.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// The spans of streams that were dropped and whose query is not cancelled yet.
static DEFERRED: AtomicUsize = AtomicUsize::new(0);

/// Whether the span of a dropped stream is not closed yet.
#[cfg(feature = "otlp")]
pub(crate) fn spans_are_open() -> bool {
    DEFERRED.load(Ordering::Acquire) > 0
}

/// A CLIENT span after the database conventions, below the caller's current span.
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
        db.response.returned_rows = Empty,
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

/// A poll batch that was taken. `rows_before` waited in the channel when the poll began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PollBatch {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
    pub(crate) rows_before: usize,
    pub(crate) bytes_before: usize,
    pub(crate) rows_after: usize,
    /// When the poll began that got it.
    pub(crate) polled: Nanos,
}

/// What the poll batches of one span add up to.
#[derive(Debug, Default)]
struct Sums {
    batches: u64,
    rows: usize,
    bytes: usize,
    wait: Nanos,
    /// Of the first.
    rows_before: usize,
    /// Of the last.
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
    /// Someone listens to the query span, and so to these.
    wanted: bool,
    /// Spans made.
    made: u32,
    /// Groups that one span covers now.
    cover: u32,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    span: Span,
    sums: Sums,
    groups: u32,
    group_rows: usize,
    group_since: Nanos,
    /// When rows were last in hand.
    taken: Nanos,
    /// When the span was last given an end.
    stamped: Nanos,
    /// Decoding of the stream when the span began.
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
        let wanted = mode != PollSpans::Off && !query.get().is_disabled();
        Self { mode, wanted, made: 0, cover: 1, open: None }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// A poll begins; `decoded` is the stream's decoding so far.
    pub(super) fn begin(&mut self, query: &QuerySpan, now: Nanos, decoded: Nanos) {
        if let Some(open) = &mut self.open {
            if open.group_rows > 0 && now.saturating_sub(open.taken) >= GAP {
                open.end_group(now);
            }
            if open.groups < self.cover {
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
            stamped: 0,
            decoded,
        });
    }

    /// The rows are in hand: here the span ends for now, whatever the consumer does next.
    pub(super) fn taken(&mut self, now: Nanos, batch: &PollBatch) {
        let Some(open) = &mut self.open else { return };
        open.sums.add(now, batch);
        open.group_rows += batch.rows;
        let long = now.saturating_sub(open.group_since) >= GROUP_TIME;
        open.taken = now;
        let due = now.saturating_sub(open.stamped) >= STAMP;
        if self.mode == PollSpans::Every || open.group_rows >= GROUP_ROWS || long {
            open.end_group(now);
        }
        if due || open.groups >= self.cover {
            open.stamped = now;
            // The exporting layer takes the last exit of a span as its end.
            open.span.in_scope(|| ());
        }
    }

    /// Nothing more comes, or enough is covered.
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
        self.made += 1;
        if let PollSpans::Budget(budget) = self.mode
            && self.made.is_multiple_of(budget.max(1))
        {
            self.cover = self.cover.saturating_mul(2);
        }
    }
}

/// Integers of spans are signed in OpenTelemetry; others would come out as text.
pub(super) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / 1e9
}
