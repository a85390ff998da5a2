//! Drop is cancel: the backend stops at once, whatever it does, and the next query is never hit.

use std::time::{Duration, Instant};

use fraiseql_stream::{Builder, Connection, ErrorKind};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;

use crate::server::{
    Admin, Database, Doc, ENDLESS, Random, SILENT, SOON, assert_consecutive, backend_pid, connect, ids,
    read_all, rows_of, scalar, table, table_script, trickle, within,
};

/// What the backend is doing when the stream is dropped.
#[derive(Clone, Copy, Debug)]
enum Doing {
    /// It sends, or waits until we read.
    Streaming,
    /// It works and has sent nothing.
    Silent,
    /// It works and has sent some rows.
    SilentAfterRows,
    /// It waits for a lock before the statement is even prepared: there is no stream yet.
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

/// Begins a query, waits until the backend is at it, and drops it; when it was dropped.
async fn begin_and_drop(db: &mut Connection, doing: Doing, (admin, pid): (&Admin, i32)) -> Instant {
    let entity = match doing {
        Doing::Streaming => "endless",
        Doing::Silent => "silent",
        Doing::SilentAfterRows => "stalls",
        Doing::Locked => "locked",
    };
    if let Doing::Locked = doing {
        let stream = db.query::<Value>(entity).stream();
        let waits = async {
            admin.until_waits_for(pid, "Lock").await;
            // Taken within the select: when it returns, the future of `stream` is already dropped.
            Instant::now()
        };
        return tokio::select! {
            biased;
            _ = stream => panic!("the table is locked"),
            dropped = waits => dropped,
        };
    }
    let mut stream = db.query::<Value>(entity).stream().await.unwrap();
    let rows = match doing {
        Doing::Streaming => 100,
        Doing::SilentAfterRows => 20,
        Doing::Silent | Doing::Locked => 0,
    };
    for _ in 0..rows {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    match doing {
        Doing::Streaming => admin.until_waits_for(pid, "Client").await,
        _ => admin.until_waits_for(pid, "Timeout").await,
    }
    let dropped = Instant::now();
    drop(stream);
    dropped
}

/// Drops 20 streams in the midst of what the backend does; each must be gone within a second.
async fn assert_stops_at_once(connection: &str, database: &Database, doing: Doing) {
    let (admin, locker) = (database.admin().await, database.admin().await);
    if let Doing::Locked = doing {
        locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    }
    let mut db = connect(connection).await;
    let pid = backend_pid(&mut db).await;
    let (mut stopped, mut usable) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let dropped = within(SOON, begin_and_drop(&mut db, doing, (&admin, pid))).await;
        admin.until(pid, |now| now.is_some_and(|now| !now.is_active())).await;
        stopped.push(dropped.elapsed());
        // The same session answers, and rightly.
        assert_eq!(backend_pid(&mut db).await, pid);
        usable.push(dropped.elapsed());
        let rows = rows_of(db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
        assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
    }
    stopped.sort();
    usable.sort();
    let way = if connection.starts_with("host=/") { "Unix socket" } else { "TCP" };
    eprintln!(
        "cancel, {doing:?} by {way}: not active after {:?} (median of 20), {:?} at most; usable after {:?}, {:?}",
        stopped[10], stopped[19], usable[10], usable[19]
    );
    assert!(stopped[19] < Duration::from_secs(1), "{stopped:?}");
    assert!(usable[19] < Duration::from_secs(2), "{usable:?}");
}

#[tokio::test]
async fn a_stream_dropped_while_it_streams_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Doing::Streaming).await;
}

#[tokio::test]
async fn a_stream_dropped_while_it_streams_stops_the_backend_on_a_unix_socket() {
    let database = database();
    assert_stops_at_once(&database.socket(), &database, Doing::Streaming).await;
}

#[tokio::test]
async fn a_stream_dropped_while_postgres_is_silent_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Doing::Silent).await;
}

#[tokio::test]
async fn a_stream_dropped_while_postgres_is_silent_stops_the_backend_on_a_unix_socket() {
    let database = database();
    assert_stops_at_once(&database.socket(), &database, Doing::Silent).await;
}

#[tokio::test]
async fn a_stream_dropped_in_a_silence_after_rows_stops_the_backend() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Doing::SilentAfterRows).await;
    assert_stops_at_once(&database.socket(), &database, Doing::SilentAfterRows).await;
}

