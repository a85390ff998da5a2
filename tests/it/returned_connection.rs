//! A stream that owns its connection gives it back when it cannot begin.

use std::error::Error as StdError;

use fraiseql_stream::{Connection, Error, ErrorKind, Query, StreamError};
use serde_json::Value;

use crate::server::{
    Database, Doc, SOON, backend_pid, eventually, ids, rows_of, scalar, table, table_script, within,
};

type Owned = Query<'static, Doc, Connection>;
type Change = fn(Owned) -> Owned;

/// Queries that are refused at one point or another.
const REFUSED: [(&str, Change, ErrorKind); 6] = [
    ("nowhere", |query| query, ErrorKind::Query),
    ("t", |query| query.where_sql("no SQL", &[]), ErrorKind::Query),
    ("number", |query| query, ErrorKind::Config),
    ("t", |query| query.chunk_size(0), ErrorKind::Config),
    ("t", |query| query.where_sql("id = $1", &[&"no number"]), ErrorKind::Config),
    ("", |query| query, ErrorKind::Config),
];

fn database() -> Database {
    Database::with(&format!(
        "CREATE VIEW number AS SELECT 1 AS data; CREATE TABLE log (line text); {}",
        table_script("t", 10, 0)
    ))
}

async fn refused(db: Connection, entity: &str, change: Change) -> StreamError {
    match within(SOON, change(db.into_query(entity)).stream()).await {
        Ok(_) => panic!("{entity} is streamed"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_stream_that_cannot_begin_gives_the_connection_back() {
    let database = database();
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    for (entity, change, kind) in REFUSED {
        let error = refused(db, entity, change).await;
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
async fn a_connection_given_back_in_a_transaction_can_roll_it_back() {
    let database = database();
    let mut db = database.connect().await;
    within(SOON, db.client())
        .await
        .unwrap()
        .batch_execute("BEGIN; INSERT INTO log VALUES ('x')")
        .await
        .unwrap();
    let (error, mut db) = refused(db, "nowhere", |query| query).await.into_parts();
    assert_eq!(error.sqlstate().unwrap().code(), "42P01");
    within(SOON, db.client()).await.unwrap().batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(scalar::<i64>(&mut db, "SELECT count(*) FROM log").await, 0);
}

#[tokio::test]
async fn a_connection_given_back_because_it_is_lost_is_closed() {
    let database = database();
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    database.admin().await.run("pg_terminate_backend", pid).await;
    eventually("the connection is lost", || db.is_closed()).await;
    let (error, db) = refused(db, "t", |query| query).await.into_parts();
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
    assert!(db.is_closed());
}

#[test]
fn a_stream_begun_outside_of_a_runtime_gives_the_connection_back() {
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
async fn the_error_of_an_owned_stream_converts_where_the_connection_is_not_needed() {
    let database = database();
    let error: Error = read(database.connect().await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Query);
    let text = error.to_string();
    let boxed: Box<dyn StdError> = read(database.connect().await).await.unwrap_err();
    assert_eq!(boxed.to_string(), text);
    let shared: Box<dyn StdError + Send + Sync> = read(database.connect().await).await.unwrap_err();
    assert_eq!(shared.to_string(), text);
    assert_eq!(shared.source().unwrap().to_string(), error.source().unwrap().to_string());
}
