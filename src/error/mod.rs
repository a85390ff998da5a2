//! `Error`: what failed, why, and what to do about it.

mod client;
mod pace;
mod recorded;

use std::fmt::{self, Write as _};
use std::io;
use std::sync::Arc;

use tokio_postgres::error::{DbError, SqlState};

use self::client::{advice, details, is_disconnect, is_io, what};
pub(crate) use self::client::{describe, io_cause};
use self::pace::pace;
pub(crate) use self::recorded::Recorded;
use crate::channel::{OneLine, Stats};

/// A [`std::result::Result`] whose error type defaults to [`Error`].
///
/// # Examples
///
/// ```
/// use fraiseql_stream::{JsonStream, Result};
/// use futures_util::TryStreamExt;
///
/// async fn count(orders: JsonStream<serde_json::Value>) -> Result<usize> {
///     orders.try_fold(0, |rows, _| async move { Ok(rows + 1) }).await
/// }
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error that occurred while connecting, querying or decoding a row.
///
/// # Text
///
/// [`Display`](fmt::Display) writes one complete line: what failed, why, and what to do. The line includes the text of
/// the underlying error. [`source`](std::error::Error::source) therefore returns `None`, so that reporters which print
/// the whole chain do not repeat it; use [`get_ref`](Self::get_ref) or [`as_db_error`](Self::as_db_error) instead.
///
/// The line never contains a password. It can quote values of a row or a parameter, as the messages of Postgres and
/// serde do. Control characters and line breaks in names and in the messages of Postgres and serde
/// are escaped, as in `\n`. If the error ended a stream, the line also reports how far the stream got and, if that can
/// explain the error, which side set the pace:
///
/// ```text
/// orders: canceling statement due to statement timeout (57014) after 100,213 rows in 30.0 s; consumer-bound 94 %: Postgres waited for your code, not the other way round
/// ```
///
/// # Examples
///
/// ```
/// use fraiseql_stream::{Connection, ErrorKind};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let error = Connection::connect("postgres://localhost:1/db?connect_timeout=1").await.unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Connect);
/// # }
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    entity: Option<Arc<str>>,
    /// What failed, and why.
    message: String,
    /// Details and what to do, as clauses to append.
    more: String,
    stats: Option<Stats>,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The part of the work that failed.
///
/// # Examples
///
/// ```
/// use fraiseql_stream::ErrorKind;
///
/// fn can_retry(kind: ErrorKind) -> bool {
///     matches!(kind, ErrorKind::Connect | ErrorKind::Disconnected | ErrorKind::Lost)
/// }
///
/// assert!(can_retry(ErrorKind::Disconnected));
/// assert!(!can_retry(ErrorKind::Decode { row: 7 }));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is invalid, or there is no tokio runtime. Nothing was sent to Postgres.
    Config,
    /// No host could be reached, or Postgres refused the connection.
    Connect,
    /// Postgres accepted the statement, but it cannot be streamed: its column `data` is not json or jsonb, or the
    /// values do not match its parameters. The statement was prepared but not run.
    Statement,
    /// Postgres rejected the query or ended it; see [`Error::sqlstate`]. The connection can be used again.
    Query,
    /// The connection is lost: the network failed, or the backend or the whole server is gone. Includes every error of
    /// Postgres whose severity is FATAL or PANIC.
    Disconnected,
    /// A row does not deserialize into `T`. The stream continues with the next row.
    Decode {
        /// The number of the row in the stream, starting at 0.
        row: u64,
    },
    /// The open transaction of the connection is aborted: a stream in it was dropped before its end, and its query was
    /// cancelled or failed without its error being read. The next use of the connection reports this once, without
    /// sending your statement. Run `ROLLBACK`, or `ROLLBACK TO` a savepoint set before the stream.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use fraiseql_stream::{ErrorKind, JsonStream};
    /// # async fn example(orders: JsonStream<serde_json::Value>) -> Result<(), Box<dyn std::error::Error>> {
    /// if let Err(error) = orders.close().await {
    ///     let (error, mut db) = error.into_parts();
    ///     assert_eq!(error.kind(), ErrorKind::TransactionAborted);
    ///     db.client().await?.batch_execute("ROLLBACK").await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    TransactionAborted,
    /// The task that reads from Postgres ended early: it panicked, or its runtime was shut down.
    Lost,
}