#[tokio::test]
async fn a_stream_dropped_before_it_is_there_stops_the_backend_that_waits_for_a_lock() {
    let database = database();
    assert_stops_at_once(&database.url, &database, Doing::Locked).await;
}

#[tokio::test]
async fn a_stream_dropped_before_it_is_there_stops_the_backend_that_waits_for_a_lock_on_a_unix_socket() {
    let database = database();
    assert_stops_at_once(&database.socket(), &database, Doing::Locked).await;
}

/// Lets others run so many times: finer than tokio's timers, whose grain is 1 ms.
async fn yields(times: u64) -> Instant {
    for _ in 0..times {
        tokio::task::yield_now().await;
    }
    Instant::now()
}

/// Drops queries in the very moment in which they begin, when Postgres may not have seen them yet: a cancel
/// that comes too early is ignored by Postgres, and must not be the last word.
async fn drop_at_birth(connection: &str, seed: u64) {
    let mut db = connect(connection).await;
    let pid = backend_pid(&mut db).await;
    let (mut random, mut usable) = (Random(seed), Vec::new());
    for entity in ["silent", "locked", "flood"].into_iter().cycle().take(150) {
        let query = db.query::<Value>(entity);
        let dropped = if entity == "locked" {
            let patience = yields(random.below(60));
            tokio::select! { _ = query.stream() => panic!("the table is locked"), now = patience => now }
        } else {
            let stream = query.stream().await.unwrap();
            yields(random.below(4)).await;
            drop(stream);
            Instant::now()
        };
        assert_eq!(backend_pid(&mut db).await, pid);
        usable.push(dropped.elapsed());
    }
    usable.sort();
    eprintln!("dropped at birth: usable after {:?} (median of 150), {:?} at most", usable[75], usable[149]);
    assert!(usable[149] < Duration::from_secs(1), "{usable:?}");
}

