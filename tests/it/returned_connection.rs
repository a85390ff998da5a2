//! A stream that owns its connection returns it when it cannot start.

use std::error::Error as StdError;

use fraiseql_stream::{Connection, Error, ErrorKind, Query, StreamError};
use serde_json::Value;

use crate::server::{
    Database, Doc, SOON, backend_pid, eventually, ids, rows_of, scalar, table, table_script, within,
};

type Owned = Query<'static, Doc, Connection>;
type Change = fn(Owned) -> Owned;

/// Queries that are rejected in different steps.
const REJECTED: [(&str, Change, ErrorKind); 6] = [
    ("nowhere", |query| query, ErrorKind::Query),
    ("t", |query| query.where_sql("not SQL", &[]), ErrorKind::Query),
    ("number", |query| query, ErrorKind::Statement),
    ("t", |query| query.chunk_size(0), ErrorKind::Config),
    ("t", |query| query.where_sql("id = $1", &[&"not a number"]), ErrorKind::Statement),
    ("", |query| query, ErrorKind::Config),
];

fn database() -> Database {
    Database::with(&format!(
        "CREATE VIEW number AS SELECT 1 AS data; CREATE TABLE log (line text); {}",
        table_script("t", 10, 0)
    ))
}

async fn start_error(db: Connection, entity: &str, change: Change) -> StreamError {
    match within(SOON, change(db.into_query(entity)).stream()).await {
        Ok(_) => panic!("{entity} must be rejected"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn stream_that_cannot_start_returns_the_connection() {
    let database = database();
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    for (entity, change, kind) in REJECTED {
        let error = start_error(db, entity, change).await;
        assert_eq!(error.error().kind(), kind, "{error}");
        let (error, connection) = error.into_parts();
        assert_eq!(error.kind(), kind, "{error}");
        db = connection;
        assert!(!db.is_closed(), "{entity}");
        assert_eq!(backend_pid(&mut db).await, pid);
        let rows = rows_of(db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
        assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn connection_returned_in_a_transaction_can_roll_it_back() {
    let database = database();
    let mut db = database.connect().await;
    within(SOON, db.client())
        .await
        .unwrap()
        .batch_execute("BEGIN; INSERT INTO log VALUES ('x')")
        .await
        .unwrap();
    let (error, mut db) = start_error(db, "nowhere", |query| query).await.into_parts();
    assert_eq!(error.sqlstate().unwrap().code(), "42P01");
    within(SOON, db.client()).await.unwrap().batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(scalar::<i64>(&mut db, "SELECT count(*) FROM log").await, 0);
}

#[tokio::test]
async fn connection_returned_because_it_is_lost_is_closed() {
    let database = database();
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    database.admin().await.run("pg_terminate_backend", pid).await;
    eventually("the connection is lost", || db.is_closed()).await;
    let (error, db) = start_error(db, "t", |query| query).await.into_parts();
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
    assert!(db.is_closed());
}

#[test]
fn stream_started_outside_a_runtime_returns_the_connection() {
    let database = table(3, 0);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let db = runtime.block_on(database.connect());
    let (error, mut db) =
        futures::executor::block_on(db.into_query::<Value>("t").stream()).unwrap_err().into_parts();
    assert_eq!(error.kind(), ErrorKind::Config);
    let rows = runtime.block_on(async { rows_of(db.query::<Doc>("t").stream().await.unwrap()).await });
    assert_eq!(rows.len(), 3);
}

async fn read<E: From<StreamError>>(db: Connection) -> Result<(), E> {
    db.into_query::<Value>("nowhere").stream().await?;
    Ok(())
}

#[tokio::test]
async fn error_of_an_owned_stream_converts_into_errors_without_the_connection() {
    let database = database();
    let error: Error = read(database.connect().await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Query);
    let text = error.to_string();
    let boxed: Box<dyn StdError> = read(database.connect().await).await.unwrap_err();
    assert_eq!(boxed.to_string(), text);
    let shared: Box<dyn StdError + Send + Sync> = read(database.connect().await).await.unwrap_err();
    assert_eq!(shared.to_string(), text);
    assert!(shared.source().is_none() && error.get_ref().is_some(), "the text is complete");
}
