//! Streams a table of the Postgres at `DATABASE_URL`, typed, and prints where the time went.
//!
//! `DATABASE_URL=postgres://... cargo run --example basic`

#![expect(clippy::print_stdout, reason = "an example shows what it finds")]

use std::error::Error;

use fraiseql_stream::Connection;
use futures_util::TryStreamExt;
use serde::Deserialize;

/// What each document is decoded into; other keys are ignored.
#[derive(Debug, Deserialize)]
struct Order {
    id: u64,
    total: f64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut db = Connection::connect(std::env::var("DATABASE_URL").expect("DATABASE_URL is set")).await?;
    // Stands for a table of yours; it disappears with the connection.
    let script = "CREATE TEMP TABLE orders AS SELECT jsonb_build_object(
        'id', i, 'status', CASE WHEN i % 2 = 0 THEN 'open' ELSE 'paid' END, 'total', i * 0.5
    ) AS data FROM generate_series(1, 100000) i";
    db.client().await?.batch_execute(script).await?;

    let open = db.query::<Order>("orders").where_sql("data->>'status' = $1", &[&"open"]);
    let mut orders = open.order_by("(data->>'id')::bigint").stream().await?;
    let (mut last, mut sum) = (0, 0.0);
    while let Some(order) = orders.try_next().await? {
        (last, sum) = (order.id, sum + order.total);
    }
    println!("last open order: {last}; total of all open orders: {sum}");
    println!("{}", orders.stats());
    Ok(())
}
