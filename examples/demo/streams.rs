//! The three streams.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use fraiseql_stream::{Connection, Observer, Stats};
use futures_util::TryStreamExt as _;
use tokio::time::{Instant, sleep};

use crate::figures::{Paint, bar, grouped, rate, seconds};
use crate::orders::Order;
use crate::screen::Screen;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The time after which the slow consumer drops its stream.
const SLOW_CONSUMER_TIME: Duration = Duration::from_secs(8);
/// The number of orders that the slow consumer ships at once, and the time that takes.
const BATCH: usize = 50;
const SHIPPING_TIME: Duration = Duration::from_millis(10);
/// The number of rows that the slow view yields in about 8 s.
const SLOW_ROWS: u64 = 15_000;

/// The connection that streams, and what observes it.
pub(crate) struct Context<'a> {
    pub(crate) db: &'a mut Connection,
    /// Another session, which observes the first one on the server.
    pub(crate) monitor: &'a mut Connection,
    pub(crate) screen: &'a Screen,
}

/// Runs the streams one after another, so that none affects another's verdict.
pub(crate) async fn run(context: &mut Context<'_>) -> Result<Vec<Stats>> {
    Ok(vec![fast_consumer(context).await?, slow_consumer(context).await?, slow_source(context).await?])
}

/// Takes rows as fast as they arrive.
async fn fast_consumer(context: &mut Context<'_>) -> Result<Stats> {
    title(context.screen, "1. A fast consumer", "sums up the open orders by country");
    let mut orders = context.db.query::<Order>("orders").stream().await?;
    show(context.screen, orders.observer());
    let mut open = BTreeMap::new();
    while let Some(order) = orders.try_next().await? {
        if let Some((country, total)) = order.amount_due() {
            *open.entry(country).or_insert(0.0) += total;
        }
    }
    context.screen.freeze();
    Ok(orders.stats())
}

/// Takes rows as slowly as the service it passes them to, and drops the stream midway.
async fn slow_consumer(context: &mut Context<'_>) -> Result<Stats> {
    let description = format!("takes 10 ms to ship every {BATCH} orders");
    title(context.screen, "2. A slow consumer", &description);
    let pid = backend_pid(context.db).await?;
    let query = context.db.query::<Order>("orders_slow_sink");
    let mut orders = query.stream().await?;
    let observer = orders.observer();
    show(context.screen, observer.clone());
    let deadline = Instant::now() + SLOW_CONSUMER_TIME;
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(order) = orders.try_next().await? {
        batch.push(order);
        if batch.len() == BATCH {
            sleep(SHIPPING_TIME).await;
            batch.clear();
            if Instant::now() > deadline {
                break;
            }
        }
    }
    context.screen.freeze();
    if observer.is_ended() {
        return Ok(observer.stats());
    }
    let busy = is_busy(context.monitor, pid).await?;
    let dropped = Instant::now();
    drop(orders);
    let outcome = if busy {
        while is_busy(context.monitor, pid).await? {
            sleep(Duration::from_millis(1)).await;
        }
        format!("the query was cancelled on the server within {}", seconds(dropped.elapsed()))
    } else {
        "Postgres had already sent all rows".to_owned()
    };
    context.screen.print(format!("   dropped midway: {outcome}"));
    Ok(observer.stats())
}

/// Reads a slow view as fast as it yields rows.
async fn slow_source(context: &mut Context<'_>) -> Result<Stats> {
    title(context.screen, "3. A slow source", "reads a view that sleeps 10 ms every 20 rows");
    let query = context.db.query::<Order>("orders_slow_view");
    let mut orders = query.limit(SLOW_ROWS).stream().await?;
    show(context.screen, orders.observer());
    while let Some(order) = orders.try_next().await? {
        drop(order);
    }
    context.screen.freeze();
    Ok(orders.stats())
}

fn title(screen: &Screen, title: &'static str, description: &str) {
    let description = description.to_owned();
    screen.print_with(move |paint| format!("\n{}: {description}", paint.bold(title)));
}

/// Shows the progress of a stream in the live line.
fn show(screen: &Screen, stream: Observer) {
    let mut fill = 0.0;
    screen.live(move |paint| {
        let stats = stream.stats();
        if !stream.is_ended() {
            fill = stats.buffered_rows as f64 / stats.row_limit as f64;
        }
        line(paint, &stats, fill)
    });
}

fn line(paint: Paint, stats: &Stats, fill: f64) -> String {
    format!(
        "   {:<17}{:>9} rows {:>9}  {}  {}",
        stats.entity,
        grouped(stats.rows),
        rate(stats.rows, stats.elapsed),
        bar(fill),
        paint.verdict(stats),
    )
}

/// Returns the pid of the connection's backend.
async fn backend_pid(db: &mut Connection) -> Result<i32> {
    let client = db.client().await?;
    let row = client.query_one("SELECT pg_backend_pid()", &[]).await?;
    Ok(row.get(0))
}

async fn is_busy(monitor: &mut Connection, pid: i32) -> Result<bool> {
    let sql = "SELECT count(*) > 0 FROM pg_stat_activity WHERE pid = $1 AND state = 'active'";
    let client = monitor.client().await?;
    Ok(client.query_one(sql, &[&pid]).await?.get(0))
}
