//! Bounded memory: a full channel makes Postgres wait and loses no row.

use std::thread;
use std::time::Duration;

use fraiseql_stream::{Observer, RawJson};
use futures_util::StreamExt;

use crate::server::{Database, Doc, ENDLESS, SOON, assert_consecutive, eventually, rows_of, table, within};

/// The largest values seen in the channel.
#[derive(Debug, Default)]
struct Peaks {
    samples: u32,
    rows: usize,
    bytes: usize,
}

/// Samples the channel from a separate thread until the stream ends.
fn watch(observer: Observer) -> thread::JoinHandle<Peaks> {
    thread::spawn(move || {
        let mut peaks = Peaks::default();
        while !observer.is_ended() {
            let stats = observer.stats();
            peaks.samples += 1;
            peaks.rows = peaks.rows.max(stats.buffered_rows);
            peaks.bytes = peaks.bytes.max(stats.buffered_bytes);
            thread::sleep(Duration::from_micros(200));
        }
        peaks
    })
}

#[tokio::test]
async fn buffered_bytes_never_exceed_max_memory() {
    const LIMIT: usize = 100_000;
    let database = table(600, 9_000);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("t").order_by("id").max_memory(LIMIT);
    let mut stream = query.stream().await.unwrap();
    let watcher = watch(stream.observer());
    let mut rows = Vec::new();
    while let Some(row) = within(SOON, stream.next()).await {
        rows.push(row.unwrap());
        // A slow consumer.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let peaks = watcher.join().unwrap();
    let stats = stream.stats();
    assert_eq!(rows.len(), 600);
    assert_consecutive(&rows);
    assert!(peaks.samples > 100, "{peaks:?}");
    assert!(peaks.bytes <= LIMIT && stats.peak_bytes <= LIMIT, "{peaks:?} {stats:?}");
    assert!(peaks.bytes <= stats.peak_bytes, "{peaks:?} {stats:?}");
    // The limit is also used: ten rows of 9 kB fit.
    assert!(stats.peak_bytes >= 10 * 9_000, "{stats:?}");
    assert_eq!(stats.byte_limit, LIMIT);
}

#[tokio::test]
async fn buffered_rows_never_exceed_256() {
    let database = Database::with(ENDLESS);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("endless").limit(3_000);
    let mut stream = query.stream().await.unwrap();
    let watcher = watch(stream.observer());
    let mut rows = Vec::new();
    while let Some(row) = within(SOON, stream.next()).await {
        rows.push(row.unwrap());
        if rows.len() % 50 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let peaks = watcher.join().unwrap();
    assert_eq!(rows.len(), 3_000);
    assert_consecutive(&rows);
    assert_eq!(stream.stats().row_limit, 256);
    // Full, and never beyond the limit.
    assert_eq!(peaks.rows, 256, "{peaks:?}");
}

#[tokio::test]
async fn full_channel_makes_the_producer_wait_for_room() {
    let database = Database::with(ENDLESS);
    let mut db = database.connect().await;
    let stream = db.query::<Doc>("endless").stream().await.unwrap();
    let observer = stream.observer();
    eventually("the producer waits for room", || {
        observer.stats().producer_time.room > Duration::from_millis(50)
    })
    .await;
    let (before, after) = (observer.stats(), observer.stats());
    assert_eq!(before.buffered_rows, 256);
    assert_eq!(before.bytes, after.bytes, "nothing more is read");
    assert!(after.producer_time.room > before.producer_time.room, "a wait counts while it lasts");
    assert_eq!(after.producer_time.source, before.producer_time.source);
}

#[tokio::test]
async fn row_larger_than_max_memory_passes_alone() {
    const LIMIT: usize = 100_000;
    let database = Database::with(
        "CREATE TABLE t AS SELECT i AS id, jsonb_build_object('id', i, 'pad',
             repeat('x', CASE WHEN i % 5 = 0 THEN 300000 ELSE 20000 END)) AS data FROM generate_series(0, 49) i",
    );
    let mut db = database.connect().await;
    let query = db.query::<Doc>("t").order_by("id").max_memory(LIMIT);
    let mut stream = query.stream().await.unwrap();
    let observer = stream.observer();
    let mut rows = Vec::new();
    for _ in 0..10 {
        // The next row is oversized, so it is alone in the channel.
        eventually("the producer has filled the channel", || observer.stats().buffered_bytes > LIMIT).await;
        let stats = observer.stats();
        assert_eq!(stats.buffered_rows, 1, "{stats:?}");
        for _ in 0..5 {
            rows.push(within(SOON, stream.next()).await.unwrap().unwrap());
        }
    }
    assert!(within(SOON, stream.next()).await.is_none());
    assert_eq!(rows.len(), 50);
    assert_consecutive(&rows);
    let peak = stream.stats().peak_bytes;
    assert!((300_000..301_000).contains(&peak), "{peak}");
}

#[tokio::test]
async fn max_memory_of_one_byte_lets_rows_pass_one_by_one() {
    let database = table(300, 100);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("t").order_by("id").max_memory(1);
    let mut stream = query.stream().await.unwrap();
    let watcher = watch(stream.observer());
    let mut rows = Vec::new();
    while let Some(row) = within(SOON, stream.next()).await {
        rows.push(row.unwrap());
    }
    assert_eq!(rows.len(), 300);
    assert_consecutive(&rows);
    assert!(watcher.join().unwrap().rows <= 1);
}

#[tokio::test]
async fn chunk_size_above_256_raises_the_limit_of_buffered_rows() {
    let database = Database::with(ENDLESS);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("endless").chunk_size(1_000);
    let stream = query.stream().await.unwrap();
    let observer = stream.observer();
    eventually("the channel is full", || observer.stats().buffered_rows == 1_000).await;
    assert_eq!(observer.stats().row_limit, 1_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn six_hundred_rows_of_1_mib_arrive_with_max_memory_of_10_mb() {
    const LIMIT: usize = 10_000_000;
    let database = Database::with(
        r#"CREATE VIEW big AS SELECT ('{"id":' || i || ',"pad":"' || repeat('x', 1048576) || '"}')::json AS data
           FROM generate_series(0, 599) i"#,
    );
    let mut db = database.connect().await;
    let query = db.query::<RawJson>("big").max_memory(LIMIT);
    let mut stream = query.stream().await.unwrap();
    let watcher = watch(stream.observer());
    let (mut number, mut bytes) = (0, 0);
    while let Some(row) = within(SOON, stream.next()).await {
        let row = row.unwrap();
        let start = format!(r#"{{"id":{number},"pad":"xx"#);
        assert!(row.as_bytes().starts_with(start.as_bytes()), "row {number}");
        assert!(row.as_bytes().ends_with(b"xx\"}"), "row {number}");
        bytes += row.as_bytes().len() as u64;
        number += 1;
        // A slow consumer.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let stats = stream.stats();
    assert_eq!(number, 600);
    assert!(bytes > 600 * 1_048_576 && bytes == stats.bytes, "{bytes} {stats:?}");
    let peaks = watcher.join().unwrap();
    assert!(peaks.bytes <= LIMIT && stats.peak_bytes <= LIMIT, "{peaks:?} {stats:?}");
}

#[tokio::test]
async fn postgres_waits_while_the_channel_is_full() {
    // Once the channel and the kernel's buffers are full, Postgres must stop, long before the last row.
    let database = Database::with(
        "CREATE VIEW wide AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 9000)) AS data
             FROM generate_series(0, 4999) i",
    );
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = crate::server::backend_pid(&mut db).await;
    let query = db.query::<Doc>("wide").max_memory(1_000_000);
    let stream = query.stream().await.unwrap();
    // `Client` means that it waits for the client to read.
    within(SOON, admin.until_waits_for(pid, "Client")).await;
    let rows = rows_of(stream).await;
    assert_eq!(rows.len(), 5_000);
    assert_consecutive(&rows);
}
