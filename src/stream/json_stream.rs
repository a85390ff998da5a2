//! `JsonStream`: the rows of a query, as the user receives them.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use super::decode::FromJson;
use super::reader::{Parts, Reader};
use crate::channel::{Observer, Stats};
use crate::connection::{Connection, Hold};
use crate::error::Result;

/// The rows of a query, in order, decoded into `T`. A [`Stream`] of `Result<T>`.
///
/// `C` is how the stream holds its connection: `&mut Connection` if it was created by [`Connection::query`], or
/// [`Connection`] if it was created by [`Connection::into_query`]. The latter is `'static`, and fits into a response
/// body or a spawned task. A function that returns a stream of `query` has to name it:
///
/// ```
/// # use fraiseql_stream::{Connection, JsonStream, Result};
/// async fn orders(db: &mut Connection) -> Result<JsonStream<serde_json::Value, &mut Connection>> {
///     db.query("orders").stream().await
/// }
/// ```
///
/// # Errors
///
/// - [`Decode`](crate::ErrorKind::Decode) if a row does not deserialize into `T`. The error has the number of the row,
///   and the stream continues with the next row.
/// - [`Query`](crate::ErrorKind::Query) if Postgres ends the query with an error.
/// - [`Statement`](crate::ErrorKind::Statement) if the statement was cached, and the column `data` is no longer json or
///   jsonb.
/// - [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is lost.
/// - [`Lost`](crate::ErrorKind::Lost) if the task that reads from Postgres panicked, or its runtime was shut down.
///
/// Every error but `Decode` ends the stream. It follows all rows that precede it, and the stream then returns `None`. A
/// stream that ends without such an error has returned every row.
///
/// # Cancel safety
///
/// If the future of `next()` is dropped, no row is lost. To cancel the query, drop the stream: Postgres is asked to
/// stop at once, even if it is not sending anything, and the connection is clean before its next query is sent. The
/// clean-up runs on the tokio runtime. To wait for it, for example before the program ends, use
/// [`close`](Self::close).
///
/// Inside a transaction that you began on the connection, cancelling the query aborts the transaction, and the next
/// use of the connection fails once with [`TransactionAborted`](crate::ErrorKind::TransactionAborted). To stop early
/// and keep the transaction, use [`drain`](Self::drain).
///
/// # Memory
///
/// At most [`max_memory`](crate::Query::max_memory) payload bytes wait in the channel; a single larger row passes
/// alone. In addition, the stream holds the current chunk, which has at most an eighth of that or one row, and the
/// producer holds at most one row.
///
/// # Examples
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
    // Declared first, so that it is dropped before the connection that it reads from.
    reader: Reader<T>,
    connection: C,
}

impl<T: FromJson, C> JsonStream<T, C> {
    pub(crate) fn new(parts: Parts<T>, connection: C) -> Self {
        Self { reader: Reader::new(parts), connection }
    }

    /// Returns the next row if it has already arrived. Does not wait, and does not count as waiting.
    ///
    /// Returns `Poll::Pending` if no row has arrived yet, and `Poll::Ready(None)` after the end of the stream. No task
    /// is woken when a row arrives: wait for it with `next` of `futures_util::StreamExt`. Do not loop on `Pending`: time
    /// between two calls counts as your code's, and no row arrives while a loop blocks the only thread of a runtime.
    ///
    /// # Errors
    ///
    /// The errors of the stream, each after all rows that precede it.
    ///
    /// # Examples
    ///
    /// Flushes a buffer whenever no further row is ready:
    ///
    /// ```no_run
    /// use std::task::Poll;
    ///
    /// use futures_util::TryStreamExt;
    ///
    /// # async fn example(
    /// #     mut orders: fraiseql_stream::JsonStream<serde_json::Value>,
    /// # ) -> fraiseql_stream::Result<()> {
    /// let mut buffer = Vec::new();
    /// while let Some(order) = orders.try_next().await? {
    ///     buffer.push(order);
    ///     while let Poll::Ready(Some(order)) = orders.next_ready() {
    ///         buffer.push(order?);
    ///     }
    ///     buffer.clear(); // ... write it
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn next_ready(&mut self) -> Poll<Option<Result<T>>> {
        self.reader.next_ready()
    }

