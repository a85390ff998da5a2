//! The one error, and what part of the work it met.

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio_postgres::error::{DbError, SqlState};

use crate::stats::Stats;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error met while connecting, querying or decoding a row.
///
/// Its text is whole, on one line, and holds no secret. One that ends a stream also says how far the stream
/// got and whose time it was:
///
/// ```text
/// orders: canceling statement due to statement timeout (57014) after 100,213 rows in 30.0 s; consumer-bound 94 %: Postgres waited for your code, not the other way round
/// ```
///
/// ```
/// use fraiseql_stream::{Connection, ErrorKind};
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
    message: String,
    stats: Option<Stats>,
    source: Option<Source>,
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// What part of the work failed.
///
/// ```
/// use fraiseql_stream::ErrorKind;
/// assert_eq!(ErrorKind::Decode { row: 7 }.as_str(), "decode");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument that can't work; nothing was sent.
    Config,
    /// No connection could be made, or Postgres refused it.
    Connect,
    /// Postgres refused the query, or ended it: [`Error::sqlstate`] says why.
    Query,
    /// The connection broke: the backend or the whole server is gone.
    Disconnected,
    /// A row is not a `T`. The stream goes on behind it.
    Decode {
        /// The row, counted from 0 in the order of the stream.
        row: u64,
    },
    /// The transaction that is open on the connection is aborted: a stream in it was dropped before its end, which
    /// cancelled its query. Nothing was sent. Reported once, by whatever uses the connection next; run `ROLLBACK`,
    /// or `ROLLBACK TO` a savepoint set before the stream.
    TransactionAborted,
    /// The task that reads from Postgres vanished without a word: it panicked, or its runtime was shut down.
    Lost,
}

impl ErrorKind {
    /// The name in `error.type` of metrics and spans, where there is no SQLSTATE.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Connect => "connect",
            Self::Query => "query",
            Self::Disconnected => "disconnected",
            Self::Decode { .. } => "decode",
            Self::TransactionAborted => "transaction_aborted",
            Self::Lost => "lost",
        }
    }
}

impl Error {
    /// What part of the work failed.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The SQLSTATE that Postgres gave, such as `57014` for a statement that was cancelled.
    pub fn sqlstate(&self) -> Option<&SqlState> {
        self.db_error().map(DbError::code)
    }

    /// Statistics of the stream at its end, if the error ended one.
    pub fn stats(&self) -> Option<&Stats> {
        self.0.stats.as_ref()
    }

    /// The value of `error.type`: the SQLSTATE if there is one, else the kind.
    pub(crate) fn type_name(&self) -> &str {
        self.sqlstate().map_or_else(|| self.kind().as_str(), SqlState::code)
    }

    fn db_error(&self) -> Option<&DbError> {
        self.client_error()?.as_db_error()
    }

