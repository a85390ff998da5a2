//! `Stats`: the statistics of a stream at one moment.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use super::format::{Bytes, Grouped, OneLine, Percent, Seconds};
use super::ledger::{ConsumerState, Times};
use super::verdict::{Shares, Verdict};

/// The consumer's half of a stream's life, cut into states that add up to [`Stats::elapsed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamTime {
    /// Polled, and nothing was there.
    pub source_wait: Duration,
    /// Your code was ready to run, but the async runtime was late to run it.
    pub scheduled: Duration,
    /// Turning JSON into `T`. Sampled; what it gains here it loses in `consumer`.
    pub decode: Duration,
    /// Your code held the rows.
    pub consumer: Duration,
    /// Between [`pause`](crate::JsonStream::pause) and the next poll.
    pub paused: Duration,
}

/// The producer's half, cut into states that add up to the time from the query's start to its last row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProducerTime {
    /// Waiting for Postgres or reading from it.
    pub source: Duration,
    /// Waiting for room in the channel: so long was Postgres held back.
    pub room: Duration,
}

/// A stream's statistics at one moment. Taking them neither waits nor disturbs the stream.
///
/// ```no_run
/// # async fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let stats = stream.stats();
/// println!("{stats}"); // orders: 214,332 rows, 61.0 MB in 12.4 s; consumer-bound 81 % (...)
/// println!("{} rows wait, {:?}", stats.buffered_rows, stats.verdict());
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// The relation, as it was given to `query`.
    pub entity: Arc<str>,
    /// The stream's life so far; it stands still once the stream has ended.
    pub elapsed: Duration,
    /// Rows given to your code.
    pub rows: u64,
    /// Rows that `where_rust` kept back.
    pub filtered: u64,
    /// Rows that did not decode.
    pub failed: u64,
    /// Payload bytes received.
    pub bytes: u64,
    /// Rows that wait in the channel now.
    pub buffered_rows: usize,
    /// Payload bytes that wait in the channel now.
    pub buffered_bytes: usize,
    /// The most payload bytes that ever waited at once.
    pub peak_bytes: usize,
    /// The most rows that may wait.
    pub row_limit: usize,
    /// The most payload bytes that may wait (`max_memory`).
    pub byte_limit: usize,
    /// Where the consumer's time went.
    pub time: StreamTime,
    /// Where the producer's time went.
    pub producer_time: ProducerTime,
    /// The time in which the consumer was busy while rows, or the end, waited for it.
    pub backlog: Duration,
    pub(super) shares: Shares,
    pub(super) recent: Shares,
}

impl Stats {
    /// Who set the pace since the stream began.
    pub fn verdict(&self) -> Verdict {
        self.shares.verdict()
    }

    /// The shares behind [`verdict`](Self::verdict).
    pub fn shares(&self) -> Shares {
        self.shares
    }

    /// The shares of the last ten seconds of the stream's life; `recent().verdict()` is who sets the pace now.
    pub fn recent(&self) -> Shares {
        self.recent
    }

    /// How far the stream got, as in `after 1,234 rows in 5.0 s`.
    pub(crate) fn progress(&self) -> String {
        format!("after {} rows in {}", Grouped(self.rows), Seconds(self.elapsed))
    }

    /// [`progress`](Self::progress) and which side set the pace.
    pub(crate) fn summary(&self) -> String {
        format!("{}; {}{}", self.progress(), self.shares.summary(), self.verdict().advice())
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let part = |time: Duration| Percent(time.as_secs_f64() / whole);
        write!(
            OneLine(f),
            "{}: {} rows, {} in {}; {} (your code {}, decoding {}), peak {} of {}",
            self.entity,
            Grouped(self.rows),
            Bytes(self.bytes),
            Seconds(self.elapsed),
            self.shares.summary(),
            part(self.time.consumer),
            part(self.time.decode),
            Bytes(self.peak_bytes as u64),
            Bytes(self.byte_limit as u64),
        )
    }
}

impl StreamTime {
    pub(super) fn of(times: &Times) -> Self {
        let held = times.of(ConsumerState::Overlap) + times.of(ConsumerState::Backlog);
        Self {
            source_wait: Duration::from_nanos(times.of(ConsumerState::SourceWait)),
            scheduled: Duration::from_nanos(times.of(ConsumerState::Scheduled)),
            decode: Duration::from_nanos(times.decode),
            consumer: Duration::from_nanos(held - times.decode),
            paused: Duration::from_nanos(times.of(ConsumerState::Paused)),
        }
    }
}
