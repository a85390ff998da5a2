//! `JsonStream`: takes chunks out of the channel, turns rows into `T`, and knows whose time it is.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use futures_core::Stream;

use crate::channel::{Occupancy, Receiver, Taken};
use crate::chunk::Chunk;
use crate::connection::Connection;
use crate::decode::{FromJson, InHand, Sampler};
use crate::error::{Error, Result};
use crate::probe::Probe;
use crate::stats::{Observer, Progress, Stats};
use crate::telemetry::{Batch, Recorder};
use crate::time::Nanos;

/// A Rust predicate on rows that are already decoded.
pub(crate) type Predicate<T> = Box<dyn FnMut(&T) -> bool + Send>;

/// Rows of a query, in order, as `T`.
///
/// `C` is how the stream holds its connection: `&mut Connection` when it was made by
/// [`Connection::query`], [`Connection`] itself when made by [`Connection::into_query`]; the latter is
/// `'static` and fits a response body or a spawned task.
///
/// # Errors
///
/// A row that is not a `T` yields an error of kind [`Decode`](crate::ErrorKind::Decode) that names the row,
/// and the stream goes on behind it. An error of Postgres comes after all rows that preceded it and ends the
/// stream. A stream never ends quietly with rows missing.
///
/// # Cancel safety
///
/// Dropping the future of `next()` loses no row. Dropping the stream is the way to cancel: Postgres is asked
/// to stop at once, also while it is silent, and the connection is clean before its next query is sent.
/// That clean-up runs on the tokio runtime; to wait for it, for instance before the program ends, use
/// [`close`](Self::close).
///
/// # Memory
///
/// At most `max_memory` payload bytes wait in the channel (a single larger row passes alone). Beyond that
/// there are the chunk in your hands, at most an eighth of it or one row, and one row in the producer's.
///
/// ```no_run
/// use fraiseql_stream::Connection;
/// use futures_util::TryStreamExt;
///
/// # async fn example() -> Result<(), fraiseql_stream::Error> {
/// let mut db = Connection::connect("postgres://app@localhost/shop").await?;
/// let mut orders = db.query::<serde_json::Value>("orders").stream().await?;
/// while let Some(order) = orders.try_next().await? {
///     println!("{order}");
/// }
/// println!("{}", orders.stats());
/// # Ok(())
/// # }
/// ```
pub struct JsonStream<T: FromJson, C = Connection> {
    receiver: Receiver,
    chunk: InHand<T>,
    ended: bool,
    predicate: Option<Predicate<T>>,
    sampler: Sampler,
    probe: Arc<Probe>,
    observer: Observer,
    recorder: Recorder,
    /// When the poll began that waits for a chunk.
    polled: Option<Nanos>,
    /// It found the channel empty.
    waited: bool,
    paused: bool,
    connection: Option<C>,
}

/// What a query hands over to its stream.
pub(crate) struct Parts<T> {
    pub(crate) receiver: Receiver,
    pub(crate) predicate: Option<Predicate<T>>,
    pub(crate) observer: Observer,
    pub(crate) recorder: Recorder,
    pub(crate) probe: Arc<Probe>,
}

impl<T: FromJson, C> JsonStream<T, C> {
    pub(crate) fn new(parts: Parts<T>, connection: C) -> Self {
        Self {
            receiver: parts.receiver,
            chunk: InHand::default(),
            ended: false,
            predicate: parts.predicate,
            sampler: Sampler::default(),
            probe: parts.probe,
            observer: parts.observer,
            recorder: parts.recorder,
            polled: None,
            waited: false,
            paused: false,
            connection: Some(connection),
        }
    }

    /// The next row, if one is here already; does not wait, and does not count as waiting.
    ///
    /// `None` says that nothing is here yet, or that the stream has ended.
    ///
    /// ```no_run
    /// # async fn example(mut stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// use futures_util::StreamExt;
    /// while let Some(row) = stream.next().await {
    ///     // ... write `row` to a buffer, and flush it when nothing more is ready:
    ///     while let Some(row) = stream.next_ready() { /* ... */ }
    /// }
    /// # }
    /// ```
    pub fn next_ready(&mut self) -> Option<Result<T>> {
        self.resume();
        loop {
            if let Some(row) = self.next_in_chunk() {
                return Some(row);
            }
            if self.ended {
                return None;
            }
            let taken = self.receiver.try_take()?;
            self.polling();
            if let Some(error) = self.accept(taken) {
                return Some(Err(error));
            }
        }
    }

    /// Rows by the chunk: waits for a row, and takes along those of its chunk. Empty at the end.
    ///
    /// Cancel safe: no row is lost when the future is dropped.
    ///
    /// ```no_run
    /// # async fn example(mut stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// loop {
    ///     let rows = stream.next_chunk().await;
    ///     if rows.is_empty() { break }
    ///     println!("{} rows at once", rows.len());
    /// }
    /// # }
    /// ```
    pub async fn next_chunk(&mut self) -> Vec<Result<T>> {
        let first = std::future::poll_fn(|cx| self.poll_row(cx)).await;
        let mut rows: Vec<_> = first.into_iter().collect();
        if !rows.is_empty() {
            rows.extend(std::iter::from_fn(|| self.next_in_chunk()));
        }
        rows
    }