#[tokio::test]
async fn a_query_dropped_before_postgres_has_seen_it_is_cancelled_too() {
    let database = database();
    let locker = database.admin().await;
    locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    drop_at_birth(&database.url, 1).await;
    drop_at_birth(&database.socket(), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_dropped_before_postgres_has_seen_it_is_cancelled_too_on_two_threads() {
    let database = database();
    let locker = database.admin().await;
    locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    drop_at_birth(&database.url, 3).await;
    drop_at_birth(&database.socket(), 4).await;
}

#[tokio::test]
async fn an_owned_stream_that_is_dropped_stops_and_ends_its_backend() {
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
async fn close_returns_when_the_backend_has_stopped() {
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

/// One connection's share of the drops. `Err` says what went wrong.
struct Dropper {
    db: Connection,
    random: Random,
    /// Streams dropped before their last row.
    in_the_middle: u32,
}

impl Dropper {
    /// Begins a short query and drops it somewhere: before it is prepared, while it runs, at its end.
    async fn drop_one(&mut self) -> Result<(), String> {
        let random = &mut self.random;
        let limit = i32::try_from(random.below(3_000)).unwrap();
        let (to_read, spins, unborn) = (random.below(1_500), random.below(2_000), random.below(5) == 0);
        let (turns, entity) = (random.below(8), if random.below(3) == 0 { "computed" } else { "t" });
        let query = self.db.query::<Doc>(entity).where_sql("(data->>'id')::int < $1", &[&limit]);
        if unborn {
            // Polled for a while, then dropped.
            let patience = Duration::from_micros(spins);
            let begun = tokio::time::timeout(patience, query.stream()).await;
            self.in_the_middle += u32::from(begun.is_err());
            return begun.map_or(Ok(()), |begun| begun.map(drop).map_err(|error| error.to_string()));
        }
        let mut stream = query.stream().await.map_err(|error| format!("begin: {error}"))?;
        for expected in 0..to_read.min(limit.unsigned_abs().into()) {
            match within(SOON, stream.next()).await {
                Some(Ok(row)) if row.id == expected => {}
                other => return Err(format!("row {expected} of {limit}: {other:?}")),
            }
        }
        yields(turns).await;
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(spins / 4) {
            std::hint::spin_loop();
        }
        self.in_the_middle += u32::from(!stream.observer().is_ended());
        Ok(())
    }

    /// The query that follows at once. One in four takes a while, so that a late cancel would find it.
    async fn ask_another(&mut self) -> Result<(), String> {
        let from = self.random.below(2_900);
        let low = i32::try_from(from).unwrap();
        let kind = self.random.below(4);
        let right = match kind {
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
                let answer = client.query_one("SELECT $1::int4 + 1, pg_sleep(0.001)::text", &[&low]).await;
                let answer = answer.map_err(|error| format!("next by the client: {error:?}"))?;
                Ok(answer.get::<_, i32>(0) == low + 1)
            }
        };
        match right {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("next of kind {kind}: wrong rows")),
            Err(error) => Err(format!("next of kind {kind}: {error}")),
        }
    }
}

async fn drop_many(builder: Builder, seed: u64, drops: u32) -> (u32, Vec<String>) {
    let db = within(SOON, builder.connect()).await.unwrap();
    let mut dropper = Dropper { db, random: Random(seed), in_the_middle: 0 };
    let mut wrong = Vec::new();
    for drop in 0..drops {
        for outcome in [dropper.drop_one().await, dropper.ask_another().await] {
            wrong.extend(outcome.err().map(|why| format!("seed {seed}, drop {drop}: {why}")));
        }
    }
    (dropper.in_the_middle, wrong)
}

/// Drops 2,000 streams on connections that keep as many statements.
async fn assert_no_drop_hits_the_query_that_follows(statement_cache: usize) {
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
            let by = if i % 4 == 0 { database.socket() } else { database.url.clone() };
            let builder = Connection::builder(&by).statement_cache(statement_cache);
            tokio::spawn(drop_many(builder, 1_000 + u64::from(i), DROPS / CONNECTIONS))
        })
        .collect();
    let (mut in_the_middle, mut wrong) = (0, Vec::new());
    for dropper in droppers {
        let (middle, mut failed) = within(Duration::from_secs(120), dropper).await.unwrap();
        in_the_middle += middle;
        wrong.append(&mut failed);
    }
    eprintln!(
        "{DROPS} drops, {in_the_middle} of them in the middle, {statement_cache} statements kept: {} next queries wrong, {:?}",
        wrong.len(),
        start.elapsed()
    );
    assert!(wrong.is_empty(), "{} wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(10)]);
    assert!(in_the_middle > DROPS / 3, "{in_the_middle}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_streams_dropped_at_random_never_hit_the_query_that_follows() {
    assert_no_drop_hits_the_query_that_follows(100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_streams_dropped_at_random_without_a_statement_cache_never_hit_the_query_that_follows() {
    assert_no_drop_hits_the_query_that_follows(0).await;
}

#[tokio::test]
async fn a_cancel_by_someone_else_is_an_error_and_not_a_quiet_end() {
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
    let error = error.expect("somebody cancelled it");
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "57014"));
    assert_eq!(error.stats().unwrap().rows, rows.len() as u64);
    drop(stream);
    assert_eq!(scalar::<i32>(&mut db, "SELECT 41 + 1").await, 42);
}

#[tokio::test]
async fn a_cancel_by_someone_else_before_the_first_row_is_an_error() {
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
async fn a_stream_read_to_its_end_sends_no_cancel() {
    let database = table(10, 0);
    let mut db = database.connect().await;
    for _ in 0..200 {
        let mut stream = db.query::<Doc>("t").stream().await.unwrap();
        assert_eq!(read_all(&mut stream).await.0.len(), 10);
        drop(stream);
        // Long enough for a cancel to find it.
        let slept: String = scalar(&mut db, "SELECT pg_sleep(0.001)::text").await;
        assert_eq!(slept, "");
    }
}

/// A way to the server that is closed for every connection but the first.
async fn one_way(port: u16) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let way = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut server = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    });
    way
}

#[tokio::test]
async fn a_cancel_that_cannot_be_sent_leaves_the_connection_to_the_querys_own_end() {
    let database = Database::with(&format!(
        "CREATE VIEW nap AS SELECT to_jsonb(1) AS data FROM pg_sleep(0.3); {}",
        table_script("t", 10, 0)
    ));
    let port = crate::server::shared().port();
    let way = one_way(port).await;
    let mut db = connect(&database.url.replace(&format!(":{port}/"), &format!(":{way}/"))).await;
    let stream = db.query::<Value>("nap").stream().await.unwrap();
    yields(10).await;
    drop(stream);
    let rows = rows_of(db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
    assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
}
