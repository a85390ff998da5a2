//! `Stats`: the statistics of a stream at one moment.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use super::format::{Bytes, OneLine, Percent, Rows, Seconds};
use super::ledger::{ConsumerState, Times};
use super::verdict::{Shares, Verdict};

/// The time of the consumer, by what it was doing. The five states add up to [`Stats::elapsed`].
///
/// # Examples
///
/// ```no_run
/// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let stats = stream.stats();
/// let time = stats.time;
/// let sum = time.source_wait + time.scheduled + time.decode + time.consumer + time.paused;
/// assert_eq!(sum, stats.elapsed);
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamTime {
    /// Time in which your code waited for rows.
    pub source_wait: Duration,
    /// Time in which your code was ready to run, but the async runtime was late to run it.
    pub scheduled: Duration,
    /// Time spent deserializing JSON into `T`. Estimated from samples; the sum of `decode` and `consumer` is exact.
    pub decode: Duration,
    /// Time in which your code was busy: it held rows, did something else while rows waited, or had not polled the stream yet.
    pub consumer: Duration,
    /// Time for which the stream was paused, from [`pause`](crate::JsonStream::pause) to [`resume`](crate::JsonStream::resume) or the
    /// next poll.
    pub paused: Duration,
}

/// The time of the producer, by what it was waiting for. The two states add up to the time from the start of the query to its last row, or
/// to the end of the stream if that is earlier.
///
/// # Examples
///
/// ```no_run
/// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let time = stream.stats().producer_time;
/// println!("Postgres was held back for {:?} of {:?}", time.room, time.source + time.room);
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProducerTime {
    /// Time spent waiting for Postgres or reading rows from it.
    pub source: Duration,
    /// Time spent waiting for room in the channel; Postgres was held back.
    pub room: Duration,
}

/// The statistics of a stream at one moment, as returned by [`JsonStream::stats`](crate::JsonStream::stats) and
/// [`Observer::stats`](crate::Observer::stats).
///
/// `Display` writes them on one line, for a log. With the feature `serde`, they can be serialized.
///
/// # Examples
///
/// ```no_run
/// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let stats = stream.stats();
/// println!("{stats}"); // orders: 214,332 rows, 61.0 MB in 12.4 s; consumer-bound 81 % (...)
/// println!("{} rows wait, {}", stats.buffered_rows, stats.verdict());
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// The name of the relation, as passed to [`Connection::query`](crate::Connection::query).
    pub entity: Arc<str>,
    /// The lifetime of the stream so far, pauses included. It no longer grows once the stream has ended.
    pub elapsed: Duration,
    /// Rows returned to your code.
    pub rows: u64,
    /// Rows that [`where_rust`](crate::Query::where_rust) rejected.
    pub filtered: u64,
    /// Rows that did not deserialize into `T`. Each was returned as an error.
    pub failed: u64,
    /// Payload bytes received from Postgres: the JSON text of the rows.
    pub bytes: u64,
    /// Rows that wait in the channel at this moment. Rows of a chunk that was taken already are not included.
    pub buffered_rows: usize,
    /// Payload bytes that wait in the channel at this moment.
    pub buffered_bytes: usize,
    /// The highest value that `buffered_bytes` has had.
    pub peak_bytes: usize,
    /// The maximum number of rows in the channel: 256, or [`chunk_size`](crate::Query::chunk_size) if that is larger.
    pub row_limit: usize,
    /// The maximum number of payload bytes in the channel, as set by [`max_memory`](crate::Query::max_memory). A single
    /// larger row passes alone.
    pub byte_limit: usize,
    /// The time of the consumer, by what it was doing.
    pub time: StreamTime,
    /// The time of the producer, by what it was waiting for.
    pub producer_time: ProducerTime,
    /// Time in which the consumer was busy while rows, or the end of the stream, waited for it.
    pub backlog: Duration,
    pub(super) shares: Shares,
    pub(super) recent: Shares,
}

impl Stats {
    /// Returns the verdict on the lifetime of the stream so far. `Balanced` until any time has been counted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// use fraiseql_stream::Verdict;
    ///
    /// if stream.stats().verdict() == Verdict::ConsumerBound {
    ///     println!("Postgres waits for this service");
    /// }
    /// # }
    /// ```
    pub fn verdict(&self) -> Verdict {
        self.shares.verdict()
    }

    /// Returns the shares on which [`verdict`](Self::verdict) is based.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// let stats = stream.stats();
    /// println!("{} with a share of {:.0} %", stats.verdict(), stats.shares().dominant() * 100.0);
    /// # }
    /// ```
    pub fn shares(&self) -> Shares {
        self.shares
    }

    /// Returns the shares of the last ten seconds of the stream's lifetime. `recent().verdict()` is the side that sets
    /// the pace now.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// let stats = stream.stats();
    /// println!("{} since the start, {} now", stats.verdict(), stats.recent().verdict());
    /// # }
    /// ```
    pub fn recent(&self) -> Shares {
        self.recent
    }

    /// Returns how far the stream got, as in `after 1,234 rows in 5.0 s`.
    pub(crate) fn progress(&self) -> String {
        format!("after {} in {}", Rows(self.rows), Seconds(self.elapsed))
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elapsed = self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let share = |time: Duration| Percent(time.as_secs_f64() / elapsed);
        write!(
            OneLine(f),
            "{}: {}, {} in {}; {} (your code {}, decoding {}), peak {} of {}",
            self.entity,
            Rows(self.rows),
            Bytes(self.bytes),
            Seconds(self.elapsed),
            self.shares.summary(),
            share(self.time.consumer),
            share(self.time.decode),
            Bytes(self.peak_bytes as u64),
            Bytes(self.byte_limit as u64),
        )
    }
}

impl StreamTime {
    pub(super) fn of(times: &Times) -> Self {
        let busy = times.of(ConsumerState::Overlap) + times.of(ConsumerState::Backlog);
        Self {
            source_wait: Duration::from_nanos(times.of(ConsumerState::SourceWait)),
            scheduled: Duration::from_nanos(times.of(ConsumerState::Scheduled)),
            decode: Duration::from_nanos(times.decode),
            consumer: Duration::from_nanos(busy - times.decode),
            paused: Duration::from_nanos(times.of(ConsumerState::Paused)),
        }
    }
}
