//! `Query`: what to stream and within which bounds; `stream` is the only place where the stages are joined.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use tokio::runtime::Handle;
use tokio_postgres::types::ToSql;

use super::decode::FromJson;
use super::json_stream::JsonStream;
use super::launch::{Handover, Launch, Work};
use super::reader::{Parts, Predicate};
use super::task::{Task, launch_unprepared};
use crate::channel::{Clock, Limits, Observer, Watchdog, bounded};
use crate::connection::{Connection, Hold};
use crate::error::{Error, ErrorKind, Result};
use crate::postgres::{self, Lease, Sql};
use crate::telemetry::{Heartbeat, QueryInfo, Recorder};

/// A query for the JSON documents of one entity; made by [`Connection::query`] or
/// [`Connection::into_query`].
///
/// What it sends is `SELECT data FROM <entity> WHERE ... ORDER BY ... LIMIT ... OFFSET ...`. The texts given
/// to `where_sql` and `order_by` are SQL of yours, the author of the service, and are sent as they are:
/// never build them from a user's input. Values go by `$1`, `$2`, ... only.
///
/// ```no_run
/// # #[derive(serde::Deserialize)]
/// # struct Order { total: f64 }
/// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
/// let orders = db
///     .query::<Order>("orders")
///     .where_sql("data->>'status' = $1", &[&"open"])
///     .where_rust(|order| order.total > 100.0)
///     .order_by("data->>'created_at' DESC")
///     .limit(1_000)
///     .max_memory(8_000_000)
///     .stream()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is sent until `stream` is called"]
pub struct Query<'p, T, C> {
    connection: C,
    sql: Sql,
    values: Vec<&'p (dyn ToSql + Sync)>,
    predicate: Option<Predicate<T>>,
    chunk_size: Option<usize>,
    max_memory: Option<usize>,
}

impl Connection {
    /// A query for the JSON in column `data` of a table or view, whose stream borrows this connection.
    ///
    /// `entity` is the name of a relation, quoted as an identifier (so case counts), or `schema.name`. It is
    /// never SQL. It is also the attribute `entity` of all metrics: do not make up names by the thousand.
    pub fn query<'p, T: FromJson>(&mut self, entity: &str) -> Query<'p, T, &mut Self> {
        Query::new(self, entity)
    }

    /// Like [`query`](Self::query), but the stream owns the connection and is `'static`. If the stream cannot be
    /// started, the error returns the connection. [`JsonStream::close`](crate::JsonStream::close) returns it at any
    /// later time, also after an error that ended the stream.
    ///
    /// ```no_run
    /// use futures_util::StreamExt;
    /// # async fn example(db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let mut rows = db.into_query::<serde_json::Value>("orders").stream().await?;
    /// tokio::spawn(async move { while let Some(row) = rows.next().await { /* ... */ } });
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_query<'p, T: FromJson>(self, entity: &str) -> Query<'p, T, Self> {
        Query::new(self, entity)
    }
}

impl<'p, T: FromJson, C: Hold> Query<'p, T, C> {
    pub(crate) fn new(connection: C, entity: &str) -> Self {
        Self {
            connection,
            sql: Sql { entity: entity.to_owned(), ..Sql::default() },
            values: Vec::new(),
            predicate: None,
            chunk_size: None,
            max_memory: None,
        }
    }

