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

/// So long the slow consumer is watched.
const PATIENCE: Duration = Duration::from_secs(8);
/// The slow consumer ships so many orders at once, and waits so long for that.
const BATCH: usize = 50;
const SHIPPING: Duration = Duration::from_millis(10);
/// As many as the slow view yields in some 8 s.
const SLOW_ROWS: u64 = 15_000;

/// The cast: what streams, and what the demo sees of it from outside.
pub(crate) struct Stage<'a> {
    pub(crate) db: &'a mut Connection,
    /// Another session, which looks at what the first one does on the server.
    pub(crate) watcher: &'a mut Connection,
    pub(crate) screen: &'a Screen,
}

/// Runs them one after the other, so that each has the machine for itself and its verdict is its own.
pub(crate) async fn run(stage: &mut Stage<'_>) -> Result<Vec<Stats>> {
    Ok(vec![fast(stage).await?, slow_sink(stage).await?, slow_source(stage).await?])
}

/// Takes all rows as fast as they come.
async fn fast(stage: &mut Stage<'_>) -> Result<Stats> {
    title(stage.screen, "1. A fast consumer", "adds up what is open, by country");
    let mut orders = stage.db.query::<Order>("orders").stream().await?;
    show(stage.screen, orders.observer());
    let mut open = BTreeMap::new();
    while let Some(order) = orders.try_next().await? {
        if let Some((country, total)) = order.open() {
            *open.entry(country).or_insert(0.0) += total;
        }
    }
    stage.screen.settle();
    Ok(orders.stats())
}

/// Takes rows as fast as a slow service takes them on, and leaves in the middle.
async fn slow_sink(stage: &mut Stage<'_>) -> Result<Stats> {
    let about = format!("waits 10 ms for each {BATCH} orders to be shipped");
    title(stage.screen, "2. A slow consumer", &about);
    let process = process(stage.db).await?;
    let query = stage.db.query::<Order>("orders_slow_sink");
    let mut orders = query.stream().await?;
    let observer = orders.observer();
    show(stage.screen, observer.clone());
    let deadline = Instant::now() + PATIENCE;
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(order) = orders.try_next().await? {
        batch.push(order);
        if batch.len() == BATCH {
            sleep(SHIPPING).await;
            batch.clear();
            if Instant::now() > deadline {
                break;
            }
        }
    }
    stage.screen.settle();
    if observer.is_ended() {
        return Ok(observer.stats());
    }
    let busy = is_busy(stage.watcher, process).await?;
    let dropped = Instant::now();
    drop(orders);
    let outcome = if busy {
        while is_busy(stage.watcher, process).await? {
            sleep(Duration::from_millis(1)).await;
        }
        format!("Postgres had ended the query {} later", seconds(dropped.elapsed()))
    } else {
        "Postgres had sent all already".to_owned()
    };
    stage.screen.say(format!("   dropped in the middle: {outcome}"));
    Ok(observer.stats())
}

/// Reads a view that keeps its reader waiting.
async fn slow_source(stage: &mut Stage<'_>) -> Result<Stats> {
    title(stage.screen, "3. A slow source", "a view that makes Postgres sleep 10 ms every 20 rows");
    let query = stage.db.query::<Order>("orders_slow_view");
    let mut orders = query.limit(SLOW_ROWS).stream().await?;
    show(stage.screen, orders.observer());
    while let Some(order) = orders.try_next().await? {
        drop(order);
    }
    stage.screen.settle();
    Ok(orders.stats())
}

fn title(screen: &Screen, title: &'static str, about: &str) {
    let about = about.to_owned();
    screen.paint(move |paint| format!("\n{}: {about}", paint.bold(title)));
}

/// Shows, as long as it lasts, how a stream is getting on.
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

/// The server's process behind a connection.
async fn process(db: &mut Connection) -> Result<i32> {
    let client = db.client().await?;
    let row = client.query_one("SELECT pg_backend_pid()", &[]).await?;
    Ok(row.get(0))
}

async fn is_busy(watcher: &mut Connection, process: i32) -> Result<bool> {
    let sql = "SELECT count(*) > 0 FROM pg_stat_activity WHERE pid = $1 AND state = 'active'";
    let client = watcher.client().await?;
    Ok(client.query_one(sql, &[&process]).await?.get(0))
}
