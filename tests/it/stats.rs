//! Statistics: the times of the consumer and of the producer add up to the stream's lifetime, whenever and from
//! wherever they are read.

use std::time::{Duration, Instant};

use fraiseql_stream::{ErrorKind, Observer, Stats, Verdict};
use futures_util::StreamExt;
use serde_json::Value;

use crate::server::{
    Database, Doc, ENDLESS, SILENT, SOON, assert_consecutive, backend_pid, eventually, read_all, rows_of,
    scalar, table, table_script, trickle, within,
};

fn parts(stats: &Stats) -> Duration {
    let time = &stats.time;
    time.source_wait + time.scheduled + time.decode + time.consumer + time.paused
}

fn producer_parts(stats: &Stats) -> Duration {
    stats.producer_time.source + stats.producer_time.room
}

/// Fails unless `sum` is within 1 % of `lifetime`, plus a tolerance for very short ones.
fn assert_close(what: &str, sum: Duration, lifetime: Duration) {
    let off = sum.abs_diff(lifetime);
    assert!(off <= lifetime / 100 + Duration::from_micros(100), "{what}: {sum:?} of {lifetime:?}");
}

/// A stream's lifetime by the test's own clock: the stream starts between these two moments.
struct Lifetime {
    not_before: Instant,
    not_after: Instant,
}

impl Lifetime {
    /// Fails unless the times add up to the stream's lifetime, and that agrees with the wall clock.
    fn assert_adds_up(&self, what: &str, observer: &Observer, least: Duration) {
        let stats = observer.stats();
        let most = self.not_before.elapsed();
        assert!((least..=most).contains(&stats.elapsed), "{what}: {least:?} <= {stats:?} <= {most:?}");
        assert_close(what, parts(&stats), stats.elapsed);
        assert!(stats.backlog <= stats.time.consumer + stats.time.decode, "{what}: {stats:?}");
        let shares = stats.shares();
        let sum = shares.backlog + shares.source_wait + shares.scheduled + shares.overlap;
        assert!((sum - 1.0).abs() < 0.01, "{what}: {shares:?}");
    }
}

/// Starts a stream on its own connection and returns it with its lifetime so far.
macro_rules! start {
    ($database:expr, $entity:expr, $type:ty) => {{
        let db = $database.connect().await;
        let not_before = Instant::now();
        let stream = db.into_query::<$type>($entity).stream().await.unwrap();
        let lifetime = Lifetime { not_before, not_after: Instant::now() };
        (stream, lifetime)
    }};
}

#[tokio::test]
async fn times_of_a_fast_stream_add_up_to_its_lifetime() {
    let database = table(50_000, 50);
    let (mut stream, lifetime) = start!(database, "t", Doc);
    let (rows, error) = read_all(&mut stream).await;
    assert!(error.is_none(), "{error:?}");
    lifetime.assert_adds_up("fast", &stream.observer(), Duration::ZERO);
    let (stats, least) = (stream.stats(), lifetime.not_after.elapsed());
    // Reading took nearly all of the time.
    assert!(stats.elapsed + stats.elapsed / 100 + Duration::from_millis(20) >= least, "{stats:?} {least:?}");
    assert_eq!(rows.len(), 50_000);
    assert!(!stats.time.decode.is_zero(), "{stats:?}");
}

#[tokio::test]
async fn times_of_a_slow_consumer_add_up_to_the_lifetime_of_the_stream() {
    let database = table(100, 50);
    let (mut stream, lifetime) = start!(database, "t", Doc);
    let mut slept = Duration::ZERO;
    while let Some(row) = within(SOON, stream.next()).await {
        row.unwrap();
        let start = Instant::now();
        tokio::time::sleep(Duration::from_millis(4)).await;
        slept += start.elapsed();
    }
    lifetime.assert_adds_up("slow consumer", &stream.observer(), slept);
    let stats = stream.stats();
    let held = stats.time.consumer + stats.time.decode;
    assert!(held >= slept, "all of the sleep is the consumer's: {stats:?}");
    assert!(stats.backlog >= slept * 9 / 10, "{stats:?}");
}