impl ErrorKind {
    /// Returns the name of the kind in snake case.
    ///
    /// It is the value of the attribute `error.type` of `fraiseql.stream.ended`, and of other metrics and spans if the
    /// error has no SQLSTATE.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::ErrorKind;
    ///
    /// assert_eq!(ErrorKind::Decode { row: 7 }.as_str(), "decode");
    /// assert_eq!(ErrorKind::TransactionAborted.as_str(), "transaction_aborted");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Connect => "connect",
            Self::Statement => "statement",
            Self::Query => "query",
            Self::Disconnected => "disconnected",
            Self::Decode { .. } => "decode",
            Self::TransactionAborted => "transaction_aborted",
            Self::Lost => "lost",
        }
    }
}

impl Error {
    /// Returns the part of the work that failed.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::{Connection, ErrorKind};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let error = Connection::connect("postgres://app@localhost/shop?sslmode=require").await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Config); // there is no TLS yet
    /// # }
    /// ```
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the SQLSTATE reported by Postgres, such as `57014` for a statement that was cancelled. Returns `None` if
    /// the error did not come from Postgres.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::Error;
    /// use fraiseql_stream::tokio_postgres::error::SqlState;
    ///
    /// fn is_timeout(error: &Error) -> bool {
    ///     error.sqlstate() == Some(&SqlState::QUERY_CANCELED)
    /// }
    /// ```
    pub fn sqlstate(&self) -> Option<&SqlState> {
        self.as_db_error().map(DbError::code)
    }

    /// Returns the final statistics of the stream that the error ended. Returns `None` if the error did not end a
    /// stream, such as one of kind [`Decode`](ErrorKind::Decode).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use futures_util::TryStreamExt;
    ///
    /// # async fn example(mut orders: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// if let Err(error) = orders.try_next().await
    ///     && let Some(stats) = error.stats()
    /// {
    ///     println!("failed after {} rows: {}", stats.rows, stats.verdict());
    /// }
    /// # }
    /// ```
    pub fn stats(&self) -> Option<&Stats> {
        self.0.stats.as_ref()
    }

    /// Returns the value of the attribute `error.type`: the SQLSTATE if there is one, the kind otherwise.
    pub(crate) fn type_name(&self) -> &str {
        self.sqlstate().map_or_else(|| self.kind().as_str(), SqlState::code)
    }

    /// Returns the error that Postgres reported, with its detail, hint, constraint and position. Returns `None` if the
    /// error did not come from Postgres.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) {
    /// if let Err(error) = db.query::<serde_json::Value>("orders").stream().await
    ///     && let Some(db_error) = error.as_db_error()
    /// {
    ///     println!("{} at {:?}", db_error.message(), db_error.position());
    /// }
    /// # }
    /// ```
    pub fn as_db_error(&self) -> Option<&DbError> {
        self.client_error()?.as_db_error()
    }

    /// Returns the underlying error, if there is one: a [`tokio_postgres::Error`], a [`std::io::Error`], or the error of
    /// the decoder, such as a [`serde_json::Error`]. Its text is part of the text of this error.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::Connection;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let error = Connection::connect("postgres://app@localhost:1/shop").await.unwrap_err();
    /// assert!(error.get_ref().unwrap().is::<fraiseql_stream::tokio_postgres::Error>());
    /// # }
    /// ```
    pub fn get_ref(&self) -> Option<&(dyn std::error::Error + Send + Sync + 'static)> {
        self.0.cause.as_deref()
    }

