//! Statistics: both halves of the time add up to their lives, whenever and from wherever they are read.

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

/// Within 1 %, and a grain for very short lives.
fn assert_close(what: &str, sum: Duration, life: Duration) {
    let off = sum.abs_diff(life);
    assert!(off <= life / 100 + Duration::from_micros(100), "{what}: {sum:?} of {life:?}");
}

/// A stream's life by the test's own clock: it is longer than `least` and shorter than `most`.
struct Life {
    most: Instant,
    least: Instant,
}

impl Life {
    /// The parts are all of the stream's life, and that is as long as it was by the clock on the wall.
    fn assert_adds_up(&self, what: &str, observer: &Observer, least: Duration) {
        let stats = observer.stats();
        let most = self.most.elapsed();
        assert!((least..=most).contains(&stats.elapsed), "{what}: {least:?} <= {stats:?} <= {most:?}");
        assert_close(what, parts(&stats), stats.elapsed);
        assert!(stats.backlog <= stats.time.consumer + stats.time.decode, "{what}: {stats:?}");
        let shares = stats.shares();
        let whole = shares.backlog + shares.source_wait + shares.scheduled + shares.overlap;
        assert!((whole - 1.0).abs() < 0.01, "{what}: {shares:?}");
    }
}

/// Starts a stream on a connection of its own and hands it over together with its life so far.
macro_rules! start {
    ($database:expr, $entity:expr, $type:ty) => {{
        let db = $database.connect().await;
        let most = Instant::now();
        let stream = db.into_query::<$type>($entity).stream().await.unwrap();
        let life = Life { most, least: Instant::now() };
        (stream, life)
    }};
}

#[tokio::test]
async fn the_parts_of_a_fast_streams_time_add_up_to_its_life() {
    let database = table(50_000, 50);
    let (mut stream, life) = start!(database, "t", Doc);
    let (rows, error) = read_all(&mut stream).await;
    assert!(error.is_none(), "{error:?}");
    life.assert_adds_up("fast", &stream.observer(), Duration::ZERO);
    let (stats, least) = (stream.stats(), life.least.elapsed());
    // The reading was nearly all there was to it.
    assert!(stats.elapsed + stats.elapsed / 100 + Duration::from_millis(20) >= least, "{stats:?} {least:?}");
    assert_eq!(rows.len(), 50_000);
    assert!(!stats.time.decode.is_zero(), "{stats:?}");
}

#[tokio::test]
async fn the_parts_of_a_slow_consumers_time_add_up_to_its_life() {
    let database = table(100, 50);
    let (mut stream, life) = start!(database, "t", Doc);
    let mut slept = Duration::ZERO;
    while let Some(row) = within(SOON, stream.next()).await {
        row.unwrap();
        let start = Instant::now();
        tokio::time::sleep(Duration::from_millis(4)).await;
        slept += start.elapsed();
    }
    life.assert_adds_up("slow consumer", &stream.observer(), slept);
    let stats = stream.stats();
    let held = stats.time.consumer + stats.time.decode;
    assert!(held >= slept, "all of the sleep is the consumer's: {stats:?}");
    assert!(stats.backlog >= slept * 9 / 10, "{stats:?}");
}

#[tokio::test]
async fn the_parts_of_a_slow_sources_time_add_up_to_its_life() {
    let database = Database::with(&trickle("slow", 100, 0.004));
    let (mut stream, life) = start!(database, "slow", Doc);
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 100);
    life.assert_adds_up("slow source", &stream.observer(), Duration::from_millis(400));
    let stats = stream.stats();
    assert!(stats.time.source_wait > stats.elapsed / 2, "{stats:?}");
    // The producer's life ends with the end mark, which the consumer then finds: until then it is scheduled.
    let producer = producer_parts(&stats);
    let found = producer + stats.time.scheduled + stats.backlog;
    assert!(producer <= stats.elapsed && found + stats.elapsed / 100 >= stats.elapsed, "{stats:?}");
    assert!(stats.producer_time.room.is_zero(), "{stats:?}");
}