    fn poll_row(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        self.resume();
        loop {
            if let Some(row) = self.next_in_chunk() {
                return Poll::Ready(Some(row));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            // A source that never pauses must not keep the thread from other tasks.
            let budget = ready!(tokio::task::coop::poll_proceed(cx));
            let taken = ready!(self.poll_take(cx));
            budget.made_progress();
            if let Some(error) = self.accept(taken) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }

    fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<Taken> {
        let polled = self.polling();
        let taken = self.receiver.poll_take(cx, polled);
        self.waited |= taken.is_pending();
        taken
    }

    /// A poll begins that the chunk in hand cannot serve, unless one goes on already.
    fn polling(&mut self) -> Nanos {
        if let Some(polled) = self.polled {
            return polled;
        }
        let now = self.observer.gauge.ledger.now();
        self.sampler.end(&self.observer, now);
        self.receiver.give_back(self.chunk.put_down());
        self.recorder.polled(now);
        self.polled = Some(now);
        now
    }

    /// Makes what was taken the chunk in hand; an error ends the stream.
    fn accept(&mut self, taken: Taken) -> Option<Error> {
        let end = match taken {
            Taken::Chunk { chunk, occupancy, at } => {
                self.take_chunk(chunk, occupancy, at);
                return None;
            }
            Taken::End(end) => end,
            Taken::Lost => Err(Error::lost()),
        };
        self.ended = true;
        let end = end.map_err(|error| error.of_entity(&self.observer.entity).with_stats(self.stats()));
        self.recorder.ended(Some(end.as_ref().copied()));
        end.err()
    }

    fn take_chunk(&mut self, chunk: Chunk, occupancy: Occupancy, now: Nanos) {
        let polled = self.polled.take().unwrap_or(now);
        // What counts is what the poll found, not what it waited for.
        let mut found = occupancy;
        if std::mem::take(&mut self.waited) {
            self.probe.rows_came(polled, now);
            found = Occupancy::default();
        }
        let batch = Batch {
            rows: chunk.rows(),
            bytes: chunk.bytes(),
            rows_before: found.rows,
            bytes_before: found.bytes,
            rows_after: occupancy.rows - chunk.rows(),
            polled,
        };
        self.recorder.taken(now, &batch);
        self.observer.progress.last_row.store(now, Ordering::Relaxed);
        self.sampler.begin(now);
        self.chunk.take(chunk);
    }

    /// The next row of the chunk in hand that the predicate lets pass.
    fn next_in_chunk(&mut self) -> Option<Result<T>> {
        loop {
            let value = self.sampler.decode(&self.observer, &mut self.chunk)?;
            let progress = &self.observer.progress;
            match value {
                Ok(value) if self.predicate.as_mut().is_some_and(|keep| !keep(&value)) => {
                    Progress::count(&progress.filtered);
                }
                Ok(value) => {
                    Progress::count(&progress.yielded);
                    return Some(Ok(value));
                }
                Err(error) => {
                    Progress::count(&progress.failed);
                    return Some(Err(error.of_entity(&self.observer.entity)));
                }
            }
        }
    }
}

impl<T: FromJson, C> JsonStream<T, C> {
    /// The stream's statistics now.
    pub fn stats(&self) -> Stats {
        self.observer.stats()
    }

    /// Looks at this stream from another task.
    pub fn observer(&self) -> Observer {
        self.observer.clone()
    }

    /// Declares that the time until the next poll, or [`resume`](Self::resume), is a pause of your own
    /// wish: it counts as `paused` and for no verdict. The channel fills up meanwhile; when it is full,
    /// Postgres waits.
    ///
    /// ```no_run
    /// # async fn example(mut stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// stream.pause();
    /// tokio::time::sleep(std::time::Duration::from_secs(60)).await; // a maintenance window
    /// stream.resume(); // the next poll would do as well
    /// # }
    /// ```
    pub fn pause(&mut self) {
        // A poll that still waits is given up: what comes next is not its time.
        (self.polled, self.waited, self.paused) = (None, false, true);
        self.receiver.pause();
    }

    /// Ends a [`pause`](Self::pause).
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.receiver.resume();
        }
    }

    fn end(&mut self) {
        // First the times stand still, then they are told.
        self.receiver.close();
        self.recorder.ended(None);
        self.ended = true;
    }
}

impl<T: FromJson, C: std::borrow::BorrowMut<Connection>> JsonStream<T, C> {
    /// Ends the stream and returns the connection once it is clean: the query is cancelled if it still runs.
    /// Dropping the stream does the same without waiting.
    ///
    /// # Errors
    ///
    /// If the query could not be brought to an end within 5 s; the connection is closed then, and with it
    /// what runs on it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing: the clean-up goes on.
    pub async fn close(mut self) -> Result<C> {
        self.end();
        let connection = self.connection.take().ok_or_else(Error::closed)?;
        connection.borrow().idle().await?;
        Ok(connection)
    }
}

impl<T: FromJson, C> Drop for JsonStream<T, C> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<T: FromJson, C: Unpin> Stream for JsonStream<T, C> {
    type Item = Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_row(cx)
    }
}

// Nothing in it is ever pinned.
impl<T: FromJson, C: Unpin> Unpin for JsonStream<T, C> {}

impl<T: FromJson, C> fmt::Debug for JsonStream<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonStream").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