#[tokio::test]
async fn times_of_a_slow_source_add_up_to_the_lifetime_of_the_stream() {
    let database = Database::with(&trickle("slow", 100, 0.004));
    let (mut stream, lifetime) = start!(database, "slow", Doc);
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 100);
    lifetime.assert_adds_up("slow source", &stream.observer(), Duration::from_millis(400));
    let stats = stream.stats();
    assert!(stats.time.source_wait > stats.elapsed / 2, "{stats:?}");
    // The producer's time ends with the end mark. Until the consumer finds the mark, its time counts as scheduled.
    let producer = producer_parts(&stats);
    let found = producer + stats.time.scheduled + stats.backlog;
    assert!(producer <= stats.elapsed && found + stats.elapsed / 100 >= stats.elapsed, "{stats:?}");
    assert!(stats.producer_time.room.is_zero(), "{stats:?}");
}

#[tokio::test]
async fn time_in_a_pause_counts_as_paused_and_not_towards_the_verdict() {
    let database = table(1_000, 50);
    let (mut stream, lifetime) = start!(database, "t", Doc);
    let mut rows = vec![within(SOON, stream.next()).await.unwrap().unwrap()];
    let start = Instant::now();
    stream.pause();
    tokio::time::sleep(Duration::from_millis(150)).await;
    let running = stream.stats().time.paused;
    assert!(running >= Duration::from_millis(140), "a pause counts while it lasts: {running:?}");
    stream.resume();
    let paused = start.elapsed();
    let first = stream.stats().time.paused;
    assert!(first >= Duration::from_millis(150) && first <= paused, "{first:?} {paused:?}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(stream.stats().time.paused, first, "resumed");

    // The next poll also ends a pause, even if it takes a row of the current chunk.
    stream.pause();
    tokio::time::sleep(Duration::from_millis(50)).await;
    rows.push(within(SOON, stream.next()).await.unwrap().unwrap());
    let second = stream.stats().time.paused;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(stream.stats().time.paused, second, "ended by a poll");
    while let Some(row) = within(SOON, stream.next()).await {
        rows.push(row.unwrap());
    }
    let stats = stream.stats();
    assert!(stats.time.paused >= first + Duration::from_millis(50), "{stats:?}");
    assert_eq!(rows.len(), 1_000);
    assert_consecutive(&rows);
    lifetime.assert_adds_up("paused", &stream.observer(), Duration::from_millis(220));
    assert_eq!(stream.stats().time.paused, stats.time.paused, "the times stop at the end");
}

#[tokio::test]
async fn ongoing_wait_is_included_when_another_task_reads_the_statistics() {
    let database = Database::with(SILENT);
    let (mut stream, lifetime) = start!(database, "silent", Value);
    let observer = stream.observer();
    let reader = tokio::spawn(async move { stream.next().await.map(drop) });
    for least in [60, 120, 180].map(Duration::from_millis) {
        eventually("the wait is counted", || observer.stats().time.source_wait >= least).await;
        lifetime.assert_adds_up("in a wait", &observer, least);
        let stats = observer.stats();
        assert_close("producer", producer_parts(&stats), stats.elapsed);
        assert!(stats.producer_time.room.is_zero(), "{stats:?}");
    }
    reader.abort();
    assert!(reader.await.unwrap_err().is_cancelled());
    assert!(observer.is_ended());
    let (one, two) = (observer.stats(), observer.stats());
    assert_eq!((one.elapsed, one.time), (two.elapsed, two.time), "the times stop at the end");
    lifetime.assert_adds_up("dropped in a wait", &observer, Duration::from_millis(180));
}

#[tokio::test]
async fn producer_times_add_up_while_it_waits_for_room_and_stop_at_its_end() {
    let database = table(600, 50);
    let (mut stream, lifetime) = start!(database, "t", Doc);
    let observer = stream.observer();
    eventually("it waits for room", || observer.stats().producer_time.room > Duration::from_millis(30)).await;
    lifetime.assert_adds_up("not polled", &observer, Duration::from_millis(30));
    let stats = observer.stats();
    assert_close("producer", producer_parts(&stats), stats.elapsed);
    while within(SOON, stream.next()).await.unwrap().unwrap().id < 590 {}
    // The last of the 600 rows are in the channel, followed by the end mark.
    eventually("the source has ended", || {
        let (one, two) = (observer.stats(), observer.stats());
        one.elapsed < two.elapsed && one.producer_time == two.producer_time
    })
    .await;
    let stats = observer.stats();
    assert!(producer_parts(&stats) < stats.elapsed, "{stats:?}");
    lifetime.assert_adds_up("the source has ended", &observer, Duration::from_millis(30));
}

#[tokio::test]
async fn times_of_a_stream_dropped_early_add_up() {
    let database = Database::with(ENDLESS);
    let (mut stream, lifetime) = start!(database, "endless", Doc);
    for _ in 0..500 {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    let observer = stream.observer();
    drop(stream);
    lifetime.assert_adds_up("dropped", &observer, Duration::ZERO);
    let stats = observer.stats();
    assert_eq!((stats.rows, stats.buffered_rows, stats.buffered_bytes), (500, 0, 0));
    assert_close("producer", producer_parts(&stats), stats.elapsed);
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(observer.stats().elapsed, stats.elapsed, "the times stop at the end");
}

/// Reads the statistics until the stream ends. Returns how often.
fn read_until_end(observer: &Observer) -> u64 {
    let (mut reads, mut last) = (0, Duration::ZERO);
    while !observer.is_ended() {
        let stats = observer.stats();
        assert_close("any moment", parts(&stats), stats.elapsed);
        assert!(stats.elapsed >= last, "time goes backwards: {last:?} {stats:?}");
        last = stats.elapsed;
        reads += 1;
    }
    reads
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statistics_read_by_several_threads_at_any_moment_add_up() {
    let database = table(30_000, 50);
    let (mut stream, lifetime) = start!(database, "t", Doc);
    let readers = [stream.observer(), stream.observer()]
        .map(|observer| std::thread::spawn(move || read_until_end(&observer)));
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 30_000);
    let reads: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    assert!(reads > 100, "{reads}");
    lifetime.assert_adds_up("fast", &stream.observer(), Duration::ZERO);
}

#[tokio::test]
async fn query_that_has_sent_nothing_has_statistics_and_can_be_cancelled() {
    let database = Database::with(&format!("{SILENT} {}", table_script("t", 5, 0)));
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let mut stream = within(Duration::from_secs(2), db.query::<Value>("silent").stream()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), stream.next()).await.is_err());
    let stats = stream.stats();
    assert_eq!((stats.rows, stats.bytes), (0, 0));
    assert!(stats.time.source_wait > Duration::from_millis(60), "{stats:?}");
    assert_eq!(stats.verdict(), Verdict::SourceBound, "{stats:?}");
    within(SOON, admin.until_waits_for(pid, "Timeout")).await;
    let start = Instant::now();
    drop(stream);
    admin.until(pid, |now| now.is_some_and(|now| !now.is_active())).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(rows_of(db.query::<Doc>("t").stream().await.unwrap()).await.len(), 5);
}