#[tokio::test]
async fn time_in_pause_is_paused_and_counts_for_no_verdict() {
    let database = table(1_000, 50);
    let (mut stream, life) = start!(database, "t", Doc);
    let mut rows = vec![within(SOON, stream.next()).await.unwrap().unwrap()];
    let start = Instant::now();
    stream.pause();
    tokio::time::sleep(Duration::from_millis(150)).await;
    let running = stream.stats().time.paused;
    assert!(running >= Duration::from_millis(140), "a pause counts while it goes on: {running:?}");
    stream.resume();
    let paused = start.elapsed();
    let first = stream.stats().time.paused;
    assert!(first >= Duration::from_millis(150) && first <= paused, "{first:?} {paused:?}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(stream.stats().time.paused, first, "resumed");

    // The next poll ends a pause as well, also one that takes a row of the chunk in hand.
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
    life.assert_adds_up("paused", &stream.observer(), Duration::from_millis(220));
    assert_eq!(stream.stats().time.paused, stats.time.paused, "an ended life stands still");
}

#[tokio::test]
async fn a_wait_that_goes_on_is_counted_when_it_is_read_from_another_task() {
    let database = Database::with(SILENT);
    let (mut stream, life) = start!(database, "silent", Value);
    let observer = stream.observer();
    let reader = tokio::spawn(async move { stream.next().await.map(drop) });
    for least in [60, 120, 180].map(Duration::from_millis) {
        eventually("the wait is counted", || observer.stats().time.source_wait >= least).await;
        life.assert_adds_up("in a wait", &observer, least);
        let stats = observer.stats();
        assert_close("producer", producer_parts(&stats), stats.elapsed);
        assert!(stats.producer_time.room.is_zero(), "{stats:?}");
    }
    reader.abort();
    assert!(reader.await.unwrap_err().is_cancelled());
    assert!(observer.is_ended());
    let (one, two) = (observer.stats(), observer.stats());
    assert_eq!((one.elapsed, one.time), (two.elapsed, two.time), "an ended life stands still");
    life.assert_adds_up("dropped in a wait", &observer, Duration::from_millis(180));
}

#[tokio::test]
async fn the_producers_parts_add_up_while_it_waits_for_room_and_stand_still_at_its_end() {
    let database = table(600, 50);
    let (mut stream, life) = start!(database, "t", Doc);
    let observer = stream.observer();
    eventually("it waits for room", || observer.stats().producer_time.room > Duration::from_millis(30)).await;
    life.assert_adds_up("nobody polls", &observer, Duration::from_millis(30));
    let stats = observer.stats();
    assert_close("producer", producer_parts(&stats), stats.elapsed);
    while within(SOON, stream.next()).await.unwrap().unwrap().id < 590 {}
    // 600 rows: the last of them lie in the channel, with the end mark behind them.
    eventually("the source has ended", || {
        let (one, two) = (observer.stats(), observer.stats());
        one.elapsed < two.elapsed && one.producer_time == two.producer_time
    })
    .await;
    let stats = observer.stats();
    assert!(producer_parts(&stats) < stats.elapsed, "{stats:?}");
    life.assert_adds_up("the source has ended", &observer, Duration::from_millis(30));
}

#[tokio::test]
async fn the_parts_add_up_when_the_stream_is_dropped_in_the_middle() {
    let database = Database::with(ENDLESS);
    let (mut stream, life) = start!(database, "endless", Doc);
    for _ in 0..500 {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    let observer = stream.observer();
    drop(stream);
    life.assert_adds_up("dropped", &observer, Duration::ZERO);
    let stats = observer.stats();
    assert_eq!((stats.rows, stats.buffered_rows, stats.buffered_bytes), (500, 0, 0));
    assert_close("producer", producer_parts(&stats), stats.elapsed);
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(observer.stats().elapsed, stats.elapsed, "an ended life stands still");
}

/// Looks until the stream is over; how often.
fn look(observer: &Observer) -> u64 {
    let (mut looks, mut last) = (0, Duration::ZERO);
    while !observer.is_ended() {
        let stats = observer.stats();
        assert_close("any moment", parts(&stats), stats.elapsed);
        assert!(stats.elapsed >= last, "time runs backwards: {last:?} {stats:?}");
        last = stats.elapsed;
        looks += 1;
    }
    looks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statistics_read_by_many_at_any_moment_add_up() {
    let database = table(30_000, 50);
    let (mut stream, life) = start!(database, "t", Doc);
    let readers =
        [stream.observer(), stream.observer()].map(|observer| std::thread::spawn(move || look(&observer)));
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(rows.len(), 30_000);
    let looks: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    assert!(looks > 100, "{looks}");
    life.assert_adds_up("fast", &stream.observer(), Duration::ZERO);
}

#[tokio::test]
async fn a_query_that_has_sent_nothing_has_statistics_and_can_be_cancelled() {
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
async fn rows_before_an_error_of_postgres_arrive_first() {
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
    let stats = error.stats().expect("it ended the stream");
    assert_eq!((stats.rows, stats.failed, &*stats.entity), (1_000, 0, "breaks"));
    assert_close("failed", parts(stats), stats.elapsed);
    let text = error.to_string();
    assert!(text.starts_with("breaks: division by zero (22012)"), "{text}");
    assert!(text.contains("after 1,000 rows in ") && text.lines().count() == 1, "{text}");
    assert!(text.contains(&stats.verdict().to_string()), "{text}");
    assert!(within(SOON, stream.next()).await.is_none(), "an error ends the stream");
    drop(stream);
    assert_eq!(scalar::<i32>(&mut db, "SELECT 41 + 1").await, 42, "the connection goes on");
}

#[tokio::test]
async fn an_error_after_a_slow_consumer_still_comes_after_all_rows() {
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
async fn the_statistics_read_as_one_line() {
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
async fn waiting_for_postgres_to_accept_a_query_is_source_wait() {
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
async fn a_pause_counts_as_one_also_when_a_wait_was_given_up_for_it() {
    let database = Database::with(SILENT);
    let mut db = database.connect().await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    let patience = Duration::from_millis(50);
    assert!(tokio::time::timeout(patience, stream.next()).await.is_err());
    stream.pause();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let paused = stream.stats().time.paused;
    // The next poll ends the pause.
    assert!(tokio::time::timeout(patience, stream.next()).await.is_err());
    let stats = stream.stats();
    assert!(paused >= Duration::from_millis(450), "{paused:?}");
    assert!((paused..paused + patience / 2).contains(&stats.time.paused), "{paused:?}, {stats:?}");
    assert!(stats.time.scheduled < paused / 2, "{stats:?}");
}

#[tokio::test]
async fn a_wait_that_was_given_up_is_not_the_runtimes_delay() {
    let database = Database::with(SILENT);
    let mut db = database.connect().await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), stream.next()).await.is_err());
    // The task is elsewhere, and the runtime well.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let stats = stream.stats();
    assert!(stats.time.scheduled < Duration::from_millis(250), "{stats:?}");
    assert_ne!(stats.verdict(), Verdict::RuntimeBound, "{stats:?}");
}
