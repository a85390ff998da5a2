//! The Postgres that all peers read from, and its tables.

use std::pin::pin;

use backends::Postgres;
use bytes::Bytes;
use futures_util::SinkExt as _;

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
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a number of rows"
        )]
        let rows = (self.rows as f64 * by).ceil().max(1.0) as u64;
        Self { rows, ..self }
    }

    /// Rows of a first query that is not counted.
    pub(crate) fn warm_up(self) -> u64 {
        (self.rows / 50).max(1)
    }

    pub(crate) fn table(self) -> String {
        format!("orders_{}b_{}", self.row_bytes, self.rows)
    }
}

/// A server that does nothing on its own while rows are counted.
pub(crate) fn start() -> Result<Postgres, Failure> {
    let quiet = Postgres::builder()
        .set("shared_buffers", "1GB")
        .set("autovacuum", "off")
        .set("max_wal_size", "8GB")
        .set("jit", "off");
    Ok(quiet.start()?)
}

/// Makes the table and fills it.
pub(crate) async fn load(url: &str, size: Size) -> Result<(), Failure> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    let connection = tokio::spawn(connection);
    let table = size.table();
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
    check(&client, size).await?;
    drop(client);
    connection.await??;
    Ok(())
}

/// The rows are as large as it is said of them.
async fn check(client: &tokio_postgres::Client, size: Size) -> Result<(), Failure> {
    let query =
        format!("SELECT min(octet_length(data::text)), max(octet_length(data::text)) FROM {}", size.table());
    let row = client.query_one(&query, &[]).await?;
    let (low, high): (i32, i32) = (row.get(0), row.get(1));
    let off = |bytes: i32| usize::try_from(bytes).unwrap_or_default().abs_diff(size.row_bytes);
    if off(low).max(off(high)) * 50 > size.row_bytes * 3 {
        return Err(format!("rows of {} have {low} to {high} bytes", size.table()).into());
    }
    Ok(())
}