    /// Returns the underlying error of tokio-postgres, if there is one.
    pub(crate) fn client_error(&self) -> Option<&tokio_postgres::Error> {
        self.get_ref()?.downcast_ref()
    }

    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            entity: None,
            message: message.into(),
            more: String::new(),
            stats: None,
            cause: None,
        }))
    }

    /// Creates the error of an invalid setting; nothing was sent to Postgres.
    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    /// Creates the error of a prepared statement that cannot be streamed.
    pub(crate) fn statement(message: impl Into<String>, advice: &str) -> Self {
        Self::new(ErrorKind::Statement, message).with_note(advice)
    }

    /// Creates the error of a connection to `place` that failed or was refused.
    pub(crate) fn connect(place: impl fmt::Display, cause: tokio_postgres::Error) -> Self {
        let advice = if is_io(&cause) { CHECK_ADDRESS } else { advice(&cause) };
        let message = format!("cannot connect to {place}: {}{advice}", describe(&cause));
        Self::new(ErrorKind::Connect, message).caused_by(cause)
    }

    /// Creates the error of a connection to `place` that could not be reached.
    pub(crate) fn unreachable(place: impl fmt::Display, cause: io::Error) -> Self {
        let message = format!("cannot connect to {place}: {cause}{CHECK_ADDRESS}");
        Self::new(ErrorKind::Connect, message).caused_by(cause)
    }

    /// Creates the error of a request on a connection that was open.
    pub(crate) fn query(cause: tokio_postgres::Error) -> Self {
        let kind = if is_disconnect(&cause) { ErrorKind::Disconnected } else { ErrorKind::Query };
        let mut error = Self::new(kind, what(&cause));
        error.0.more = details(&cause) + advice(&cause);
        error.caused_by(cause)
    }

    /// Creates the error of using a connection that was lost earlier, or closed because a query could not be cancelled.
    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Disconnected, "the connection is closed; connect again")
    }

    /// Creates the error of connecting or starting a stream outside of a tokio runtime.
    pub(crate) fn no_runtime() -> Self {
        Self::config(
            "there is no tokio runtime; await the future inside a runtime, or call Runtime::enter first",
        )
    }

    /// Creates the error that reports once that a query has aborted the caller's transaction.
    pub(crate) fn transaction_aborted() -> Self {
        let message = "the open transaction is aborted: a stream in it was dropped before its end or before its error was read; run ROLLBACK, or ROLLBACK TO a savepoint set before the stream (reported once: COMMIT would now roll back and report success; to stop early and keep a transaction, end the stream with drain())";
        Self::new(ErrorKind::TransactionAborted, message)
    }

    /// Returns whether the server rejected a prepared statement that it would accept if it were prepared again, because
    /// it was deallocated or the type of its result has changed.
    pub(crate) fn is_stale_statement(&self) -> bool {
        self.as_db_error().is_some_and(|db| match *db.code() {
            SqlState::INVALID_SQL_STATEMENT_NAME => true,
            // The message may be translated; the name of the server's function is not.
            SqlState::FEATURE_NOT_SUPPORTED => db.routine() == Some("RevalidateCachedQuery"),
            _ => false,
        })
    }

    /// Creates the error of a row that does not deserialize. `null` is set if its document is null.
    pub(crate) fn decode(
        row: u64,
        null: bool,
        cause: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        let hint = if null { "; data is null: stream Option<T> to accept it" } else { "" };
        Self::new(ErrorKind::Decode { row }, format!("row {row}: {cause}{hint}")).caused_by(cause)
    }

    /// Creates the error of a stream whose task ended without reporting a result.
    pub(crate) fn lost() -> Self {
        let message = "the stream is incomplete: the task that reads from Postgres panicked, or its runtime was shut down";
        Self::new(ErrorKind::Lost, message)
    }

    /// Names the entity at the start of the text.
    pub(crate) fn of_entity(mut self, entity: &Arc<str>) -> Self {
        self.0.entity = Some(Arc::clone(entity));
        self
    }

    /// Appends `note` to the text.
    pub(crate) fn with_note(mut self, note: &str) -> Self {
        self.0.more = format!("{}; {note}", self.0.more);
        self
    }

    /// Adds the final statistics of the stream that the error ended.
    pub(crate) fn with_stats(mut self, stats: Stats) -> Self {
        self.0.stats = Some(stats);
        self
    }

    fn caused_by(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.cause = Some(Box::new(cause));
        self
    }
}

const CHECK_ADDRESS: &str = "; check host and port, and that Postgres accepts connections there";

/// Writes the whole error on one line.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, &self.0.message, &self.0.more)
    }
}

impl Inner {
    /// Writes the error on one line, with this message, and these details and advice.
    fn write(&self, f: &mut fmt::Formatter<'_>, message: &str, more: &str) -> fmt::Result {
        let Self { kind, entity, stats, .. } = self;
        let mut line = OneLine(f);
        if let Some(entity) = entity.as_ref().filter(|entity| !entity.is_empty()) {
            write!(line, "{entity}: ")?;
        }
        line.write_str(message)?;
        if let Some(stats) = stats {
            write!(line, " {}", stats.progress())?;
        }
        line.write_str(more)?;
        match (kind, stats) {
            // Neither side's pace caused this error, so a verdict would mislead.
            (ErrorKind::Disconnected | ErrorKind::Lost | ErrorKind::Statement, _) | (_, None) => Ok(()),
            (_, Some(stats)) => write!(line, "; {}", pace(stats)),
        }
    }
}

/// Writes the kind and the whole error on one line, also with `{:#?}`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The line is not quoted: it has quotes of its own, and people read it when `main` returns the error.
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

/// Has no [`source`](std::error::Error::source), because the text already includes that of the underlying error.
impl std::error::Error for Error {}

#[cfg(test)]
mod tests;
