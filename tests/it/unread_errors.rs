//! If a query aborts a transaction and its error never reaches the caller, the next use of the connection reports it.

use std::time::Duration;

use fraiseql_stream::{Connection, ErrorKind};
use futures_util::FutureExt;
use serde_json::Value;

use crate::server::{Database, SOON, rows_of, within};

const SCRIPT: &str =
    "CREATE VIEW ids AS SELECT jsonb_build_object('id', i) AS data FROM generate_series(0, 9) i;
    CREATE VIEW fails AS SELECT jsonb_build_object('id', 1 / i) AS data FROM generate_series(0, 9) i;";

/// The step in which a query fails: while it is prepared, while its values are bound, or with its first row.
#[derive(Clone, Copy, Debug)]
enum FailsAt {
    Prepare,
    Bind,
    Row,
}

/// Starts a query that fails and drops it after a while. Returns whether its error is still unread.
async fn start_and_drop(db: &mut Connection, fails_at: FailsAt, delay: Duration) -> bool {
    let query = match fails_at {
        FailsAt::Prepare => db.query::<Value>("no_such_table"),
        FailsAt::Bind => db.query("ids").where_sql("(data->>'id')::int = $1::text::int", &[&"not a number"]),
        FailsAt::Row => db.query("fails"),
    };
    let mut stream = Box::pin(query.stream());
    let started = match fails_at {
        // Polled once and dropped before it returns.
        FailsAt::Prepare => (&mut stream).now_or_never(),
        FailsAt::Bind | FailsAt::Row => Some(within(SOON, &mut stream).await),
    };
    // Blocks the thread, so that the answer can arrive before the query notices that it was dropped.
    std::thread::sleep(delay);
    started.is_none_or(|stream| stream.is_ok())
}

/// Drops a failing query in a transaction. Returns whether its error is unread, and the outcome of the next use.
async fn next_use(db: &mut Connection, fails_at: FailsAt, delay: Duration) -> (bool, Result<(), ErrorKind>) {
    db.client().await.unwrap().batch_execute("BEGIN").await.unwrap();
    // The first stream after `client` waits for a round trip before it sends anything.
    rows_of(db.query::<Value>("ids").stream().await.unwrap()).await;
    let is_unread = start_and_drop(db, fails_at, delay).await;
    let next = within(SOON, db.client()).await.map(drop).map_err(|error| error.kind());
    within(SOON, db.client()).await.unwrap().batch_execute("ROLLBACK").await.unwrap();
    (is_unread, next)
}

async fn assert_reported_once(fails_at: FailsAt) {
    let database = Database::with(SCRIPT);
    let mut unread = 0;
    for ms in 0..15 {
        let mut db = database.connect().await;
        let (is_unread, next) = next_use(&mut db, fails_at, Duration::from_millis(ms)).await;
        let expected = if is_unread { Err(ErrorKind::TransactionAborted) } else { Ok(()) };
        assert_eq!(next, expected, "{fails_at:?}, dropped after {ms} ms");
        unread += u32::from(is_unread);
    }
    assert!(unread >= 5, "too few queries were dropped in time: {unread}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_aborted_by_an_unread_prepare_error_is_reported_once() {
    assert_reported_once(FailsAt::Prepare).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_aborted_by_an_unread_bind_error_is_reported_once() {
    assert_reported_once(FailsAt::Bind).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_aborted_by_an_unread_row_error_is_reported_once() {
    assert_reported_once(FailsAt::Row).await;
}

#[tokio::test]
async fn returned_error_is_not_reported_again() {
    let database = Database::with(SCRIPT);
    let mut db = database.connect().await;
    db.client().await.unwrap().batch_execute("BEGIN").await.unwrap();
    let error = within(SOON, db.query::<Value>("no_such_table").stream()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Query);
    let client = within(SOON, db.client()).await.unwrap();
    client.batch_execute("ROLLBACK").await.unwrap();
}
