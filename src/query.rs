//! `Query`: what to stream and within which bounds; `stream` is the only place where the stages are joined.

use std::borrow::BorrowMut;
use std::fmt;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_postgres::types::{ToSql, Type};

use crate::channel::{Sender, bounded};
use crate::config::Limits;
use crate::connection::Connection;
use crate::decode::FromJson;
use crate::error::{Error, Result};
use crate::postgres::{self, Cancelled, Lease, Sql, Value};
use crate::probe::Probe;
use crate::producer;
use crate::stats::Observer;
use crate::stream::{JsonStream, Parts, Predicate};
use crate::telemetry::{self, Recorder};
use crate::time::Clock;

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

impl<'p, T: FromJson, C: BorrowMut<Connection>> Query<'p, T, C> {
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

    /// Sends the query. Returns once Postgres has accepted its text, before any row: rows, statistics and
    /// cancelling begin here.
    ///
    /// Below the caller's current span there is from now on a span of this query.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for a setting that can't work, values that do not fit the
    /// parameters, or a column `data` that is not json or jsonb; [`Query`](crate::ErrorKind::Query) when
    /// Postgres refuses the statement, for instance because there is no such relation;
    /// [`Disconnected`](crate::ErrorKind::Disconnected) when the connection is gone.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future cancels the query and leaves the connection clean.
    pub async fn stream(self) -> Result<JsonStream<T, C>> {
        let entity: Arc<str> = Arc::from(self.sql.entity.as_str());
        self.start(&entity).await.map_err(|error| error.of_entity(&entity))
    }

    async fn start(self, entity: &Arc<str>) -> Result<JsonStream<T, C>> {
        let limits = Limits::new(self.chunk_size, self.max_memory)?;
        let text = self.sql.text()?;
        let session = Arc::clone(&self.connection.borrow().session);
        let turn = session.turn().await?;

        let (sender, receiver) = bounded(limits, Clock::start());
        let observer = Observer {
            entity: Arc::clone(entity),
            gauge: Arc::clone(receiver.gauge()),
            progress: Arc::default(),
        };
        let recorder = self.record(observer.clone(), &text);
        let span = recorder.span().clone();
        let probe = Probe::new(receiver.witness());
        let mut parts = Parts {
            receiver,
            predicate: self.predicate,
            observer: observer.clone(),
            recorder,
            probe: Arc::clone(&probe),
        };

        let (types, prepared) = oneshot::channel();
        let (bind, values) = oneshot::channel();
        let lease = Lease::new(&session, turn, &span);
        let work = produce(Task { lease, text, sender, types, values });
        tokio::spawn(async move {
            // Ends with the work, however that ends.
            let mut beside = JoinSet::new();
            beside.spawn(telemetry::heartbeat(observer, span));
            beside.spawn(probe.run());
            work.await;
        });
        parts.receiver.wait_for_start();
        let prepared = prepared.await.unwrap_or_else(|_| Err(Error::lost()));
        parts.receiver.resume();
        match prepared.and_then(|types| postgres::encode(&self.values, &types)) {
            Ok(values) => {
                parts.recorder.accepted();
                // If nobody takes them, the stream's first item says why.
                let _ = bind.send(values);
                Ok(JsonStream::new(parts, self.connection))
            }
            Err(error) => {
                parts.recorder.ended(Some(Err(&error)));
                Err(error)
            }
        }
    }

    /// Opens the query span and all else that tells of the stream.
    fn record(&self, stream: Observer, text: &str) -> Recorder {
        let telemetry = &self.connection.borrow().telemetry;
        let about = telemetry::Query {
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

/// What the task beside a stream needs.
struct Task {
    lease: Lease,
    text: String,
    sender: Sender,
    /// Gets the types of the parameters once the statement is prepared.
    types: oneshot::Sender<Result<Vec<Type>>>,
    /// Gives the values for them.
    values: oneshot::Receiver<Vec<Value>>,
}

/// Runs a query from its text to its last row, and cleans up behind it when the consumer leaves.
async fn produce(task: Task) {
    let Task { lease, text, mut sender, types, values } = task;
    let statement = match lease.prepare(&text, gone(&mut sender)).await {
        Ok(Ok(statement)) => statement,
        Ok(Err(error)) => {
            // Where nobody waits for it, nobody wants the query.
            let _ = types.send(Err(error));
            return;
        }
        Err(Cancelled) => return,
    };
    let _ = types.send(Ok(statement.params().to_vec()));
    let Ok(values) = values.await else { return };
    let mut rows = match lease.query(&statement, values, gone(&mut sender)).await {
        Ok(Ok(rows)) => rows,
        Ok(Err(error)) => return sender.finish(Err(error)),
        Err(Cancelled) => return,
    };
    match producer::run(&mut sender, &mut rows).await {
        Ok(Ok(())) => {
            sender.finish(Ok(()));
            lease.finish(rows).await;
        }
        // The server's error has ended the query; any other has not.
        Ok(Err(error)) if error.sqlstate().is_some() => {
            sender.finish(Err(lease.explain(error).await));
            lease.finish(rows).await;
        }
        Ok(Err(error)) => {
            sender.finish(Err(lease.explain(error).await));
            lease.cancel(rows).await;
        }
        Err(_) => lease.cancel(rows).await,
    }
    // The lease ends here, with the statement closed behind the query.
    drop((statement, lease));
    // The heartbeat goes on while the consumer works off what is left.
    gone(&mut sender).await;
}

/// Waits until the consumer has left.
async fn gone(sender: &mut Sender) {
    std::future::poll_fn(|cx| sender.poll_closed(cx)).await;
}
