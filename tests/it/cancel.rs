//! Dropping a stream cancels its query: the backend stops at once, whatever it is doing, and the cancel never hits
//! the next query.

use std::time::{Duration, Instant};

use fraiseql_stream::{Connection, ConnectionBuilder, ErrorKind};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;

use crate::server::{
    Admin, Database, Doc, ENDLESS, Random, SILENT, SOON, assert_consecutive, backend_pid, connect, ids,
    read_all, rows_of, scalar, table, table_script, trickle, within,
};

/// What the backend is doing when the stream is dropped.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// It sends rows, or waits for the client to read.
    Streaming,
    /// It runs the query and has sent no row.
    Silent,
    /// It runs the query and has sent some rows.
    SilentAfterRows,
    /// It waits for a lock before the statement is prepared, so `stream()` has not returned yet.
    Locked,
}

fn database() -> Database {
    Database::with(&format!(
        "{ENDLESS} {SILENT} {} {}
         CREATE VIEW flood AS SELECT to_jsonb(repeat('x', 1000)) AS data, generate_series(0, 99999999);
         CREATE VIEW stalls AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 1000), 'slept',
             CASE WHEN i = 50 THEN pg_sleep(3600)::text END) AS data FROM generate_series(0, 99) i;",
        table_script("locked", 1, 0),
        table_script("t", 10, 0)
    ))
}

/// Starts a query, waits until the backend is in this phase, and drops the stream. Returns the time of the drop.
async fn start_and_drop(db: &mut Connection, phase: Phase, (admin, pid): (&Admin, i32)) -> Instant {
    let entity = match phase {
        Phase::Streaming => "endless",
        Phase::Silent => "silent",
        Phase::SilentAfterRows => "stalls",
        Phase::Locked => "locked",
    };
    if let Phase::Locked = phase {
        let stream = db.query::<Value>(entity).stream();
        let waits = async {
            admin.until_waits_for(pid, "Lock").await;
            // Taken inside the select: when that returns, the future of `stream` is already dropped.
            Instant::now()
        };
        return tokio::select! {
            biased;
            _ = stream => panic!("the table is locked"),
            dropped = waits => dropped,
        };
    }
    let mut stream = db.query::<Value>(entity).stream().await.unwrap();
    let rows = match phase {
        Phase::Streaming => 100,
        Phase::SilentAfterRows => 20,
        Phase::Silent | Phase::Locked => 0,
    };
    for _ in 0..rows {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    match phase {
        Phase::Streaming => admin.until_waits_for(pid, "Client").await,
        _ => admin.until_waits_for(pid, "Timeout").await,
    }
    let dropped = Instant::now();
    drop(stream);
    dropped
}

/// Drops 20 streams in this phase; the backend must stop within a second each time.
async fn assert_stops_at_once(connection: &str, database: &Database, phase: Phase) {
    let (admin, locker) = (database.admin().await, database.admin().await);
    if let Phase::Locked = phase {
        locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    }
    let mut db = connect(connection).await;
    let pid = backend_pid(&mut db).await;
    let (mut stopped, mut usable) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let dropped = within(SOON, start_and_drop(&mut db, phase, (&admin, pid))).await;
        admin.until(pid, |now| now.is_some_and(|now| !now.is_active())).await;
        stopped.push(dropped.elapsed());
        // The same session still works.
        assert_eq!(backend_pid(&mut db).await, pid);
        usable.push(dropped.elapsed());
        let rows = rows_of(db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
        assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
    }
    stopped.sort();
    usable.sort();
    let transport = if connection.starts_with("host=/") { "Unix socket" } else { "TCP" };
    eprintln!(
        "cancel while {phase:?} over {transport}: not active after {:?} (median of 20), {:?} at most; usable after {:?}, {:?}",
        stopped[10], stopped[19], usable[10], usable[19]
    );
    assert!(stopped[19] < Duration::from_secs(1), "{stopped:?}");
    assert!(usable[19] < Duration::from_secs(2), "{usable:?}");
}

#[tokio::test]
async fn stream_dropped_while_rows_arrive_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Phase::Streaming).await;
}

#[tokio::test]
async fn stream_dropped_while_rows_arrive_stops_the_backend_over_a_unix_socket() {
    let database = database();
    assert_stops_at_once(&database.socket(), &database, Phase::Streaming).await;
}

