//! What the command line and the environment ask for.

use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::BytesMut;
use clap::Parser;
use fraiseql_stream::tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};
use fraiseql_stream::{Connection, Query, RawJson};

const NOTES: &str = "\
Environment:
  DATABASE_URL  where Postgres is: postgres://user:password@host/database, or host=... user=...
  OTEL_*        the standard variables of OpenTelemetry; with any of them set, metrics, traces and logs are
                sent by OTLP, without one nothing is; OTEL_*_EXPORTER=console writes among the rows

Exit status: 0 when all rows are written, or the reader of the output has gone; 1 after an error;
2 for wrong arguments; 130 after Ctrl-C, 143 after SIGTERM and 129 after the terminal has been closed, all of
which cancel the query on the server.";

/// Streams JSON rows out of Postgres to standard output, one document a line
#[derive(Debug, Parser)]
#[command(name = "ndjson", after_help = NOTES)]
pub(crate) struct Args {
    /// Table or view with a column `data` of type json or jsonb: name or schema.name, case counts
    pub(crate) entity: String,

    /// Only rows for which this condition holds; $1, $2 ... stand for the values of --param
    #[arg(long = "where", value_name = "SQL", allow_hyphen_values = true)]
    condition: Option<String>,

    /// The value of $1, and again for $2 ..., in the form that Postgres reads for the parameter's type
    #[arg(long = "param", value_name = "VALUE", requires = "condition", allow_hyphen_values = true)]
    params: Vec<Text>,

    /// The order of rows
    #[arg(long, value_name = "SQL", allow_hyphen_values = true)]
    order_by: Option<String>,

    /// At most so many rows
    #[arg(long, value_name = "N")]
    limit: Option<u64>,

    /// So many rows are left out first
    #[arg(long, value_name = "N")]
    offset: Option<u64>,

    /// At most so many rows travel together [default: 128]
    #[arg(long, value_name = "ROWS")]
    chunk_size: Option<NonZeroUsize>,

    /// At most so many bytes of rows wait in memory [default: 16777216]
    #[arg(long, value_name = "BYTES")]
    max_memory: Option<NonZeroUsize>,

    /// Sleep after each row, to play a slow consumer; fractions are fine
    #[arg(long = "pause-ms", value_name = "MS", value_parser = milliseconds, allow_hyphen_values = true)]
    pub(crate) pause: Option<Duration>,

    /// Tell on standard error every second, and at the end, how the stream does: a line of JSON
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

/// `DATABASE_URL`, or what is wrong with it; never its contents, which may hold a password.
pub(crate) fn database_url() -> Result<String, &'static str> {
    match std::env::var_os("DATABASE_URL").map(std::ffi::OsString::into_string) {
        Some(Ok(url)) if !url.is_empty() => Ok(url),
        Some(Err(_)) => Err("DATABASE_URL is not valid UTF-8"),
        _ => Err("DATABASE_URL is not set: postgres://user:password@host/database"),
    }
}

fn milliseconds(text: &str) -> Result<Duration, &'static str> {
    let duration = text.parse().ok().and_then(|number: f64| Duration::try_from_secs_f64(number / 1e3).ok());
    duration.ok_or("not a number of milliseconds")
}

/// A parameter that Postgres itself reads, whatever its type.
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