    /// The error of tokio-postgres below this one.
    pub(crate) fn client_error(&self) -> Option<&tokio_postgres::Error> {
        self.0.source.as_ref()?.downcast_ref()
    }

    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, entity: None, message: message.into(), stats: None, source: None }))
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    /// A connection that could not be made; the message says where to and, from `source`, why.
    pub(crate) fn connect(place: impl fmt::Display, source: tokio_postgres::Error) -> Self {
        let advice = if is_io(&source) { WHERE } else { advice(&source) };
        let message = format!("cannot connect to {place}: {}{advice}", describe(&source));
        Self::new(ErrorKind::Connect, message).with_source(source)
    }

    pub(crate) fn unreachable(place: impl fmt::Display, source: io::Error) -> Self {
        Self::new(ErrorKind::Connect, format!("cannot connect to {place}: {source}{WHERE}"))
            .with_source(source)
    }

    pub(crate) fn query(source: tokio_postgres::Error) -> Self {
        let kind = if ends_connection(&source) { ErrorKind::Disconnected } else { ErrorKind::Query };
        Self::new(kind, describe(&source) + advice(&source)).with_source(source)
    }

    /// The connection was given up after a cancel that did not come to an end.
    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Disconnected, "the connection is closed; connect again")
    }

    pub(crate) fn no_runtime() -> Self {
        Self::config(
            "there is no tokio runtime here; await the stream in a task of one, or enter it with Runtime::enter",
        )
    }

    pub(crate) fn transaction_aborted() -> Self {
        let message = "the open transaction is aborted: a stream in it was dropped before its end, which cancelled its query; run ROLLBACK, or ROLLBACK TO a savepoint set before the stream (to stop early and keep the transaction, end the stream with drain())";
        Self::new(ErrorKind::TransactionAborted, message)
    }

    /// Whether the server refused a prepared statement that it would accept if it were prepared again: it was
    /// deallocated, or the type of its result has changed.
    pub(crate) fn is_stale_statement(&self) -> bool {
        self.db_error().is_some_and(|db| match *db.code() {
            SqlState::INVALID_SQL_STATEMENT_NAME => true,
            // The message is translated, the name of the function is not.
            SqlState::FEATURE_NOT_SUPPORTED => db.routine() == Some("RevalidateCachedQuery"),
            _ => false,
        })
    }

    pub(crate) fn decode(
        row: u64,
        null: bool,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        let hint = if null { " (data is null: stream Option<T> to accept it)" } else { "" };
        Self::new(ErrorKind::Decode { row }, format!("row {row}: {source}{hint}")).with_source(source)
    }

    pub(crate) fn lost() -> Self {
        let message = "the task that reads from Postgres was lost (it panicked, or its runtime was shut down); rows are missing";
        Self::new(ErrorKind::Lost, message)
    }

    pub(crate) fn of_entity(mut self, entity: &Arc<str>) -> Self {
        self.0.entity = Some(Arc::clone(entity));
        self
    }

    pub(crate) fn with_note(mut self, note: &str) -> Self {
        self.0.message = format!("{}; {note}", self.0.message);
        self
    }

    pub(crate) fn with_stats(mut self, stats: Stats) -> Self {
        self.0.stats = Some(stats);
        self
    }

    fn with_source(mut self, source: impl Into<Source>) -> Self {
        self.0.source = Some(source.into());
        self
    }
}

/// Whether the connection is gone with this error: it closed or broke, or Postgres ended the backend (class
/// 57P: `admin_shutdown`, `crash_shutdown`, ...).
fn ends_connection(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(code) => code.code().starts_with("57P"),
        None => error.is_closed() || is_io(error),
    }
}

/// Whether the network failed. What can't be encoded or parsed comes as an `io::Error` too.
fn is_io(error: &tokio_postgres::Error) -> bool {
    io_cause(error)
        .is_some_and(|io| !matches!(io.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData))
}

pub(crate) fn io_cause(error: &tokio_postgres::Error) -> Option<&io::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

const WHERE: &str = "; check host and port, and that Postgres takes connections there";

/// What to change, where the server's words leave that open.
fn advice(error: &tokio_postgres::Error) -> &'static str {
    let Some(db) = error.as_db_error() else { return "" };
    match *db.code() {
        SqlState::UNDEFINED_TABLE if db.message().starts_with("relation ") => {
            "; an entity is the name of a table or view: case counts, and without a schema it is looked up in search_path"
        }
        SqlState::UNDEFINED_COLUMN if db.message().contains("\"data\"") => {
            "; documents are read from a column named data: stream a view that has one"
        }
        SqlState::INVALID_PASSWORD => "; check user and password in the connection string",
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION if db.message().contains("pg_hba.conf") => {
            "; the server admits this user from here only in another way (this version speaks no TLS)"
        }
        SqlState::INVALID_CATALOG_NAME => "; check the database in the connection string",
        _ => "",
    }
}

/// An error of tokio-postgres in one clause, with the server's own words first.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        return match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
    };
    let more = |name, text: Option<&str>| text.map_or_else(String::new, |text| format!("; {name}: {text}"));
    let (detail, hint) = (more("detail", db.detail()), more("hint", db.hint()));
    format!("{} ({}){detail}{hint}", db.message(), db.code().code()).replace('\n', " ")
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(entity) = &self.0.entity {
            write!(f, "{entity}: ")?;
        }
        f.write_str(&self.0.message)?;
        match &self.0.stats {
            Some(stats) => write!(f, " {}", stats.epitaph()),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}, \"{self}\")", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
