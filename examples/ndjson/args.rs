//! Command-line arguments and environment.

use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::BytesMut;
use clap::Parser;
use fraiseql_stream::tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};
use fraiseql_stream::{Connection, Query, RawJson};

const NOTES: &str = "\
Environment:
  DATABASE_URL  connection string: postgres://user:password@host/database, or host=... user=...
  OTEL_*        standard OpenTelemetry variables; if any is set, metrics, traces and logs are exported
                over OTLP; OTEL_*_EXPORTER=console writes them to standard output, among the rows

Exit status:
  0    all rows were written, or the reader closed standard output
  1    an error occurred
  2    the arguments are invalid, or DATABASE_URL is not set
  129  stopped by SIGHUP (the terminal was closed)
  130  stopped by SIGINT (Ctrl-C)
  143  stopped by SIGTERM

The query is cancelled on the server when a signal or a closed output ends the program.";

/// Stream JSON rows from Postgres to standard output, one document per line
#[derive(Debug, Parser)]
#[command(name = "ndjson", after_help = NOTES)]
pub(crate) struct Args {
    /// Table or view with a json or jsonb column named `data`: name or schema.name, case-sensitive
    pub(crate) entity: String,

    /// Stream only rows that satisfy this condition; $1, $2, ... are the values of --param
    #[arg(long = "where", value_name = "SQL", allow_hyphen_values = true)]
    condition: Option<String>,

    /// Value of $1 (repeat for $2, ...), in Postgres's text format for the parameter's type
    #[arg(long = "param", value_name = "VALUE", requires = "condition", allow_hyphen_values = true)]
    params: Vec<Text>,

    /// Sort the rows by this expression, as in SQL's ORDER BY
    #[arg(long, value_name = "SQL", allow_hyphen_values = true)]
    order_by: Option<String>,

    /// Stream at most N rows
    #[arg(long, value_name = "N")]
    limit: Option<u64>,

    /// Skip the first N rows
    #[arg(long, value_name = "N")]
    offset: Option<u64>,

    /// Maximum number of rows per chunk [default: 128]
    #[arg(long, value_name = "ROWS")]
    chunk_size: Option<NonZeroUsize>,

    /// Maximum number of bytes of rows that wait in memory [default: 16777216]
    #[arg(long, value_name = "BYTES")]
    max_memory: Option<NonZeroUsize>,

    /// Sleep after each row to simulate a slow consumer; fractions are allowed
    #[arg(long = "pause-ms", value_name = "MS", value_parser = milliseconds, allow_hyphen_values = true)]
    pub(crate) pause: Option<Duration>,

    /// Write statistics to standard error as a line of JSON, every second and at the end
    #[arg(long)]
    pub(crate) stats: bool,
}

impl Args {
    pub(crate) fn query<'p, 'c>(&'p self, db: &'c mut Connection) -> Query<'p, RawJson, &'c mut Connection> {
        let mut query = db.query(&self.entity);
        if let Some(condition) = &self.condition {
            let values: Vec<_> = self.params.iter().map(|value| value as &(dyn ToSql + Sync)).collect();
            query = query.where_sql(condition, &values);
        }
        if let Some(order) = &self.order_by {
            query = query.order_by(order);
        }
        if let Some(rows) = self.limit {
            query = query.limit(rows);
        }
        if let Some(rows) = self.offset {
            query = query.offset(rows);
        }
        if let Some(rows) = self.chunk_size {
            query = query.chunk_size(rows.get());
        }
        if let Some(bytes) = self.max_memory {
            query = query.max_memory(bytes.get());
        }
        query
    }
}

/// Returns `DATABASE_URL`. The error never contains its value, which may hold a password.
pub(crate) fn database_url() -> Result<String, &'static str> {
    match std::env::var_os("DATABASE_URL").map(std::ffi::OsString::into_string) {
        Some(Ok(url)) if !url.is_empty() => Ok(url),
        Some(Err(_)) => Err("DATABASE_URL is not valid UTF-8"),
        _ => Err("DATABASE_URL is not set; set it to postgres://user:password@host/database"),
    }
}

fn milliseconds(text: &str) -> Result<Duration, &'static str> {
    let duration = text.parse().ok().and_then(|number: f64| Duration::try_from_secs_f64(number / 1e3).ok());
    duration.ok_or("expected a non-negative number of milliseconds")
}

/// A parameter sent as text, so that Postgres parses it whatever its type is.
#[derive(Clone, Debug)]
struct Text(String);

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl ToSql for Text {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}
