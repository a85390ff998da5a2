//! The Postgres server that all peers read from, and its tables.

use std::pin::pin;

use backends::Postgres;
use bytes::Bytes;
use futures_util::SinkExt as _;

use crate::plan::{Case, Kind, Size};
use crate::{Failure, document};

/// Starts a server that does no background work during the measurements.
pub(crate) fn start() -> Result<Postgres, Failure> {
    let quiet = Postgres::builder()
        // Enough for the case with the most streams, and for connections of the previous run that are still closing.
        .set("max_connections", "200")
        .set("shared_buffers", "1GB")
        .set("autovacuum", "off")
        .set("max_wal_size", "8GB")
        .set("jit", "off");
    Ok(quiet.start()?)
}

/// Creates and fills the table or view that a case reads.
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

/// Returns the SQL of a view that takes 100 ms per row.
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
        // COPY has its own escapes, on top of those of JSON.
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

/// Checks that the rows have the stated size, within 6 %.
async fn check(client: &tokio_postgres::Client, table: &str, size: Size) -> Result<(), Failure> {
    let query = format!("SELECT min(octet_length(data::text)), max(octet_length(data::text)) FROM {table}");
    let row = client.query_one(&query, &[]).await?;
    let (low, high): (i32, i32) = (row.get(0), row.get(1));
    let deviation = |bytes: i32| usize::try_from(bytes).unwrap_or_default().abs_diff(size.row_bytes);
    if deviation(low).max(deviation(high)) * 50 > size.row_bytes * 3 {
        return Err(
            format!("rows of {table} have {low} to {high} bytes (expected {})", size.row_bytes).into()
        );
    }
    Ok(())
}