#[tokio::test]
async fn rows_before_a_postgres_error_arrive_first() {
    let database = Database::with(
        "CREATE VIEW breaks AS SELECT jsonb_build_object('id', i, 'x', 1 / (i - 1000)) AS data FROM generate_series(0, 5000) i",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("breaks").stream().await.unwrap();
    let (rows, error) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 1_000);
    assert_consecutive(&rows);
    let error = error.expect("a division by zero");
    assert_eq!(error.kind(), ErrorKind::Query);
    assert_eq!(error.sqlstate().unwrap().code(), "22012");
    let stats = error.stats().expect("the error ended the stream");
    assert_eq!((stats.rows, stats.failed, &*stats.entity), (1_000, 0, "breaks"));
    assert_close("failed", parts(stats), stats.elapsed);
    let text = error.to_string();
    assert!(text.starts_with("breaks: division by zero (22012)"), "{text}");
    assert!(text.contains("after 1,000 rows in ") && text.lines().count() == 1, "{text}");
    assert!(text.contains(&stats.verdict().to_string()), "{text}");
    assert!(within(SOON, stream.next()).await.is_none(), "an error ends the stream");
    drop(stream);
    assert_eq!(scalar::<i32>(&mut db, "SELECT 41 + 1").await, 42, "the connection still works");
}

