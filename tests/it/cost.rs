//! What streams cost that mostly wait: hardly more than the same queries by tokio-postgres.

use std::pin::pin;
use std::time::Duration;

use fraiseql_stream::{Connection, RawJson};
use futures_util::StreamExt;
use futures_util::future::join_all;

use crate::server::{Database, SOON, trickle, within};

const STREAMS: usize = 80;
const ROWS: usize = 15;

/// The CPU time that the calling thread has taken so far.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

async fn by_stream(db: &mut Connection) {
    let mut stream = db.query::<RawJson>("slow").stream().await.unwrap();
    let mut rows = 0;
    while let Some(row) = stream.next().await {
        row.unwrap();
        rows += 1;
    }
    assert_eq!(rows, ROWS);
}

async fn by_client(db: &mut Connection) {
    let client = db.client().await.unwrap();
    let rows = client.query_raw("SELECT data FROM slow", [0_i32; 0]).await.unwrap();
    let mut rows = pin!(rows);
    let mut count = 0;
    while let Some(row) = rows.next().await {
        row.unwrap();
        count += 1;
    }
    assert_eq!(count, ROWS);
}

/// What all take together, by the one way or the other.
async fn cost_of(connections: &mut [Connection], read: impl AsyncFn(&mut Connection)) -> Duration {
    let start = cpu_time();
    within(SOON, join_all(connections.iter_mut().map(|db| read(db)))).await;
    cpu_time().saturating_sub(start)
}

#[test]
fn eighty_streams_that_wait_cost_at_most_half_as_much_again_as_by_tokio_postgres() {
    let database = Database::with(&trickle("slow", ROWS, 0.1));
    // One thread does it all, and so its time is that of all.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..STREAMS {
            connections.push(database.connect().await);
        }
        // What is really dearer is dearer each time; what a busy machine makes dearer is not.
        let mut all = Vec::new();
        while all.last().is_none_or(|(plain, own)| *own * 2 > *plain * 3) {
            assert!(all.len() < 6, "by tokio-postgres and by this crate: {all:?}");
            let plain = cost_of(&mut connections, by_client).await;
            assert!(!plain.is_zero(), "this system does not measure the time of a thread");
            all.push((plain, cost_of(&mut connections, by_stream).await));
        }
        eprintln!("80 streams of a row each 100 ms, by tokio-postgres and by this crate: {all:?}");
    });
}
