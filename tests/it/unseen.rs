//! A transaction that a query has aborted whose error nobody was given is reported by the next use.

use std::time::Duration;

use fraiseql_stream::{Connection, ErrorKind};
use futures_util::FutureExt;
use serde_json::Value;

use crate::server::{Database, SOON, rows_of, within};

const SCRIPT: &str =
    "CREATE VIEW ids AS SELECT jsonb_build_object('id', i) AS data FROM generate_series(0, 9) i;
    CREATE VIEW fails AS SELECT jsonb_build_object('id', 1 / i) AS data FROM generate_series(0, 9) i;";

/// The statement fails as it is prepared, as its values are bound, or with its first row.
#[derive(Clone, Copy, Debug)]
enum Fails {
    Prepare,
    Bind,
    Row,
}

/// Begins a query that fails, and leaves it after a while; whether that is without its error.
async fn leave(db: &mut Connection, fails: Fails, after: Duration) -> bool {
    let query = match fails {
        Fails::Prepare => db.query::<Value>("no_such_table"),
        Fails::Bind => db.query("ids").where_sql("(data->>'id')::int = $1::text::int", &[&"no number"]),
        Fails::Row => db.query("fails"),
    };
    let mut stream = Box::pin(query.stream());
    let begun = match fails {
        // Polled once, and left before it is there.
        Fails::Prepare => (&mut stream).now_or_never(),
        Fails::Bind | Fails::Row => Some(within(SOON, &mut stream).await),
    };
    // The thread is kept, so that the answer may come before the query knows that it is left.
    std::thread::sleep(after);
    begun.is_none_or(|stream| stream.is_ok())
}

/// The next use of a connection whose query was left in a transaction.
async fn next_use(db: &mut Connection, fails: Fails, after: Duration) -> (bool, Result<(), ErrorKind>) {
    db.client().await.unwrap().batch_execute("BEGIN").await.unwrap();
    // The first stream after `client` waits for a round trip before it sends anything.
    rows_of(db.query::<Value>("ids").stream().await.unwrap()).await;
    let is_unseen = leave(db, fails, after).await;
    let next = within(SOON, db.client()).await.map(drop).map_err(|error| error.kind());
    within(SOON, db.client()).await.unwrap().batch_execute("ROLLBACK").await.unwrap();
    (is_unseen, next)
}

async fn assert_reported_once(fails: Fails) {
    let database = Database::with(SCRIPT);
    let mut unseen = 0;
    for ms in 0..15 {
        let mut db = database.connect().await;
        let (is_unseen, next) = next_use(&mut db, fails, Duration::from_millis(ms)).await;
        let expected = if is_unseen { Err(ErrorKind::TransactionAborted) } else { Ok(()) };
        assert_eq!(next, expected, "{fails:?}, left after {ms} ms");
        unseen += u32::from(is_unseen);
    }
    assert!(unseen >= 5, "hardly ever left in time: {unseen}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_aborted_by_a_statement_that_is_refused_unseen_is_reported_once() {
    assert_reported_once(Fails::Prepare).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_aborted_by_a_value_that_is_refused_unseen_is_reported_once() {
    assert_reported_once(Fails::Bind).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_aborted_by_a_row_that_fails_unseen_is_reported_once() {
    assert_reported_once(Fails::Row).await;
}

#[tokio::test]
async fn an_error_that_was_returned_is_not_reported_again() {
    let database = Database::with(SCRIPT);
    let mut db = database.connect().await;
    db.client().await.unwrap().batch_execute("BEGIN").await.unwrap();
    let error = within(SOON, db.query::<Value>("no_such_table").stream()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Query);
    let client = within(SOON, db.client()).await.unwrap();
    client.batch_execute("ROLLBACK").await.unwrap();
}