    /// Waits for a row and returns it together with the rest of its chunk.
    ///
    /// The vector is never empty and holds at most [`chunk_size`](crate::Query::chunk_size) rows. Returns `None` at the
    /// end of the stream. For batches of a fixed size, use `chunks` of `futures::StreamExt`, whose `get_ref` and
    /// `into_inner` give access to this stream.
    ///
    /// # Errors
    ///
    /// The errors of the stream, each after all rows that precede it: if rows of the same chunk precede the error,
    /// they are returned first, and the next call returns the error. After a row that does not decode, the stream
    /// continues with the next row.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped, no row is lost.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut stream: fraiseql_stream::JsonStream<serde_json::Value>) -> fraiseql_stream::Result<()> {
    /// while let Some(rows) = stream.next_chunk().await? {
    ///     println!("{} rows at once", rows.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<T>>> {
        self.reader.next_chunk().await
    }

    /// Returns the current statistics of the stream.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(orders: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// println!("{}", orders.stats());
    /// // orders: 214,332 rows, 61.0 MB in 12.4 s; consumer-bound 81 % (your code 77 %, decoding 4 %), peak 3.2 MB of 16.8 MB
    /// # }
    /// ```
    pub fn stats(&self) -> Stats {
        self.reader.observer.stats()
    }

    /// Returns an observer, which reads the statistics from elsewhere: another task, a status page, a health check.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(orders: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// let observer = orders.observer();
    /// std::thread::spawn(move || println!("{}", observer.stats()));
    /// # }
    /// ```
    pub fn observer(&self) -> Observer {
        self.reader.observer.clone()
    }

    /// Pauses the stream: the time until the next poll or [`resume`](Self::resume) counts as `paused` and does not
    /// affect the verdict. Meanwhile the channel fills up; once it is full, Postgres has to wait.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// stream.pause();
    /// tokio::time::sleep(std::time::Duration::from_secs(60)).await; // a maintenance window
    /// stream.resume();
    /// # }
    /// ```
    pub fn pause(&mut self) {
        self.reader.pause();
    }

    /// Ends a [`pause`](Self::pause). The next poll does the same. Has no effect if the stream is not paused.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// stream.pause();
    /// tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    /// stream.resume(); // from here on, the time counts again, even before the next poll
    /// # }
    /// ```
    pub fn resume(&mut self) {
        self.reader.resume();
    }
}

impl<T: FromJson, C: Hold> JsonStream<T, C> {
    /// Ends the stream, cancels the query if it is still running, and returns the connection once it is clean. Rows that
    /// were not taken are discarded. Dropping the stream does the same without waiting.
    ///
    /// # Errors
    ///
    /// [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is lost, or if the query did not end within
    /// 5 s, in which case the connection is closed; [`TransactionAborted`](crate::ErrorKind::TransactionAborted) if
    /// the query ran inside a transaction and was cancelled.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the clean-up still takes place. If it owns the connection, the connection is closed
    /// after that.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use futures_util::TryStreamExt;
    /// # async fn example(db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let mut orders = db.into_query::<serde_json::Value>("orders").stream().await?;
    /// let first = orders.try_next().await?;
    /// let db = orders.close().await?; // cancels the query, and returns the connection
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close(self) -> Result<C, C::Error> {
        let Self { reader, connection } = self;
        drop(reader);
        idle(connection).await
    }

    /// Discards all remaining rows without decoding them and returns the connection. Unlike [`close`](Self::close)
    /// or dropping the stream, this does not cancel the query: if the stream runs inside a transaction, the
    /// transaction stays intact.
    ///
    /// Postgres still sends every remaining row. Set a [`limit`](crate::Query::limit) if there may be many.
    ///
    /// # Errors
    ///
    /// The error that ends the stream, for example one of Postgres, or
    /// [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is closed. A row that does not decode is
    /// not an error here.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the query is cancelled, which aborts a transaction in which it runs. If the future owns
    /// the connection, the connection is closed after that.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use futures_util::TryStreamExt;
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), Box<dyn std::error::Error>> {
    /// db.client().await?.batch_execute("BEGIN; INSERT INTO audit VALUES ('read')").await?;
    /// let mut orders = db.query::<serde_json::Value>("orders").limit(1_000).stream().await?;
    /// let first = orders.try_next().await?;
    /// orders.drain().await?; // dropping it would abort the transaction
    /// db.client().await?.batch_execute("COMMIT").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn drain(self) -> Result<C, C::Error> {
        let Self { mut reader, connection } = self;
        let drained = reader.drain().await;
        drop(reader);
        match drained {
            Ok(()) => idle(connection).await,
            Err(error) => Err(connection.give_back(error)),
        }
    }
}

/// Returns the connection once nothing runs on it any more.
async fn idle<C: Hold>(connection: C) -> Result<C, C::Error> {
    match connection.borrow().idle().await {
        Ok(()) => Ok(connection),
        Err(error) => Err(connection.give_back(error)),
    }
}

impl<T: FromJson, C: Unpin> Stream for JsonStream<T, C> {
    type Item = Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().reader.poll_row(cx)
    }
}

impl<T: FromJson, C> fmt::Debug for JsonStream<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonStream").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
