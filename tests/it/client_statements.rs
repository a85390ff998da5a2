//! Statements sent with the client belong to the caller: the cancel of a stream never hits them, and transactions
//! can be started there.

use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::Bytes;
use fraiseql_stream::tokio_postgres::RowStream;
use fraiseql_stream::{Connection, ErrorKind};
use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::time::timeout;

use crate::server::{
    Database, Doc, ENDLESS, Random, SILENT, SOON, assert_consecutive, ids, rows_of, scalar, table_script,
    within,
};

fn database() -> Database {
    Database::with(&format!(
        "{ENDLESS} {SILENT} {}
         CREATE TABLE log (line int);
         CREATE FUNCTION note(line int) RETURNS int AS $$ INSERT INTO log SELECT line FROM pg_sleep(0.01) RETURNING line $$ LANGUAGE SQL;
         CREATE VIEW lines AS SELECT jsonb_build_object('id', count(*)) AS data FROM log;",
        table_script("t", 10, 0)
    ))
}

/// The entities of streams that are started while a client statement runs, and when they are dropped, in milliseconds.
const ENTITIES: [&str; 4] = ["t", "endless", "silent", "nowhere"];
const DELAYS: [u64; 6] = [0, 1, 2, 5, 12, 25];

async fn run(db: &mut Connection, script: &str) {
    within(SOON, within(SOON, db.client()).await.unwrap().batch_execute(script)).await.unwrap();
}

/// Returns the number of lines in the log, as a stream sees it.
async fn lines(db: &mut Connection) -> u64 {
    let stream = within(SOON, db.query::<Doc>("lines").stream()).await.unwrap();
    ids(&rows_of(stream).await)[0]
}

/// Starts a stream, and drops it or the future that waits for it. Returns whether it had started.
async fn start_and_drop(db: &mut Connection, entity: &str, delay: Duration) -> bool {
    timeout(delay, db.query::<Value>(entity).stream()).await.is_ok()
}

/// Starts a statement that inserts 20 lines, takes 10 ms for each, and sends a row for each at once.
async fn insert_slowly(db: &mut Connection) -> Pin<Box<RowStream>> {
    let text = "SELECT note(i), repeat('x', 9000) FROM generate_series(1, 20) i";
    let client = within(SOON, db.client()).await.unwrap();
    Box::pin(within(SOON, client.query_raw(text, [0_i32; 0])).await.unwrap())
}

#[tokio::test]
async fn running_copy_survives_streams_dropped_meanwhile() {
    let database = database();
    let mut db = database.connect().await;
    for entity in ENTITIES {
        run(&mut db, "TRUNCATE log").await;
        let client = within(SOON, db.client()).await.unwrap();
        let mut sink = pin!(within(SOON, client.copy_in("COPY log FROM STDIN")).await.unwrap());
        for delay in DELAYS {
            within(SOON, sink.send(Bytes::from("1\n"))).await.unwrap();
            let has_started = start_and_drop(&mut db, entity, Duration::from_millis(delay)).await;
            assert!(!has_started, "{entity} must wait for the COPY");
        }
        assert_eq!(within(SOON, sink.finish()).await.unwrap(), 6);
        assert_eq!(lines(&mut db).await, 6, "{entity}");
    }
}

#[tokio::test]
async fn statement_with_unread_rows_survives_streams_dropped_meanwhile() {
    let database = database();
    let mut db = database.connect().await;
    for entity in ENTITIES {
        run(&mut db, "TRUNCATE log").await;
        let inserted = insert_slowly(&mut db).await;
        for delay in DELAYS {
            let has_started = start_and_drop(&mut db, entity, Duration::from_millis(delay)).await;
            assert!(!has_started, "{entity} must wait for the statement");
        }
        let inserted: Vec<_> = within(SOON, inserted.collect()).await;
        assert_eq!(inserted.iter().filter(|row| row.is_ok()).count(), 20, "{entity}: {:?}", inserted.last());
        assert_eq!(lines(&mut db).await, 20, "{entity}");
    }
}

/// Starts an `INSERT` of a line that takes `takes` milliseconds, and drops its `execute` after `delay`.
async fn execute_and_drop(db: &mut Connection, takes: u64, delay: Duration) {
    let client = within(SOON, db.client()).await.unwrap();
    let text = format!("INSERT INTO log SELECT 1 FROM pg_sleep({takes} / 1000.0)");
    let statement = within(SOON, client.prepare(&text)).await.unwrap();
    // The first poll sends the statement.
    let mut execute = pin!(client.execute(&statement, &[]));
    if futures::poll!(&mut execute).is_pending() {
        let _ = timeout(delay, execute).await;
    }
}

