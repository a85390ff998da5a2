//! The CPU time of streams that mostly wait: little more than that of the same queries by tokio-postgres.

use std::pin::pin;
use std::time::Duration;

use fraiseql_stream::{Connection, RawJson};
use futures_util::StreamExt;
use futures_util::future::join_all;

use crate::server::{Database, SOON, trickle, within};

const STREAMS: usize = 80;
const ROWS: usize = 15;

/// Returns the CPU time that the calling thread has used so far.
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

/// Returns the CPU time of `read` on all connections together.
async fn total_cost(connections: &mut [Connection], read: impl AsyncFn(&mut Connection)) -> Duration {
    let start = cpu_time();
    within(SOON, join_all(connections.iter_mut().map(|db| read(db)))).await;
    cpu_time().saturating_sub(start)
}

#[test]
fn eighty_waiting_streams_cost_at_most_half_again_as_much_as_by_tokio_postgres() {
    let database = Database::with(&trickle("slow", ROWS, 0.1));
    // Everything runs on this thread, so its CPU time is the total.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..STREAMS {
            connections.push(database.connect().await);
        }
        // A real difference shows in every attempt; one caused by a busy machine does not.
        let mut attempts = Vec::new();
        while attempts.last().is_none_or(|(plain, ours)| *ours * 2 > *plain * 3) {
            assert!(attempts.len() < 6, "by tokio-postgres and by this crate: {attempts:?}");
            let plain = total_cost(&mut connections, by_client).await;
            assert!(!plain.is_zero(), "this system does not measure the CPU time of a thread");
            attempts.push((plain, total_cost(&mut connections, by_stream).await));
        }
        eprintln!("80 streams with a row every 100 ms, by tokio-postgres and by this crate: {attempts:?}");
    });
}
