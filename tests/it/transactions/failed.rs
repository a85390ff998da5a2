//! Streams that fail in a transaction: the next use reports it as aborted unless the error was already returned.

use std::time::Duration;

use fraiseql_stream::ErrorKind;
use futures_util::StreamExt;
use serde_json::Value;

use super::session::{NextUse, Session, assert_aborted, database};
use crate::server::{Doc, SOON, read_all, within};

#[tokio::test]
async fn drain_returns_the_error_of_the_stream_and_reports_it_once() {
    let database = database();
    let mut session = Session::new(&database).await;
    session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
    let stream = session.db.query::<Doc>("broken").stream().await.unwrap();
    let error = within(SOON, stream.drain()).await.unwrap_err();
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "22012"));
    session.assert_aborted_and_reported().await;

    session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
    let stream = session.db.into_query::<Doc>("broken").stream().await.unwrap();
    let (error, db) = within(SOON, stream.drain()).await.unwrap_err().into_parts();
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "22012"));
    session.db = db;
    session.assert_aborted_and_reported().await;
}

#[tokio::test]
async fn error_that_was_read_is_not_reported_again() {
    let database = database();
    let mut session = Session::new(&database).await;
    for entity in ["broken", "failing_at_once", "failing_in_plan"] {
        session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
        let mut stream = session.db.query::<Value>(entity).stream().await.unwrap();
        let (_, error) = read_all(&mut stream).await;
        assert_eq!(error.unwrap().sqlstate().unwrap().code(), "22012");
        drop(stream);
        session.assert_aborted_and_reported().await;
    }
    session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
    let error = session.db.query::<Value>("nowhere").stream().await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "42P01");
    session.assert_aborted_and_reported().await;
}

/// Lets a stream fail after `rows` rows and drops it `delay` later, without reading its error.
async fn fail_unread(session: &mut Session, entity: &str, (rows, delay): (usize, Duration)) {
    let mut stream = session.db.query::<Value>(entity).stream().await.unwrap();
    for _ in 0..rows {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    session.admin.until_idle(session.pid).await;
    tokio::time::sleep(delay).await;
}

#[tokio::test]
async fn unread_error_of_a_dropped_stream_is_reported_once() {
    let database = database();
    let mut session = Session::new(&database).await;
    for (entity, rows) in [("broken", 10), ("broken", 50), ("failing_at_once", 0), ("failing_in_plan", 0)] {
        // Before and after a task takes over reading the rows.
        for delay in [0, 2, 5, 30].map(Duration::from_millis) {
            session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
            fail_unread(&mut session, entity, (rows, delay)).await;
            let next = session.use_for(NextUse::Client).await;
            assert_aborted(&next.expect_err(&format!("{entity}, dropped after {rows} rows and {delay:?}")));
            session.assert_aborted_and_reported().await;
        }
    }
}

#[tokio::test]
async fn unread_prepare_error_is_reported_once() {
    let database = database();
    let mut session = Session::new(&database).await;
    let observer = database.admin().await;
    for _ in 0..10 {
        database.psql("CREATE TABLE brief (data jsonb)");
        session.admin.client.batch_execute("BEGIN; DROP TABLE brief").await.unwrap();
        session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
        let mut stream = Box::pin(session.db.query::<Value>("brief").stream());
        tokio::select! {
            _ = &mut stream => panic!("the table is locked"),
            () = observer.until_waits_for(session.pid, "Lock") => {}
        }
        session.admin.client.batch_execute("COMMIT").await.unwrap();
        observer.until_idle(session.pid).await;
        // The error has arrived when the future that waits for it is dropped.
        drop(stream);
        assert_aborted(&session.use_for(NextUse::Client).await.expect_err("the transaction is aborted"));
        session.assert_aborted_and_reported().await;
    }
}
