//! Moves a stream into a task of its own, and takes the connection back from it.
//!
//! `DATABASE_URL=postgres://... cargo run --example spawned_task`

#![expect(clippy::print_stdout, reason = "an example shows what it finds")]

use fraiseql_stream::{Connection, JsonStream, RawJson};
use futures_util::TryStreamExt;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let mut db = Connection::connect(std::env::var("DATABASE_URL").expect("DATABASE_URL is set")).await?;
    // Stands for a table of yours; it disappears with the connection.
    let script = "CREATE TEMP TABLE orders AS SELECT jsonb_build_object('id', i) AS data
        FROM generate_series(1, 100000) i";
    db.client().await?.batch_execute(script).await?;

    // `query` borrows the connection; a stream of `into_query` owns it, so it can move into a task.
    let orders = db.into_query::<RawJson>("orders").stream().await?;
    let mut db = tokio::spawn(read_until(br#"{"id": 1000}"#, orders)).await??;

    let row = db.client().await?.query_one("SELECT count(*) FROM orders", &[]).await?;
    println!("the connection can be used again: {} orders", row.get::<_, i64>(0));
    Ok(())
}

async fn read_until(last: &[u8], mut orders: JsonStream<RawJson, Connection>) -> Result<Connection, Error> {
    while let Some(order) = orders.try_next().await? {
        if order.as_bytes() == last {
            break;
        }
    }
    println!("{}", orders.stats());
    // Cancels the rest of the query.
    Ok(orders.close().await?)
}