    /// Only rows for which this SQL condition is true. Called again, both conditions must hold, and the
    /// numbering of `$n` goes on: the first value of the second call follows the last of the first.
    pub fn where_sql(mut self, condition: &str, values: &[&'p (dyn ToSql + Sync)]) -> Self {
        self.sql.conditions.push(condition.to_owned());
        self.values.extend_from_slice(values);
        self
    }

    /// Only rows for which this is true of the decoded value. The others are received, decoded, and counted
    /// as filtered: a condition in SQL is cheaper. Called again, both must hold.
    pub fn where_rust(mut self, mut keep: impl FnMut(&T) -> bool + Send + 'static) -> Self
    where
        T: 'static,
    {
        self.predicate = Some(match self.predicate {
            Some(mut before) => Box::new(move |value| before(value) && keep(value)),
            None => Box::new(keep),
        });
        self
    }

    /// The order, in SQL. Called again, it decides between rows that were equal so far.
    pub fn order_by(mut self, expression: &str) -> Self {
        self.sql.order_by.push(expression.to_owned());
        self
    }

    /// At most so many rows are sent by Postgres.
    pub fn limit(mut self, rows: u64) -> Self {
        self.sql.limit = Some(rows);
        self
    }

    /// So many rows are left out first.
    pub fn offset(mut self, rows: u64) -> Self {
        self.sql.offset = Some(rows);
        self
    }

    /// At most so many rows travel through the channel together; fewer do when no more are ready, so a
    /// first row never waits for a second. The channel holds 256 rows, or one chunk if that is larger.
    /// Larger chunks mean fewer hand-overs and coarser statistics. Defaults to 128.
    pub fn chunk_size(mut self, rows: usize) -> Self {
        self.chunk_size = Some(rows);
        self
    }

    /// At most so many payload bytes wait in the channel; a full channel makes Postgres wait. A single
    /// larger row passes alone. What the kernel buffers is not counted: about 4 MB on loopback TCP, 0.2 MB on
    /// a Unix socket. Defaults to 16 MiB.
    pub fn max_memory(mut self, bytes: usize) -> Self {
        self.max_memory = Some(bytes);
        self
    }

    /// Sends the query. Returns before any row: rows, statistics and cancelling begin here. The first time that this
    /// text is sent on this connection, it returns once Postgres has prepared it; later at once, and an error of
    /// Postgres is the first item of the stream.
    ///
    /// Opens a span of this query below the caller's current span.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for a setting that can't work, values that do not fit the parameters, or
    /// a column `data` that is not json or jsonb; [`Query`](crate::ErrorKind::Query) when Postgres refuses the
    /// statement, for example because there is no such relation; [`Disconnected`](crate::ErrorKind::Disconnected)
    /// when the connection is lost; [`TransactionAborted`](crate::ErrorKind::TransactionAborted), once, when a stream
    /// that was dropped before has aborted your transaction.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future cancels the query and leaves the connection clean.
    pub async fn stream(mut self) -> Result<JsonStream<T, C>, C::Error> {
        let entity: Arc<str> = Arc::from(self.sql.entity.as_str());
        match self.start(&entity).await {
            Ok(parts) => Ok(JsonStream::new(parts, self.connection)),
            // It was another stream that aborted the transaction.
            Err(error) if error.kind() == ErrorKind::TransactionAborted => {
                Err(self.connection.give_back(error))
            }
            Err(error) => Err(self.connection.give_back(error.of_entity(&entity))),
        }
    }

    async fn start(&mut self, entity: &Arc<str>) -> Result<Parts<T>> {
        let (limits, text, runtime) = match self.check() {
            Ok(checked) => checked,
            Err(error) => return Err(self.refuse(error)),
        };
        let session = Arc::clone(&self.connection.borrow().session);
        let turn = session.turn_for_query().await.map_err(|error| self.refuse(error))?;

        let watchdog = Watchdog::of(&runtime);
        let (sender, mut receiver) = bounded(limits, Clock::start(), Arc::clone(&watchdog));
        let observer = Observer {
            entity: Arc::clone(entity),
            gauge: Arc::clone(receiver.gauge()),
            progress: Arc::default(),
        };
        let mut recorder = self.record(observer.clone(), &text);
        let handover = Handover::default();
        let lease = Lease::new(&session, turn, recorder.span());
        let heartbeat = Heartbeat::new(observer.clone(), recorder.span().clone());
        let task = Task { lease, text, sender, handover: handover.clone() };
        let launch = |work: Work| Launch::new(runtime, watchdog, (work, handover), heartbeat);

        let kept = session.statement(&task.text).and_then(|statement| {
            // Values that do not fit may fit when it is prepared again: the types of its parameters can change.
            let values = postgres::encode(&self.values, statement.params()).ok()?;
            Some((statement, values))
        });
        let unseen_failure = Arc::clone(session.unseen_failure());
        // The task alone keeps the session from here on, until it gives back the turn.
        drop(session);
        let launched = match kept {
            Some((statement, values)) => Ok(launch(Box::pin(task.query(statement, values)))),
            None => launch_unprepared(task, launch, &mut receiver, &self.values).await,
        };
        match launched {
            Ok(launch) => {
                recorder.accepted();
                // Sends the query: Postgres works on it before the first poll.
                std::future::poll_fn(|cx| Poll::Ready(launch.poll(cx))).await;
                let (predicate, limit) = (self.predicate.take(), self.sql.limit);
                Ok(Parts { receiver, predicate, observer, recorder, unseen_failure, limit, launch })
            }
            Err(error) => {
                if error.sqlstate().is_some() {
                    unseen_failure.store(false, Ordering::Relaxed);
                }
                recorder.ended(Some(Err(&error)));
                Err(error)
            }
        }
    }

    /// What can be checked before anything is sent.
    fn check(&self) -> Result<(Limits, String, Handle)> {
        let limits = Limits::new(self.chunk_size, self.max_memory).map_err(Error::config)?;
        let text = self.sql.text()?;
        let runtime = Handle::try_current().map_err(|_| Error::no_runtime())?;
        Ok((limits, text, runtime))
    }

    /// Counts a stream that never began.
    fn refuse(&self, error: Error) -> Error {
        self.connection.borrow().telemetry.instruments.count_refusal(&error);
        error
    }

    /// Opens the query span and all else that tells of the stream.
    fn record(&self, stream: Observer, text: &str) -> Recorder {
        let Connection { telemetry, .. } = self.connection.borrow();
        let about = QueryInfo {
            entity: &self.sql.entity,
            summary: &format!("SELECT {}", self.sql.entity),
            schema: self.sql.schema(),
            database: &telemetry.database,
            text: telemetry.query_text.then_some(text),
        };
        Recorder::start(&telemetry.instruments, stream, about, telemetry.poll_spans)
    }
}

impl<T, C> fmt::Debug for Query<'_, T, C> {
    // Without the values: they are the service's data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Query")
            .field("sql", &self.sql)
            .field("chunk_size", &self.chunk_size)
            .field("max_memory", &self.max_memory)
            .finish_non_exhaustive()
    }
}
