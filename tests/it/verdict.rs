//! The verdict names the side that is slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fraiseql_stream::{ErrorKind, JsonStream, RawJson, Stats, Verdict};
use futures_util::StreamExt;

use crate::server::{Database, Doc, SOON, read_all, table, trickle, within};

#[tokio::test]
async fn consumer_that_takes_10_ms_per_row_is_consumer_bound() {
    let database = table(200, 50);
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("t").stream().await.unwrap();
    while let Some(row) = within(SOON, stream.next()).await {
        row.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stats = stream.stats();
    assert_eq!(stats.verdict(), Verdict::ConsumerBound, "{stats:?}");
    assert!(stats.shares().backlog > 0.8, "{stats:?}");
    assert_eq!(stats.recent().verdict(), Verdict::ConsumerBound, "{stats:?}");
    assert!(stats.to_string().contains("consumer-bound"), "{stats}");
}

#[tokio::test]
async fn slow_source_is_source_bound() {
    let database = Database::with(&trickle("slow", 200, 0.005));
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 200);
    let stats = stream.stats();
    assert_eq!(stats.verdict(), Verdict::SourceBound, "{stats:?}");
    assert_eq!(stats.recent().verdict(), Verdict::SourceBound, "{stats:?}");
    assert!(stats.to_string().contains("source-bound"), "{stats}");
}

#[tokio::test]
async fn recent_verdict_follows_a_change_of_the_slow_side() {
    // A fast source that is read slowly, and then a slow source.
    let database = Database::with(
        "CREATE VIEW v AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 9000), 'slept',
             CASE WHEN i >= 100 THEN pg_sleep(0.05)::text END) AS data FROM generate_series(0, 349) i",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("v").stream().await.unwrap();
    for _ in 0..100 {
        within(SOON, stream.next()).await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(stream.stats().verdict(), Verdict::ConsumerBound, "{:?}", stream.stats());
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 250);
    // The last ten seconds no longer include the sleeps.
    let stats = stream.stats();
    assert_eq!(stats.recent().verdict(), Verdict::SourceBound, "{stats:?}");
    assert!(stats.recent().backlog < 0.05, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fast_consumer_of_300_000_rows_is_not_reported_as_slow() {
    let database = table(300_000, 100);
    let db = database.connect().await;
    // Raw bytes only: without optimisation, decoding is slower than Postgres, and the verdict would say so.
    let mut stream = db.into_query::<RawJson>("t").stream().await.unwrap();
    let task = tokio::spawn(async move {
        while let Some(row) = stream.next().await {
            row.unwrap();
        }
        stream.stats()
    });
    let stats = within(Duration::from_secs(60), task).await.unwrap();
    assert_eq!(stats.rows, 300_000);
    eprintln!("{stats} {:?}", stats.shares());
    assert!(matches!(stats.verdict(), Verdict::SourceBound | Verdict::Balanced), "{stats:?}");
}

/// Tasks that block the runtime's threads for 20 to 50 ms at a time.
struct Hogs(Arc<AtomicBool>);

impl Hogs {
    fn start(count: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for hog in 0..count {
            tokio::spawn(block(hog, Arc::clone(&stop)));
        }
        Self(stop)
    }
}

async fn block(mut turn: u64, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        // Blocks on purpose: this is the mistake that the verdict must report.
        std::thread::sleep(Duration::from_millis(20 + turn * 7 % 30));
        tokio::task::yield_now().await;
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads as fast as possible for a second and a half.
async fn read_for_a_while(mut stream: JsonStream<RawJson>) -> Stats {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1_500) {
        stream.next().await.unwrap().unwrap();
    }
    let stats = stream.stats();
    eprintln!("{stats} {:?}", stats.shares());
    stats
}

/// Returns the statistics of a fast reader in a task of a starved runtime.
async fn starved(database: &Database, hogs: u64) -> Stats {
    let stream = database.connect().await.into_query("endless").stream().await.unwrap();
    let _hogs = Hogs::start(hogs);
    within(SOON, tokio::spawn(read_for_a_while(stream))).await.unwrap()
}

#[tokio::test]
async fn starved_runtime_is_runtime_bound_in_the_future_of_block_on() {
    let database = Database::with(crate::server::ENDLESS);
    for hogs in [1, 4] {
        let stream = database.connect().await.into_query("endless").stream().await.unwrap();
        let running = Hogs::start(hogs);
        let stats = within(SOON, read_for_a_while(stream)).await;
        drop(running);
        assert_eq!(stats.verdict(), Verdict::RuntimeBound, "{hogs}: {stats:?}");
    }
}

#[tokio::test]
async fn starved_runtime_of_one_thread_is_runtime_bound() {
    let database = Database::with(crate::server::ENDLESS);
    let stats = starved(&database, 1).await;
    assert_eq!(stats.verdict(), Verdict::RuntimeBound, "{stats:?}");
    assert!(stats.to_string().contains("runtime-bound"), "{stats}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starved_runtime_of_two_threads_is_runtime_bound() {
    let database = Database::with(crate::server::ENDLESS);
    let stats = starved(&database, 4).await;
    assert_eq!(stats.verdict(), Verdict::RuntimeBound, "{stats:?}");
}

#[tokio::test]
async fn statement_timeout_of_a_sleeping_consumer_is_reported_as_consumer_bound() {
    let database = Database::with(
        r#"CREATE VIEW big AS SELECT ('{"id":' || i || ',"pad":"' || repeat('x', 1000000) || '"}')::json AS data
           FROM generate_series(0, 999) i"#,
    );
    let url = format!("{}?options=-c%20statement_timeout%3D2000", database.url);
    let mut db = crate::server::connect(&url).await;
    let mut stream = db.query::<RawJson>("big").max_memory(2_000_000).stream().await.unwrap();
    let start = Instant::now();
    let mut rows = 0;
    let error = loop {
        match within(SOON, stream.next()).await.expect("the stream must fail") {
            Ok(_) => rows += 1,
            Err(error) => break error,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(start.elapsed() > Duration::from_millis(1_900));
    let text = error.to_string();
    eprintln!("{text}");
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "57014"));
    let stats = error.stats().unwrap();
    assert_eq!((stats.rows, stats.verdict()), (rows, Verdict::ConsumerBound), "{stats:?}");
    assert!(stats.shares().backlog > 0.8, "{stats:?}");
    assert!(text.contains("57014") && text.contains("consumer-bound"), "{text}");
    assert!(text.contains("Postgres waited for your code"), "{text}");
}
