//! The orders: their Rust type, and the SQL that creates them.

use std::error::Error;

use fraiseql_stream::Connection;
use fraiseql_stream::tokio_postgres::Client;
use serde::Deserialize;

use crate::figures::{bar, grouped};
use crate::screen::Screen;

/// The number of orders inserted by one statement.
const BATCH: u32 = 20_000;

/// The table and its views are temporary: they disappear with the session, however it ends, and conflict with nothing.
const SCHEMA: &str = "
    SET timezone = 'UTC'; -- for placed_at
    CREATE TEMP TABLE orders (id bigint, data jsonb NOT NULL);
    CREATE TEMP VIEW orders_slow_sink AS
        SELECT data FROM orders;
    CREATE TEMP VIEW orders_slow_view AS
        SELECT data FROM orders
        WHERE CASE WHEN id % 20 = 0 THEN pg_sleep(0.01) IS NOT NULL ELSE true END;
";

/// Inserts the same orders in every run: values come from hash functions instead of `random()`.
const INSERT: &str = "
    INSERT INTO orders (id, data)
    SELECT n, jsonb_build_object(
        'id', n,
        'status', (ARRAY['open', 'paid', 'shipped', 'returned'])[1 + h % 4],
        'placed_at', timestamptz '2026-01-01 00:00:00+00' + n * interval '2 minutes',
        'customer', jsonb_build_object(
            'id', h % 20000,
            'name', 'Customer ' || h % 20000,
            'country', (ARRAY['CA', 'DE', 'FR', 'JP', 'US'])[1 + h % 5]
        ),
        'lines', (
            SELECT jsonb_agg(jsonb_build_object(
                'product', 'P-' || lpad((h * line % 5000)::text, 5, '0'),
                'quantity', 1 + h * line % 4,
                'unit_price', ((99 + h * line % 20000) / 100.0)::numeric(8, 2)
            ))
            FROM generate_series(1, 1 + h % 5) AS line
        )
    )
    FROM generate_series($1::int8, $2::int8) AS n,
        LATERAL (SELECT abs(hashint8(n)::bigint) AS h) AS hash
";

#[derive(Debug, Deserialize)]
pub(crate) struct Order {
    status: Status,
    customer: Customer,
    lines: Vec<Line>,
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Status {
    Open,
    Paid,
    Shipped,
    Returned,
}

#[derive(Debug, Deserialize)]
struct Customer {
    country: String,
}

#[derive(Debug, Deserialize)]
struct Line {
    quantity: u32,
    unit_price: f64,
}

impl Order {
    /// Returns the country and the total of an open order; `None` for any other.
    pub(crate) fn amount_due(self) -> Option<(String, f64)> {
        let line = |line: &Line| f64::from(line.quantity) * line.unit_price;
        let total = self.lines.iter().map(line).sum();
        (self.status == Status::Open).then_some((self.customer.country, total))
    }
}

/// Creates the table and its views in the session of `db`, showing the progress. Returns the table's size in bytes.
pub(crate) async fn create(
    db: &mut Connection,
    rows: u32,
    screen: &Screen,
) -> Result<u64, Box<dyn Error + Send + Sync>> {
    let client: &Client = db.client().await?;
    client.batch_execute(SCHEMA).await?;
    let insert = client.prepare(INSERT).await?;
    for done in (0..rows).step_by(BATCH as usize) {
        let share = f64::from(done) / f64::from(rows);
        let created = grouped(done.into());
        screen.live(move |_| format!("   creating the orders  {}  {created}", bar(share)));
        let (first, last) = (i64::from(done) + 1, i64::from(rows.min(done + BATCH)));
        client.execute(&insert, &[&first, &last]).await?;
    }
    let size = "SELECT pg_relation_size('orders')";
    let bytes: i64 = client.query_one(size, &[]).await?.get(0);
    Ok(bytes.unsigned_abs())
}
