//! Reads the errors of tokio-postgres: whether the connection is lost, and what to do about it.

use std::error::Error as _;
use std::io;

use tokio_postgres::error::{DbError, Severity, SqlState};

/// Returns whether the connection is lost. The SQLSTATE cannot decide that: any of them may come with severity FATAL,
/// and an ERROR of class 57P comes from a parallel worker, which its backend survives.
pub(super) fn is_disconnect(error: &tokio_postgres::Error) -> bool {
    match error.as_db_error() {
        Some(db) => is_fatal(db),
        None => error.is_closed() || is_io(error),
    }
}

fn is_fatal(error: &DbError) -> bool {
    match error.parsed_severity() {
        Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
        // A connection pooler may send only the localized form of the severity.
        None => matches!(error.severity(), "FATAL" | "PANIC"),
    }
}

/// Returns whether the network failed. tokio-postgres also uses `io::Error` for what cannot be encoded or parsed.
pub(super) fn is_io(error: &tokio_postgres::Error) -> bool {
    io_cause(error)
        .is_some_and(|io| !matches!(io.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData))
}

/// Returns the I/O error that caused an error of tokio-postgres, if there is one.
pub(crate) fn io_cause(error: &tokio_postgres::Error) -> Option<&io::Error> {
    error.source()?.downcast_ref()
}

/// Returns what to do about an error of the server, as a clause to append, if its message does not say so itself.
pub(super) fn advice(error: &tokio_postgres::Error) -> &'static str {
    let Some(db) = error.as_db_error() else { return "" };
    match *db.code() {
        SqlState::UNDEFINED_TABLE if db.message().starts_with("relation ") => {
            "; an entity is the name of a table or view: it is case-sensitive, and without a schema it is looked up in search_path"
        }
        SqlState::UNDEFINED_COLUMN if db.message().contains("\"data\"") => {
            "; rows are read from a column named data: stream a view that has one"
        }
        SqlState::UNDEFINED_COLUMN => {
            "; to refer to a key of the document, write data->>'key', and put single quotes around a string"
        }
        SqlState::UNDEFINED_TABLE => "; to refer to a key of the document, write data->>'key'",
        SqlState::UNDEFINED_FUNCTION => "; data->>'key' is text: cast it, as in (data->>'key')::int8",
        SqlState::SYNTAX_ERROR => {
            "; pass where_sql a condition without WHERE, order_by an expression without ORDER BY, and write parameters as $1, $2, ..."
        }
        SqlState::INDETERMINATE_DATATYPE => {
            "; number the parameters from $1 without gaps, across all calls of where_sql; if they are, add a cast such as $1::text"
        }
        SqlState::INVALID_PASSWORD => "; check user and password in the connection string",
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION if db.message().contains("pg_hba.conf") => {
            "; add a line for this user, database and address to pg_hba.conf (hostssl lines do not apply: this version has no TLS)"
        }
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "; check the user in the connection string, which defaults to that of the operating system"
        }
        SqlState::INVALID_CATALOG_NAME => "; check the database in the connection string",
        _ => "",
    }
}

/// Describes an error of tokio-postgres in one clause that begins with the server's message.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    what(error) + &details(error)
}

/// Returns what failed, and its SQLSTATE.
pub(super) fn what(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), error.source()) {
        (Some(db), _) => format!("{} ({})", db.message(), db.code().code()),
        (None, Some(cause)) => format!("{error}: {cause}"),
        (None, None) => error.to_string(),
    }
}

/// Returns the server's detail and hint, as clauses to append.
pub(super) fn details(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else { return String::new() };
    let more = |name, text: Option<&str>| text.map_or_else(String::new, |text| format!("; {name}: {text}"));
    more("detail", db.detail()) + &more("hint", db.hint())
}