#[tokio::test]
async fn stream_dropped_before_the_first_row_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Phase::Silent).await;
}

#[tokio::test]
async fn stream_dropped_before_the_first_row_stops_the_backend_over_a_unix_socket() {
    let database = database();
    assert_stops_at_once(&database.socket(), &database, Phase::Silent).await;
}

#[tokio::test]
async fn stream_dropped_between_two_rows_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Phase::SilentAfterRows).await;
    assert_stops_at_once(&database.socket(), &database, Phase::SilentAfterRows).await;
}

#[tokio::test]
async fn query_dropped_while_it_waits_for_a_lock_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Phase::Locked).await;
}

#[tokio::test]
async fn query_dropped_while_it_waits_for_a_lock_stops_the_backend_over_a_unix_socket() {
    let database = database();
    assert_stops_at_once(&database.socket(), &database, Phase::Locked).await;
}

/// Yields `times` times: a finer delay than with tokio's timers, whose resolution is 1 ms.
async fn yield_repeatedly(times: u64) -> Instant {
    for _ in 0..times {
        tokio::task::yield_now().await;
    }
    Instant::now()
}

/// Drops queries right after they start, possibly before Postgres has seen them. Postgres ignores a cancel request
/// that arrives too early, so it has to be repeated.
async fn drop_right_after_start(connection: &str, seed: u64) {
    let mut db = connect(connection).await;
    let pid = backend_pid(&mut db).await;
    let (mut random, mut usable) = (Random(seed), Vec::new());
    for entity in ["silent", "locked", "flood"].into_iter().cycle().take(150) {
        let query = db.query::<Value>(entity);
        let dropped = if entity == "locked" {
            let delay = yield_repeatedly(random.below(60));
            tokio::select! { _ = query.stream() => panic!("the table is locked"), now = delay => now }
        } else {
            let stream = query.stream().await.unwrap();
            yield_repeatedly(random.below(4)).await;
            drop(stream);
            Instant::now()
        };
        assert_eq!(backend_pid(&mut db).await, pid);
        usable.push(dropped.elapsed());
    }
    usable.sort();
    eprintln!(
        "dropped right after the start: usable after {:?} (median of 150), {:?} at most",
        usable[75], usable[149]
    );
    assert!(usable[149] < Duration::from_secs(1), "{usable:?}");
}

