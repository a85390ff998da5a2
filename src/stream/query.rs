//! `Query`: what to stream and within which bounds; `stream` is the only place where the stages are joined.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use tokio::runtime::Handle;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use super::decode::FromJson;
use super::json_stream::JsonStream;
use super::launch::{Handover, Launch, Work};
use super::reader::{Parts, Predicate};
use super::task::{Task, launch_unprepared};
use crate::channel::{Clock, Limits, Observer, Watchdog, bounded};
use crate::connection::{Connection, Hold};
use crate::error::{Error, ErrorKind, Result};
use crate::postgres::{self, Lease, Session, Sql, Value};
use crate::telemetry::{End, Heartbeat, QueryInfo, Recorder, wait_in_span};

/// A query for the JSON documents of one entity. Created by [`Connection::query`] and [`Connection::into_query`].
///
/// It sends `SELECT data FROM <entity> WHERE ... ORDER BY ... LIMIT ... OFFSET ...`. The texts passed to
/// [`where_sql`](Self::where_sql) and [`order_by`](Self::order_by) are SQL that you, the author of the service, write;
/// they are sent unchanged. Never build them from the input of a user: pass values as `$1`, `$2`, ... instead.
///
/// # Examples
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
    /// Returns a query for the column `data` of a table or view. Its stream borrows this connection.
    ///
    /// `entity` is the name of the table or view, optionally with its schema: `orders`, `sales.orders`. Put double quotes
    /// around a part that contains a dot: `"my.schema".orders`. The name is quoted as an identifier, so case matters, and
    /// it is never interpreted as SQL. It is also the value of the attribute `entity` of all metrics: keep the number of
    /// distinct entities small.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use futures_util::TryStreamExt;
    ///
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let mut orders = db.query::<serde_json::Value>("sales.orders").stream().await?;
    /// while let Some(order) = orders.try_next().await? {
    ///     println!("{order}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn query<'p, T: FromJson>(&mut self, entity: &str) -> Query<'p, T, &mut Self> {
        Query::new(self, entity)
    }

    /// Returns a query like [`query`](Self::query) does, but its stream owns this connection and is `'static`: it fits
    /// into a spawned task or a response body.
    ///
    /// If the stream cannot be started, the error returns the connection. [`JsonStream::close`] returns it later, also
    /// after an error that ended the stream.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use futures_util::StreamExt;
    ///
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

    /// Adds a condition in SQL, with a value for each of its parameters. Rows that do not meet it are not sent.
    ///
    /// If called more than once, all conditions must be met. Parameters are numbered across all calls: the first value
    /// of the second call follows the last value of the first. A value is anything that tokio-postgres can send, which
    /// includes a [`serde_json::Value`] for a parameter of type json or jsonb.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let orders = db
    ///     .query::<serde_json::Value>("orders")
    ///     .where_sql("data->>'status' = $1", &[&"open"])
    ///     .where_sql("(data->>'total')::float8 > $2", &[&100.0])
    ///     .where_sql("data @> $3", &[&serde_json::json!({"customer": {"country": "CH"}})])
    ///     .stream()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn where_sql(mut self, condition: &str, values: &[&'p (dyn ToSql + Sync)]) -> Self {
        self.sql.conditions.push(condition.to_owned());
        self.values.extend_from_slice(values);
        self
    }

    /// Adds a predicate in Rust, which is called with each decoded row. Rows for which it returns `false` are counted
    /// as filtered and not returned.
    ///
    /// Filtered rows have been sent and decoded by then; a condition in SQL is cheaper. If called more than once, all
    /// predicates must return `true`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let orders = db
    ///     .query::<serde_json::Value>("orders")
    ///     .where_rust(|order| order["lines"].as_array().is_some_and(|lines| lines.len() > 3))
    ///     .stream()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
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

    /// Orders the rows by an SQL expression (`ORDER BY`). If called more than once, each further expression orders the
    /// rows that are equal so far. By default, the order is unspecified.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let orders = db
    ///     .query::<serde_json::Value>("orders")
    ///     .order_by("(data->>'total')::float8 DESC")
    ///     .order_by("(data->>'id')::bigint")
    ///     .stream()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn order_by(mut self, expression: &str) -> Self {
        self.sql.order_by.push(expression.to_owned());
        self
    }

    /// Limits the result to `rows` rows (`LIMIT`). By default, there is no limit.
    ///
    /// Applies before [`where_rust`](Self::where_rust), which can reduce the result further.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let first = db.query::<serde_json::Value>("orders").order_by("(data->>'id')::bigint").limit(10).stream().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn limit(mut self, rows: u64) -> Self {
        self.sql.limit = Some(rows);
        self
    }

    /// Skips the first `rows` rows (`OFFSET`). Defaults to 0.
    ///
    /// Applies before [`where_rust`](Self::where_rust), which can reduce the result further.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let second_page = db.query::<serde_json::Value>("orders").order_by("(data->>'id')::bigint").offset(10).limit(10).stream().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn offset(mut self, rows: u64) -> Self {
        self.sql.offset = Some(rows);
        self
    }

    /// Sets the maximum number of rows per chunk. A chunk is sent as soon as no further row is ready, so the first row
    /// is never held back. Defaults to 128.
    ///
    /// Larger chunks mean fewer hand-overs between tasks and coarser statistics. The channel holds at most 256 rows, or
    /// one chunk if that is larger. With 0, [`stream`](Self::stream) fails with `Config`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let orders = db.query::<serde_json::Value>("orders").chunk_size(16).stream().await?;
    /// assert_eq!(orders.stats().row_limit, 256);
    /// # Ok(())
    /// # }
    /// ```
    pub fn chunk_size(mut self, rows: usize) -> Self {
        self.chunk_size = Some(rows);
        self
    }

    /// Limits the payload bytes that wait in the channel. While the channel is full, Postgres has to wait. A single
    /// larger row passes alone. Defaults to 16 MiB.
    ///
    /// Whichever is reached first applies: this limit, or that of 256 rows (see [`chunk_size`](Self::chunk_size)). The
    /// buffers of the kernel are not counted: about 4 MB for loopback TCP, 0.2 MB for a Unix socket. With 0,
    /// [`stream`](Self::stream) fails with `Config`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let orders = db.query::<serde_json::Value>("orders").max_memory(1_000_000).stream().await?;
    /// assert_eq!(orders.stats().byte_limit, 1_000_000);
    /// # Ok(())
    /// # }
    /// ```
    pub fn max_memory(mut self, bytes: usize) -> Self {
        self.max_memory = Some(bytes);
        self
    }

    /// Sends the query and returns the stream of its rows. Does not wait for a row: statistics begin, and the query can
    /// be cancelled, from here on.
    ///
    /// The first time this text is sent on a connection, Postgres prepares it before this method returns. While the
    /// statement is cached, an error is the first item of the stream instead.
    ///
    /// Opens a query span below the current span of the caller.
    ///
    /// # Errors
    ///
    /// - [`Config`](crate::ErrorKind::Config) if a setting is invalid, or there is no tokio runtime.
    /// - [`Statement`](crate::ErrorKind::Statement) if the values do not fit the parameters, or the column `data` is
    ///   not json or jsonb.
    /// - [`Query`](crate::ErrorKind::Query) if Postgres rejects the statement, for example because the relation does
    ///   not exist.
    /// - [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is lost, and [`Lost`](crate::ErrorKind::Lost)
    ///   if the runtime is shut down.
    /// - [`TransactionAborted`](crate::ErrorKind::TransactionAborted), once, if a previously dropped stream has aborted
    ///   your transaction.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the query is cancelled and the connection stays clean. If the future owns the
    /// connection, the connection is closed after that.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let mut orders = db.query::<serde_json::Value>("orders").stream().await?;
    /// println!("{}", orders.stats());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn stream(mut self) -> Result<JsonStream<T, C>, C::Error> {
        let entity: Arc<str> = Arc::from(self.sql.entity.as_str());
        match self.start(&entity).await {
            Ok(parts) => Ok(JsonStream::new(parts, self.connection)),
            Err(error) => Err(self.connection.give_back(error)),
        }
    }

    async fn start(&mut self, entity: &Arc<str>) -> Result<Parts<T>> {
        let (limits, text, runtime) = match self.check() {
            Ok(checked) => checked,
            Err(error) => return Err(self.refuse(entity, error)),
        };
        let (session, database) = {
            let connection = self.connection.borrow();
            (Arc::clone(&connection.session), Arc::clone(&connection.telemetry.database))
        };
        let turn = wait_in_span(entity, &database, session.turn_for_query()).await;
        let turn = turn.map_err(|error| self.refuse(entity, error))?;

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

        let cached = self.cached(&session, &task.text);
        let unseen_failure = Arc::clone(session.unseen_failure());
        // The task alone keeps the session from here on, until it gives back the turn.
        drop(session);
        let launched = match cached {
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
                let error = error.of_entity(entity);
                if error.sqlstate().is_some() {
                    unseen_failure.store(false, Ordering::Relaxed);
                }
                recorder.ended(End::Failed(&error));
                Err(error)
            }
        }
    }

    /// Returns the cached statement for a text, with the encoded values. Values that do not fit may fit when the
    /// statement is prepared again, because the types of its parameters can change.
    fn cached(&self, session: &Session, text: &str) -> Option<(Statement, Vec<Value>)> {
        let statement = session.statement(text)?;
        let values = postgres::encode(&self.values, statement.params()).ok()?;
        Some((statement, values))
    }

    /// Checks what can be checked before anything is sent.
    fn check(&self) -> Result<(Limits, String, Handle)> {
        let limits = Limits::new(self.chunk_size, self.max_memory).map_err(Error::config)?;
        let text = self.sql.text()?;
        let runtime = Handle::try_current().map_err(|_| Error::no_runtime())?;
        Ok((limits, text, runtime))
    }

    /// Records a stream that never began.
    fn refuse(&self, entity: &Arc<str>, error: Error) -> Error {
        let error = match error.kind() {
            // It was another stream that aborted the transaction.
            ErrorKind::TransactionAborted => error,
            _ => error.of_entity(entity),
        };
        self.connection.borrow().telemetry.instruments.record_refusal(entity, &error);
        error
    }

    /// Starts recording the stream, which opens its query span.
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
