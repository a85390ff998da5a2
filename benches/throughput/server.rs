//! The Postgres that all peers read from, and its tables.

use std::pin::pin;

use backends::Postgres;
use bytes::Bytes;
use futures_util::SinkExt as _;

use crate::plan::{Case, Kind};
use crate::{Failure, document};

/// A size of rows, and how many make a run of a third of a second or more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) row_bytes: usize,
    pub(crate) rows: u64,
}

pub(crate) const SIZES: [Size; 3] = [
    Size { row_bytes: 134, rows: 500_000 },
    Size { row_bytes: 1024, rows: 100_000 },
    Size { row_bytes: 20 * 1024, rows: 10_000 },
];

/// The table for the time to the first row: of the largest rows, more than kernel buffers hold, short enough to be read to its end.
pub(crate) const FIRST_ROW: Size = Size { row_bytes: 20 * 1024, rows: 600 };

impl Size {
    pub(crate) fn scaled(self, by: f64) -> Self {
        Self { rows: scaled(self.rows, by), ..self }
    }

    pub(crate) fn table(self) -> String {
        format!("orders_{}b_{}", self.row_bytes, self.rows)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "numbers of rows and queries are small"
)]
pub(crate) fn scaled(number: u64, by: f64) -> u64 {
    (number as f64 * by).ceil().max(1.0) as u64
}

/// A server that does nothing on its own while rows are counted.
pub(crate) fn start() -> Result<Postgres, Failure> {
    let quiet = Postgres::builder()
        // For the most streams at once, and for those of the run before that are just being closed.
        .set("max_connections", "200")
        .set("shared_buffers", "1GB")
        .set("autovacuum", "off")
        .set("max_wal_size", "8GB")
        .set("jit", "off");
    Ok(quiet.start()?)
}

/// Makes what a case reads, and fills it.
pub(crate) async fn load(url: &str, case: &Case) -> Result<(), Failure> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    let connection = tokio::spawn(connection);
    let entity = case.entity();
    if case.kind == Kind::Slow {
        let table = case.size.table();
        fill(&client, &table, case.size).await?;
        client.batch_execute(&slow_view(&entity, &table)).await?;
    } else {
        fill(&client, &entity, case.size).await?;
    }
    drop(client);
    connection.await??;
    Ok(())
}

/// Postgres takes 100 ms for each of its rows.
fn slow_view(view: &str, table: &str) -> String {
    format!(
        "CREATE VIEW {view} AS SELECT data || jsonb_build_object('slept', pg_sleep(0.1)::text) AS data FROM {table}"
    )
}

async fn fill(client: &tokio_postgres::Client, table: &str, size: Size) -> Result<(), Failure> {
    client.batch_execute(&format!("CREATE TABLE {table} (data jsonb NOT NULL)")).await?;
    let mut copy = pin!(client.copy_in(&format!("COPY {table} FROM STDIN")).await?);
    let mut lines = String::new();
    for id in 0..size.rows {
        // COPY's own escapes stand above those of JSON.
        lines.push_str(&document::text(100_000 + id, size.row_bytes).replace('\\', "\\\\"));
        lines.push('\n');
        if lines.len() > 64 * 1024 {
            copy.feed(Bytes::from(std::mem::take(&mut lines))).await?;
        }
    }
    copy.feed(Bytes::from(lines)).await?;
    copy.as_mut().finish().await?;
    client.batch_execute(&format!("VACUUM (ANALYZE, FREEZE) {table}")).await?;
    check(client, table, size).await
}

/// The rows are as large as it is said of them.
async fn check(client: &tokio_postgres::Client, table: &str, size: Size) -> Result<(), Failure> {
    let query = format!("SELECT min(octet_length(data::text)), max(octet_length(data::text)) FROM {table}");
    let row = client.query_one(&query, &[]).await?;
    let (low, high): (i32, i32) = (row.get(0), row.get(1));
    let off = |bytes: i32| usize::try_from(bytes).unwrap_or_default().abs_diff(size.row_bytes);
    if off(low).max(off(high)) * 50 > size.row_bytes * 3 {
        return Err(format!("rows of {table} have {low} to {high} bytes").into());
    }
    Ok(())
}