async fn assert_every_insert_survives(seed: u64) {
    let database = database();
    let mut db = database.connect().await;
    let mut random = Random(seed);
    let mut started = 0;
    for _ in 0..100 {
        let takes = random.below(15);
        execute_and_drop(&mut db, takes, Duration::from_micros(random.below(5_000))).await;
        let delay = Duration::from_micros(random.below(1_500 * takes + 2_000));
        started += usize::from(start_and_drop(&mut db, random.one_of(&ENTITIES), delay).await);
    }
    eprintln!("100 streams requested while an INSERT runs: {started} had started before they were dropped");
    assert_eq!(lines(&mut db).await, 100);
    assert!((5..95).contains(&started), "{started}");
}

#[tokio::test]
async fn insert_with_a_dropped_execute_survives_a_dropped_stream() {
    assert_every_insert_survives(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn insert_with_a_dropped_execute_survives_a_dropped_stream_on_two_threads() {
    assert_every_insert_survives(2).await;
}

#[tokio::test]
async fn stream_started_while_a_client_statement_runs_waits_for_it_and_then_works() {
    let database = database();
    let mut db = database.connect().await;
    for round in 1..=3 {
        execute_and_drop(&mut db, 100, Duration::from_millis(5)).await;
        assert_eq!(lines(&mut db).await, round * 41 - 40, "the INSERT has finished");

        drop(insert_slowly(&mut db).await);
        assert_eq!(
            lines(&mut db).await,
            round * 41 - 20,
            "the statement has finished although its rows are not read"
        );

        let inserted = insert_slowly(&mut db).await;
        let both = async { tokio::join!(inserted.collect::<Vec<_>>(), lines(&mut db)) };
        let (inserted, lines) = within(SOON, both).await;
        assert_eq!((inserted.len(), lines), (20, round * 41));
    }
    let rows = rows_of(db.query::<Doc>("endless").limit(50_000).stream().await.unwrap()).await;
    assert_eq!(rows.len(), 50_000);
    assert_consecutive(&rows);
}

#[tokio::test]
async fn client_transactions_commit_and_roll_back() {
    let database = database();
    let mut db = database.connect().await;
    for _ in 0..3 {
        let transaction = within(SOON, db.client_mut()).await.unwrap().transaction().await.unwrap();
        assert_eq!(transaction.execute("INSERT INTO log VALUES (1)", &[]).await.unwrap(), 1);
        transaction.commit().await.unwrap();

        let transaction = within(SOON, db.client_mut()).await.unwrap().transaction().await.unwrap();
        assert_eq!(transaction.execute("INSERT INTO log VALUES (2)", &[]).await.unwrap(), 1);
        transaction.rollback().await.unwrap();

        let mut transaction = within(SOON, db.client_mut()).await.unwrap().transaction().await.unwrap();
        let savepoint = transaction.transaction().await.unwrap();
        assert_eq!(savepoint.execute("INSERT INTO log VALUES (3)", &[]).await.unwrap(), 1);
        savepoint.commit().await.unwrap();
        // The drop sends a rollback, ahead of the stream.
        drop(transaction);
        let stream = within(SOON, db.query::<Doc>("t").order_by("id").stream()).await.unwrap();
        assert_eq!(ids(&rows_of(stream).await), (0..10).collect::<Vec<_>>());
    }
    assert_eq!(lines(&mut db).await, 3);
    assert_eq!(scalar::<i32>(&mut db, "SELECT max(line) FROM log").await, 1);
}

/// Starts transactions right after streams that were dropped, read to the end, or rejected.
async fn start_transactions_after_streams(connection: &str, seed: u64) {
    let mut db = crate::server::connect(connection).await;
    let mut random = Random(seed);
    for round in 0..200 {
        let entity = random.one_of(&["t", "endless", "silent", "nowhere"]);
        let delay = Duration::from_micros(random.below(2_500));
        match timeout(delay, db.query::<Value>(entity).stream()).await {
            Ok(Err(error)) => assert_eq!(error.kind(), ErrorKind::Query),
            Ok(Ok(mut stream)) if entity != "silent" => {
                for _ in 0..random.below(20) {
                    within(SOON, stream.next()).await.transpose().unwrap();
                }
            }
            Ok(Ok(_)) | Err(_) => {}
        }
        let client = within(SOON, db.client_mut()).await.unwrap_or_else(|error| panic!("{round}: {error}"));
        let transaction = within(SOON, client.transaction()).await.unwrap();
        transaction.execute("INSERT INTO log VALUES (1)", &[]).await.unwrap();
        within(SOON, transaction.commit()).await.unwrap();
    }
    assert_eq!(lines(&mut db).await, 200);
}

#[tokio::test]
async fn client_transaction_can_start_right_after_a_dropped_stream() {
    start_transactions_after_streams(&database().url, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_transaction_can_start_right_after_a_dropped_stream_on_two_threads() {
    start_transactions_after_streams(&database().socket(), 2).await;
}