#[tokio::test]
async fn query_dropped_before_postgres_sees_it_is_cancelled() {
    let database = database();
    let locker = database.admin().await;
    locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    drop_right_after_start(&database.url, 1).await;
    drop_right_after_start(&database.socket(), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn query_dropped_before_postgres_sees_it_is_cancelled_on_two_threads() {
    let database = database();
    let locker = database.admin().await;
    locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    drop_right_after_start(&database.url, 3).await;
    drop_right_after_start(&database.socket(), 4).await;
}

#[tokio::test]
async fn dropped_owned_stream_ends_its_backend() {
    let database = database();
    let admin = database.admin().await;
    for entity in ["endless", "silent"] {
        let mut db = database.connect().await;
        let pid = backend_pid(&mut db).await;
        let stream = db.into_query::<Value>(entity).stream().await.unwrap();
        admin.until(pid, |now| now.is_some_and(crate::server::Activity::is_active)).await;
        let dropped = Instant::now();
        drop(stream);
        admin.until(pid, |now| now.is_none()).await;
        assert!(dropped.elapsed() < Duration::from_secs(1), "{entity}: {:?}", dropped.elapsed());
    }
}

#[tokio::test]
async fn close_returns_once_the_backend_has_stopped() {
    let database = database();
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    for entity in ["endless", "silent"] {
        let stream = db.query::<Value>(entity).stream().await.unwrap();
        admin.until(pid, |now| now.is_some_and(crate::server::Activity::is_active)).await;
        within(Duration::from_secs(1), stream.close()).await.unwrap();
        let now = admin.activity(pid).await.unwrap();
        assert!(!now.is_active(), "{entity}: {now:?}");
    }
}

#[derive(Debug, Deserialize, PartialEq)]
struct Item {
    sku: String,
}

/// Drops streams of one connection. Its methods return what went wrong as `Err`.
struct Dropper {
    db: Connection,
    random: Random,
    /// The number of streams dropped before their end.
    dropped_early: u32,
}

impl Dropper {
    /// Starts a short query and drops it at a random point: before it is prepared, while it runs, or at its end.
    async fn drop_one(&mut self) -> Result<(), String> {
        let random = &mut self.random;
        let limit = i32::try_from(random.below(3_000)).unwrap();
        let (to_read, spins, drops_future) = (random.below(1_500), random.below(2_000), random.below(5) == 0);
        let (turns, entity) = (random.below(8), if random.below(3) == 0 { "computed" } else { "t" });
        let query = self.db.query::<Doc>(entity).where_sql("(data->>'id')::int < $1", &[&limit]);
        if drops_future {
            // Polled for a while, then dropped.
            let delay = Duration::from_micros(spins);
            let started = tokio::time::timeout(delay, query.stream()).await;
            self.dropped_early += u32::from(started.is_err());
            return started.map_or(Ok(()), |started| started.map(drop).map_err(|error| error.to_string()));
        }
        let mut stream = query.stream().await.map_err(|error| format!("start: {error}"))?;
        for expected in 0..to_read.min(limit.unsigned_abs().into()) {
            match within(SOON, stream.next()).await {
                Some(Ok(row)) if row.id == expected => {}
                other => return Err(format!("row {expected} of {limit}: {other:?}")),
            }
        }
        yield_repeatedly(turns).await;
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(spins / 4) {
            std::hint::spin_loop();
        }
        self.dropped_early += u32::from(!stream.observer().is_ended());
        Ok(())
    }

    /// Runs another query at once. Some of them take a while, so that a late cancel request would hit them.
    async fn run_next(&mut self) -> Result<(), String> {
        let from = self.random.below(2_900);
        let low = i32::try_from(from).unwrap();
        let kind = self.random.below(4);
        let outcome = match kind {
            0 => {
                let query = self.db.query::<Doc>("t").where_sql("id >= $1", &[&low]).order_by("id").limit(50);
                let mut stream = query.stream().await.map_err(|error| format!("next: {error}"))?;
                let (rows, error) = read_all(&mut stream).await;
                error.map_or(Ok(ids(&rows) == (from..from + 50).collect::<Vec<_>>()), Err)
            }
            1 | 2 => {
                let entity = if kind == 1 { "items" } else { "slow_items" };
                let query = self.db.query::<Item>(entity).order_by("data->>'sku'");
                let mut stream = query.stream().await.map_err(|error| format!("next: {error}"))?;
                let (rows, error) = read_all(&mut stream).await;
                let expected: Vec<_> = ["a", "b", "c"].map(|sku| Item { sku: sku.to_owned() }).into();
                error.map_or(Ok(rows == expected), Err)
            }
            _ => {
                let client = self.db.client().await.map_err(|error| format!("client: {error}"))?;
                let row = client.query_one("SELECT $1::int4 + 1, pg_sleep(0.001)::text", &[&low]).await;
                let row = row.map_err(|error| format!("next, by the client: {error:?}"))?;
                Ok(row.get::<_, i32>(0) == low + 1)
            }
        };
        match outcome {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("next of kind {kind}: wrong rows")),
            Err(error) => Err(format!("next of kind {kind}: {error}")),
        }
    }
}

async fn drop_many(builder: ConnectionBuilder, seed: u64, drops: u32) -> (u32, Vec<String>) {
    let db = within(SOON, builder.connect()).await.unwrap();
    let mut dropper = Dropper { db, random: Random(seed), dropped_early: 0 };
    let mut failures = Vec::new();
    for drop in 0..drops {
        for outcome in [dropper.drop_one().await, dropper.run_next().await] {
            failures.extend(outcome.err().map(|why| format!("seed {seed}, drop {drop}: {why}")));
        }
    }
    (dropper.dropped_early, failures)
}

/// Drops 2,000 streams on connections with a statement cache of this size.
async fn assert_no_drop_hits_the_next_query(statement_cache: usize) {
    const CONNECTIONS: u32 = 8;
    const DROPS: u32 = 2_000;
    let database = Database::with(&format!(
        r#"{} ALTER TABLE t ADD PRIMARY KEY (id);
        CREATE VIEW computed AS SELECT jsonb_build_object('id', i, 'pad', repeat(md5(i::text), 4)) AS data FROM generate_series(0, 2999) i;
        CREATE TABLE items (data json); INSERT INTO items VALUES ('{{"sku":"c"}}'), ('{{"sku":"a"}}'), ('{{"sku":"b"}}');
        CREATE VIEW slow_items AS SELECT data FROM items, pg_sleep(0.002);"#,
        table_script("t", 3_000, 100)
    ));
    let start = Instant::now();
    let droppers: Vec<_> = (0..CONNECTIONS)
        .map(|i| {
            let url = if i % 4 == 0 { database.socket() } else { database.url.clone() };
            let builder = Connection::builder(&url).statement_cache(statement_cache);
            tokio::spawn(drop_many(builder, 1_000 + u64::from(i), DROPS / CONNECTIONS))
        })
        .collect();
    let (mut dropped_early, mut failures) = (0, Vec::new());
    for dropper in droppers {
        let (early, mut failed) = within(Duration::from_secs(120), dropper).await.unwrap();
        dropped_early += early;
        failures.append(&mut failed);
    }
    eprintln!(
        "{DROPS} drops, {dropped_early} of them early, {statement_cache} statements cached: {} failures of next queries, {:?}",
        failures.len(),
        start.elapsed()
    );
    assert!(failures.is_empty(), "{} failures: {:#?}", failures.len(), &failures[..failures.len().min(10)]);
    assert!(dropped_early > DROPS / 3, "{dropped_early}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_dropped_at_random_never_cancel_the_next_query() {
    assert_no_drop_hits_the_next_query(100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_dropped_at_random_without_a_statement_cache_never_cancel_the_next_query() {
    assert_no_drop_hits_the_next_query(0).await;
}

#[tokio::test]
async fn cancel_by_another_session_is_an_error() {
    let database = Database::with(&trickle("slow", 1_000, 0.01));
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let mut rows = Vec::new();
    for _ in 0..3 {
        rows.push(within(SOON, stream.next()).await.unwrap().unwrap());
    }
    admin.run("pg_cancel_backend", pid).await;
    let (mut rest, error) = read_all(&mut stream).await;
    rows.append(&mut rest);
    assert_consecutive(&rows);
    let error = error.expect("the stream must fail");
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "57014"));
    assert_eq!(error.stats().unwrap().rows, rows.len() as u64);
    drop(stream);
    assert_eq!(scalar::<i32>(&mut db, "SELECT 41 + 1").await, 42);
}

#[tokio::test]
async fn cancel_by_another_session_before_the_first_row_is_an_error() {
    let database = Database::with(SILENT);
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    admin.until_waits_for(pid, "Timeout").await;
    admin.run("pg_cancel_backend", pid).await;
    let (rows, error) = read_all(&mut stream).await;
    assert!(rows.is_empty());
    assert_eq!(error.unwrap().sqlstate().unwrap().code(), "57014");
}

#[tokio::test]
async fn stream_read_to_its_end_sends_no_cancel() {
    let database = table(10, 0);
    let mut db = database.connect().await;
    for _ in 0..200 {
        let mut stream = db.query::<Doc>("t").stream().await.unwrap();
        assert_eq!(read_all(&mut stream).await.0.len(), 10);
        drop(stream);
        // Long enough for a cancel request to hit it.
        let slept: String = scalar(&mut db, "SELECT pg_sleep(0.001)::text").await;
        assert_eq!(slept, "");
    }
}

/// Starts a proxy that lets a single connection through to the server. Returns its port.
async fn single_connection_proxy(port: u16) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy_port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut server = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    });
    proxy_port
}

#[tokio::test]
async fn connection_waits_for_the_end_of_a_query_whose_cancel_cannot_be_sent() {
    let database = Database::with(&format!(
        "CREATE VIEW nap AS SELECT to_jsonb(1) AS data FROM pg_sleep(0.3); {}",
        table_script("t", 10, 0)
    ));
    let port = crate::server::shared().port();
    let proxy_port = single_connection_proxy(port).await;
    let mut db = connect(&database.url.replace(&format!(":{port}/"), &format!(":{proxy_port}/"))).await;
    let stream = db.query::<Value>("nap").stream().await.unwrap();
    yield_repeatedly(10).await;
    drop(stream);
    let rows = rows_of(db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
    assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
}
