//! `Error`: what failed, why, and what to change.

use std::fmt::{self, Write as _};
use std::io;
use std::sync::Arc;

use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::channel::{OneLine, Stats};

/// A [`std::result::Result`] whose error is [`Error`] by default.
///
/// # Examples
///
/// ```
/// fn ship(order: serde_json::Value) -> fraiseql_stream::Result<()> {
///     Ok(())
/// }
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error that occurred while connecting, querying or decoding a row.
///
/// # Text
///
/// [`Display`](fmt::Display) writes one line that is complete: what failed, why, and what to do. It includes the text
/// of the underlying error, so [`source`](std::error::Error::source) returns `None`, and reporters that print the whole
/// chain do not repeat it. The underlying error is available through [`get_ref`](Self::get_ref) and
/// [`as_db_error`](Self::as_db_error).
///
/// The line contains no secrets. Control characters and line breaks in names, in messages of the server and in those
/// of serde are escaped, as in `\n`. If the error ended a stream, the line also reports how far the stream got and,
/// unless the connection was lost, which side set the pace:
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
    message: String,
    stats: Option<Stats>,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The part of the work that failed.
///
/// # Examples
///
/// ```
/// use fraiseql_stream::ErrorKind;
/// assert_eq!(ErrorKind::Decode { row: 7 }.as_str(), "decode");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is invalid. Nothing was sent to Postgres.
    Config,
    /// No host could be reached, or Postgres refused the connection.
    Connect,
    /// Postgres accepted the statement, but it cannot be streamed: its column `data` is not json or jsonb, or the
    /// values do not fit its parameters. It was prepared, but not run.
    Statement,
    /// Postgres rejected the query or ended it; see [`Error::sqlstate`]. The connection can be used again.
    Query,
    /// The connection is lost: the network failed, or the backend or the whole server is gone. That includes
    /// every error of Postgres whose severity is FATAL or PANIC.
    Disconnected,
    /// A row does not deserialize into `T`. The stream continues with the next row.
    Decode {
        /// The number of the row in the stream, starting at 0.
        row: u64,
    },
    /// The transaction that is open on the connection is aborted: a stream in it was dropped before its end, and its
    /// query was cancelled or had failed unseen. Reported once, by the next use of the connection, which sends no
    /// statement of yours. Run `ROLLBACK`, or `ROLLBACK TO` a savepoint set before the stream.
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
    /// Returns the name of the kind: the value of `error.type` in `fraiseql.stream.ended`, and in other metrics and
    /// spans if there is no SQLSTATE.
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
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the SQLSTATE reported by Postgres, such as `57014` for a statement that was cancelled.
    pub fn sqlstate(&self) -> Option<&SqlState> {
        self.as_db_error().map(DbError::code)
    }

    /// Returns the final statistics of the stream, if the error ended one.
    pub fn stats(&self) -> Option<&Stats> {
        self.0.stats.as_ref()
    }

    /// The value of `error.type`: the SQLSTATE if there is one, else the kind.
    pub(crate) fn type_name(&self) -> &str {
        self.sqlstate().map_or_else(|| self.kind().as_str(), SqlState::code)
    }

    /// Returns the error that Postgres reported, with its detail, hint, constraint and position.
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

    /// Returns the underlying error, if there is one: a [`tokio_postgres::Error`], a [`std::io::Error`], or the
    /// error of the decoder, such as a [`serde_json::Error`].
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

    pub(crate) fn client_error(&self) -> Option<&tokio_postgres::Error> {
        self.get_ref()?.downcast_ref()
    }

    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, entity: None, message: message.into(), stats: None, cause: None }))
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub(crate) fn statement(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Statement, message)
    }

    /// A connection to `place` failed.
    pub(crate) fn connect(place: impl fmt::Display, source: tokio_postgres::Error) -> Self {
        let advice = if is_io(&source) { WHERE } else { advice(&source) };
        let message = format!("cannot connect to {place}: {}{advice}", describe(&source));
        Self::new(ErrorKind::Connect, message).caused_by(source)
    }

    pub(crate) fn unreachable(place: impl fmt::Display, source: io::Error) -> Self {
        Self::new(ErrorKind::Connect, format!("cannot connect to {place}: {source}{WHERE}")).caused_by(source)
    }

    pub(crate) fn query(source: tokio_postgres::Error) -> Self {
        let kind = if is_disconnect(&source) { ErrorKind::Disconnected } else { ErrorKind::Query };
        Self::new(kind, describe(&source) + advice(&source)).caused_by(source)
    }

    /// The connection was lost earlier, or closed because a query could not be cancelled.
    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Disconnected, "the connection is closed; connect again")
    }

    pub(crate) fn no_runtime() -> Self {
        Self::config(
            "there is no tokio runtime here; await the stream in a task of one, or enter it with Runtime::enter",
        )
    }

    pub(crate) fn transaction_aborted() -> Self {
        let message = "the open transaction is aborted: a stream in it was dropped before its end or before its error was read; run ROLLBACK, or ROLLBACK TO a savepoint set before the stream (to stop early and keep the transaction, end the stream with drain())";
        Self::new(ErrorKind::TransactionAborted, message)
    }

    /// Whether the server refused a prepared statement that it would accept if it were prepared again: it was
    /// deallocated, or the type of its result has changed.
    pub(crate) fn is_stale_statement(&self) -> bool {
        self.as_db_error().is_some_and(|db| match *db.code() {
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
        Self::new(ErrorKind::Decode { row }, format!("row {row}: {source}{hint}")).caused_by(source)
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

    fn caused_by(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.cause = Some(Box::new(cause));
        self
    }
}

/// Whether the connection is lost. The SQLSTATE does not decide that: any may be FATAL, and an ERROR of class 57P
/// is that of a parallel worker, which its backend survives.
fn is_disconnect(error: &tokio_postgres::Error) -> bool {
    match error.as_db_error() {
        Some(db) => is_fatal(db),
        None => error.is_closed() || is_io(error),
    }
}

fn is_fatal(error: &DbError) -> bool {
    match error.parsed_severity() {
        Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
        // A connection pooler may send the severity only in the form that is meant for people.
        None => matches!(error.severity(), "FATAL" | "PANIC"),
    }
}

/// Whether the network failed. tokio-postgres also uses `io::Error` for what cannot be encoded or parsed.
fn is_io(error: &tokio_postgres::Error) -> bool {
    io_cause(error)
        .is_some_and(|io| !matches!(io.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData))
}

pub(crate) fn io_cause(error: &tokio_postgres::Error) -> Option<&io::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

const WHERE: &str = "; check host and port, and that Postgres accepts connections there";

/// What to change, where the server's message does not say so.
fn advice(error: &tokio_postgres::Error) -> &'static str {
    let Some(db) = error.as_db_error() else { return "" };
    match *db.code() {
        SqlState::UNDEFINED_TABLE if db.message().starts_with("relation ") => {
            "; an entity is the name of a table or view: case counts, and a name without a schema is looked up in search_path"
        }
        SqlState::UNDEFINED_COLUMN if db.message().contains("\"data\"") => {
            "; rows are read from a column named data: stream a view that has one"
        }
        SqlState::UNDEFINED_COLUMN => "; to use a key of the document, write data->>'key'",
        SqlState::INDETERMINATE_DATATYPE => {
            "; parameters are numbered from $1 without gaps, and each call of where_sql continues the numbering: add a cast such as $1::text if all of them are used"
        }
        SqlState::INVALID_PASSWORD => "; check user and password in the connection string",
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION if db.message().contains("pg_hba.conf") => {
            "; add a line for this user, database and address to pg_hba.conf (hostssl lines do not apply: this version has no TLS)"
        }
        SqlState::INVALID_CATALOG_NAME => "; check the database in the connection string",
        _ => "",
    }
}

/// Describes an error of tokio-postgres in one clause that begins with the server's message.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        return match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
    };
    let more = |name, text: Option<&str>| text.map_or_else(String::new, |text| format!("; {name}: {text}"));
    let (detail, hint) = (more("detail", db.detail()), more("hint", db.hint()));
    format!("{} ({}){detail}{hint}", db.message(), db.code().code())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, entity, message, stats, .. } = &*self.0;
        let mut line = OneLine(f);
        if let Some(entity) = entity {
            write!(line, "{entity}: ")?;
        }
        line.write_str(message)?;
        match (kind, stats) {
            (_, None) => Ok(()),
            // The server went away by itself: advice on the pace would mislead.
            (ErrorKind::Disconnected | ErrorKind::Lost, Some(stats)) => write!(line, " {}", stats.progress()),
            (_, Some(stats)) => write!(line, " {}", stats.summary()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without quotes around the line: it has quotes of its own, and is read by people when `main` returns it.
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio_postgres::{Config, NoTls};

    use super::*;

    /// The error made of these fields of an `ErrorResponse`, as a server sends it.
    async fn received(fields: &[(u8, &str)]) -> tokio_postgres::Error {
        let mut body: Vec<u8> =
            fields.iter().flat_map(|(kind, text)| [&[*kind], text.as_bytes(), &[0]].concat()).collect();
        body.push(0);
        let (ours, mut theirs) = tokio::io::duplex(1_024);
        theirs.write_u8(b'E').await.unwrap();
        theirs.write_u32(u32::try_from(body.len()).unwrap() + 4).await.unwrap();
        theirs.write_all(&body).await.unwrap();
        Config::new().user("u").connect_raw(ours, NoTls).await.err().expect("it is an error")
    }

    async fn kind_of(severity: &[(u8, &str)], code: &str) -> ErrorKind {
        let error = Error::query(received(&[severity, &[(b'C', code), (b'M', "why")]].concat()).await);
        assert_eq!(error.sqlstate().unwrap().code(), code);
        error.kind()
    }

    #[tokio::test]
    async fn the_severity_and_not_the_sqlstate_says_whether_the_connection_is_lost() {
        let kinds = [
            ("ERROR", ErrorKind::Query),
            ("FATAL", ErrorKind::Disconnected),
            ("PANIC", ErrorKind::Disconnected),
        ];
        let codes = ["25P03", "25P04", "40001", "57P01", "58P01", "XX000"];
        for ((severity, kind), code) in kinds.iter().flat_map(|kind| codes.map(|code| (kind, code))) {
            let translated = kind_of(&[(b'S', "in other words"), (b'V', severity)], code).await;
            let old = kind_of(&[(b'S', severity)], code).await;
            assert_eq!((translated, old), (*kind, *kind), "{severity} {code}");
        }
    }

    #[test]
    fn an_error_is_one_line_and_nothing_is_escaped_twice() {
        let name = "a\n\r\t\u{1b}\u{7f}\u{85}\u{2028}\u{2029}\0é'\"\\";
        let escaped = r#"a\n\r\t\u{1b}\u{7f}\u{85}\u{2028}\u{2029}\0é'"\"#;
        let error = Error::config(format!("{name}, {}", "plain")).of_entity(&name.into());
        assert_eq!(error.to_string(), format!("{escaped}: {escaped}, plain"));
        assert_eq!(format!("{error:?}"), format!("Config: {error}"));
        let quoted = Error::config(format!("{:?}", "\n\u{1b}\u{2028}"));
        assert_eq!(quoted.to_string(), r#""\n\u{1b}\u{2028}""#);
    }
}