#[tokio::test]
async fn error_arrives_after_all_rows_even_if_the_consumer_is_slow() {
    let database = Database::with(
        "CREATE VIEW breaks AS SELECT jsonb_build_object('id', i, 'x', 1 / (i - 300)) AS data FROM generate_series(0, 5000) i",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("breaks").stream().await.unwrap();
    let observer = stream.observer();
    eventually("the channel is full", || observer.stats().buffered_rows == 256).await;
    let (rows, error) = read_all(&mut stream).await;
    assert_eq!((rows.len(), error.unwrap().sqlstate().unwrap().code()), (300, "22012"));
}

#[tokio::test]
async fn statistics_display_as_one_line() {
    let database = table(1_234, 50);
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("t").stream().await.unwrap();
    read_all(&mut stream).await;
    let text = stream.stats().to_string();
    assert!(text.starts_with("t: 1,234 rows, ") && text.lines().count() == 1, "{text}");
    for part in ["kB in ", "your code ", "decoding ", "peak ", "of 16.8 MB"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
}

#[tokio::test]
async fn waiting_for_postgres_to_accept_a_query_counts_as_source_wait() {
    let database = Database::with(&table_script("t", 1, 0));
    let (locker, mut db) = (database.admin().await, database.connect().await);
    locker.client.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let unlock = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        locker.client.batch_execute("ROLLBACK").await.unwrap();
    };
    let (stream, ()) = tokio::join!(db.query::<Doc>("t").stream(), unlock);
    let mut stream = stream.unwrap();
    read_all(&mut stream).await;
    let stats = stream.stats();
    assert!(stats.time.source_wait > Duration::from_millis(400), "{stats:?}");
    assert_eq!(stats.verdict(), Verdict::SourceBound, "{stats:?}");
}

#[tokio::test]
async fn pause_after_a_dropped_wait_counts_as_paused() {
    let database = Database::with(SILENT);
    let mut db = database.connect().await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    let limit = Duration::from_millis(50);
    assert!(tokio::time::timeout(limit, stream.next()).await.is_err());
    stream.pause();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let paused = stream.stats().time.paused;
    // The next poll ends the pause.
    assert!(tokio::time::timeout(limit, stream.next()).await.is_err());
    let stats = stream.stats();
    assert!(paused >= Duration::from_millis(450), "{paused:?}");
    assert!((paused..paused + limit / 2).contains(&stats.time.paused), "{paused:?}, {stats:?}");
    assert!(stats.time.scheduled < paused / 2, "{stats:?}");
}

#[tokio::test]
async fn dropped_wait_does_not_count_as_a_delay_of_the_runtime() {
    let database = Database::with(SILENT);
    let mut db = database.connect().await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), stream.next()).await.is_err());
    // The task does something else, and the runtime is not busy.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let stats = stream.stats();
    assert!(stats.time.scheduled < Duration::from_millis(250), "{stats:?}");
    assert_ne!(stats.verdict(), Verdict::RuntimeBound, "{stats:?}");
}
