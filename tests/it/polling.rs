//! At first the consumer's polls produce the rows, later a task does. The rows do not depend on how or where the
//! stream is polled.

use std::task::Poll;
use std::time::{Duration, Instant};

use fraiseql_stream::{Connection, JsonStream, Result};
use futures::executor;
use futures_util::{FutureExt, StreamExt};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::server::{
    Admin, Database, Doc, ENDLESS, SILENT, SOON, assert_consecutive, backend_pid, connect, eventually, ids,
    rows_of, table_script, trickle, within,
};

/// A short result, a long one, and a slow one.
const ENTITIES: [(&str, usize); 3] = [("t", 10), ("endless", 20_000), ("slow", 20)];

fn database() -> Database {
    Database::with(&format!("{ENDLESS} {SILENT} {} {}", table_script("t", 10, 0), trickle("slow", 20, 0.005)))
}

fn runtimes() -> [Runtime; 2] {
    [Builder::new_multi_thread().worker_threads(2), &mut Builder::new_current_thread()]
        .map(|builder| builder.enable_all().build().unwrap())
}

async fn start(db: Connection, (entity, rows): (&str, usize)) -> JsonStream<Doc> {
    within(SOON, db.into_query(entity).limit(rows as u64).stream()).await.unwrap()
}

/// Fails unless these are all rows, in order.
fn assert_all(rows: &[Doc], (entity, expected): (&str, usize)) {
    assert_consecutive(rows);
    assert_eq!(rows.len(), expected, "{entity}");
}

#[test]
fn stream_that_is_never_polled_fills_its_channel() {
    let database = database();
    for runtime in runtimes() {
        runtime.block_on(async {
            let stream = start(database.connect().await, ("endless", 20_000)).await;
            let is_full = |stats: fraiseql_stream::Stats| stats.buffered_rows == stats.row_limit;
            eventually("the channel is full", || is_full(stream.stats())).await;
            assert_all(&rows_of(stream).await, ("endless", 20_000));
        });
    }
}

#[test]
fn stream_that_is_polled_only_once_fills_its_channel() {
    let database = database();
    for runtime in runtimes() {
        runtime.block_on(async {
            let mut stream = start(database.connect().await, ("slow", 20)).await;
            assert!(stream.next().now_or_never().is_none());
            eventually("all rows wait in the channel", || stream.stats().buffered_rows == 20).await;
            assert_all(&rows_of(stream).await, ("slow", 20));
        });
    }
}

/// Takes rows until the stream ends, without ever waiting for one.
async fn take_without_waiting(
    mut stream: JsonStream<Doc>,
    mut take: impl FnMut(&mut JsonStream<Doc>) -> Poll<Option<Result<Doc>>>,
) -> Vec<Doc> {
    let start = Instant::now();
    let mut rows = Vec::new();
    loop {
        match take(&mut stream) {
            Poll::Ready(Some(row)) => rows.push(row.unwrap()),
            Poll::Ready(None) => return rows,
            Poll::Pending => tokio::task::yield_now().await,
        }
        assert!(start.elapsed() < SOON, "{} rows, and the stream does not end", rows.len());
    }
}

fn poll_once(stream: &mut JsonStream<Doc>) -> Poll<Option<Result<Doc>>> {
    stream.next().now_or_never().map_or(Poll::Pending, Poll::Ready)
}

#[test]
fn stream_polled_without_waiting_returns_all_rows() {
    let database = database();
    for runtime in runtimes() {
        for entity in ENTITIES {
            runtime.block_on(async {
                let stream = start(database.connect().await, entity).await;
                let rows = take_without_waiting(stream, JsonStream::next_ready).await;
                assert_all(&rows, entity);
                let stream = start(database.connect().await, entity).await;
                assert_all(&take_without_waiting(stream, poll_once).await, entity);
            });
        }
    }
}

#[test]
fn stream_can_be_polled_on_another_runtime_or_none_from_the_first_poll_on() {
    let database = database();
    let [home, single_threaded] = runtimes();
    let [elsewhere, _] = runtimes();
    for _ in 0..5 {
        for entity in ENTITIES {
            let started = || home.block_on(async { start(database.connect().await, entity).await });
            let stream = started();
            assert_all(&single_threaded.block_on(collect(stream)), entity);
            let stream = started();
            assert_all(&elsewhere.block_on(collect(stream)), entity);
            assert_all(&executor::block_on(collect(started())), entity);
        }
    }
}

/// Collects all rows without the timers of tokio, so that it works outside a runtime.
async fn collect(stream: JsonStream<Doc>) -> Vec<Doc> {
    stream.map(Result::unwrap).collect().await
}

#[test]
fn stream_can_move_between_runtimes_after_each_row() {
    let database = database();
    let [home, single_threaded] = runtimes();
    for entity in ENTITIES {
        let mut stream = home.block_on(async { start(database.connect().await, entity).await });
        let mut rows = Vec::new();
        for at in 0.. {
            let row = match at % 3 {
                0 => home.block_on(stream.next()),
                1 => single_threaded.block_on(stream.next()),
                _ => executor::block_on(stream.next()),
            };
            let Some(row) = row else { break };
            rows.push(row.unwrap());
        }
        assert_all(&rows, entity);
    }
}

/// Drops streams right after `stream()`. Each query is cancelled, and the connection runs the next one.
async fn drop_unpolled(connection: &str, admin: &Admin) {
    let mut db = connect(connection).await;
    let pid = backend_pid(&mut db).await;
    for entity in ["silent", "endless", "t"].into_iter().cycle().take(60) {
        drop(within(SOON, db.query::<Value>(entity).stream()).await.unwrap());
        let dropped = Instant::now();
        admin.until_idle(pid).await;
        assert!(dropped.elapsed() < Duration::from_secs(1), "{entity}: {:?}", dropped.elapsed());
        let stream = within(SOON, db.query::<Doc>("t").order_by("id").stream()).await.unwrap();
        assert_eq!(ids(&rows_of(stream).await), (0..10).collect::<Vec<_>>());
    }
    assert_eq!(backend_pid(&mut db).await, pid);
}

#[test]
fn stream_dropped_before_its_first_poll_is_cancelled_and_its_connection_works() {
    let database = database();
    for runtime in runtimes() {
        for connection in [&database.url, &database.socket()] {
            runtime.block_on(async { drop_unpolled(connection, &database.admin().await).await });
        }
    }
}

#[test]
fn stream_dropped_outside_its_runtime_before_its_first_poll_is_cancelled() {
    let database = database();
    let [home, _] = runtimes();
    let (admin, mut db) = home.block_on(async { (database.admin().await, database.connect().await) });
    let pid = home.block_on(backend_pid(&mut db));
    for entity in ["silent", "endless"] {
        let stream = home.block_on(db.query::<Value>(entity).stream()).unwrap();
        let dropped = Instant::now();
        drop(stream);
        home.block_on(admin.until_idle(pid));
        assert!(dropped.elapsed() < Duration::from_secs(1), "{entity}: {:?}", dropped.elapsed());
        assert_eq!(home.block_on(backend_pid(&mut db)), pid);
    }
}
