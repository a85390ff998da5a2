//! No write is lost silently: if a dropped stream aborts a transaction, the next use of the connection reports it.

mod failed;
mod session;

use std::time::Duration;

use fraiseql_stream::Connection;
use futures_util::StreamExt;
use serde_json::Value;

use crate::server::{Doc, Random, SOON, backend_pid, scalar, within};
use session::{EARLY_EXITS, EarlyExit, NEXT_USES, NextUse, Session, assert_aborted, database};

async fn assert_reported_once(exit: EarlyExit) {
    let database = database();
    let mut session = Session::new(&database).await;
    for next in NEXT_USES {
        session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
        session.exit_early(exit).await;
        let error = session.use_for(next).await.expect_err("the transaction is aborted");
        assert_aborted(&error);
        session.assert_aborted_and_reported().await;
    }
    session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
    session.exit_early(exit).await;
    let error = within(SOON, session.db.close()).await.expect_err("the transaction is aborted");
    assert_aborted(&error);
    session.admin.until(session.pid, |now| now.is_none()).await;
}

#[tokio::test]
async fn transaction_aborted_by_take_is_reported_once() {
    assert_reported_once(EarlyExit::Take).await;
}

#[tokio::test]
async fn transaction_aborted_by_a_drop_after_a_row_is_reported_once() {
    assert_reported_once(EarlyExit::Drop).await;
}

#[tokio::test]
async fn transaction_aborted_by_an_early_return_is_reported_once() {
    assert_reported_once(EarlyExit::DecodeError).await;
}

#[tokio::test]
async fn transaction_aborted_by_a_timeout_around_next_is_reported_once() {
    assert_reported_once(EarlyExit::Timeout).await;
}

#[tokio::test]
async fn transaction_aborted_by_a_drop_before_the_first_row_is_reported_once() {
    assert_reported_once(EarlyExit::Silence).await;
}

#[tokio::test]
async fn transaction_aborted_by_a_drop_while_waiting_for_a_lock_is_reported_once() {
    assert_reported_once(EarlyExit::Lock).await;
}

#[tokio::test]
async fn closing_a_stream_reports_that_its_transaction_is_aborted() {
    let database = database();
    let mut session = Session::new(&database).await;
    for entity in ["endless", "silent"] {
        session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
        let stream = session.db.query::<Value>(entity).stream().await.unwrap();
        assert_aborted(&within(SOON, stream.close()).await.unwrap_err());
        session.assert_aborted_and_reported().await;

        session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
        let stream = session.db.into_query::<Value>(entity).stream().await.unwrap();
        let (error, db) = within(SOON, stream.close()).await.unwrap_err().into_parts();
        assert_aborted(&error);
        session.db = db;
        session.assert_aborted_and_reported().await;
    }
}

#[tokio::test]
async fn dropping_a_stream_outside_a_transaction_causes_no_error() {
    let database = database();
    let mut session = Session::new(&database).await;
    for exit in EARLY_EXITS {
        for next in NEXT_USES {
            session.exit_early(exit).await;
            session.use_for(next).await.unwrap_or_else(|error| panic!("{exit:?}, {next:?}: {error}"));
        }
        let stream = session.db.query::<Doc>("endless").stream().await.unwrap();
        within(SOON, stream.close()).await.unwrap_or_else(|error| panic!("{error}"));
    }
    session.exit_early(EarlyExit::Silence).await;
    within(SOON, session.db.close()).await.unwrap();
}

#[tokio::test]
async fn transaction_survives_a_stream_dropped_after_its_result_was_complete() {
    let database = database();
    let mut session = Session::new(&database).await;
    session.use_for(NextUse::Stream).await.unwrap();
    for rows in [0, 1, 10, 11] {
        for next in NEXT_USES {
            session.run("BEGIN; INSERT INTO log VALUES ('kept')").await;
            let mut stream = session.db.query::<Doc>("t").stream().await.unwrap();
            session.admin.until_answered(session.pid, "t").await;
            assert_eq!(within(SOON, (&mut stream).take(rows).count()).await, rows.min(10));
            drop(stream);
            session.use_for(next).await.unwrap_or_else(|error| panic!("{rows}, {next:?}: {error}"));
            session.assert_commits(&["kept"]).await;
        }
    }
}

/// Starts a stream and drops it at a random point. Returns whether its own error was read before.
async fn drop_at_random(db: &mut Connection, random: &mut Random) -> bool {
    let entity = random.one_of(&["endless", "failing", "failing_in_plan"]);
    let (max_limit, max_delay) = (random.one_of(&[10, 3_000, 100_000]), random.one_of(&[3_000, 30_000]));
    let (limit, to_read) = (random.below(max_limit), random.below(3_000));
    let delay = Duration::from_micros(random.below(max_delay));
    let started = tokio::time::timeout(delay, db.query::<Doc>(entity).limit(limit).stream()).await;
    let Ok(started) = started else { return false };
    let mut stream = started.unwrap();
    for _ in 0..to_read.min(limit) {
        match within(SOON, stream.next()).await.unwrap() {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.sqlstate().unwrap().code(), "22012");
                return true;
            }
        }
    }
    for _ in 0..random.below(6) {
        tokio::task::yield_now().await;
    }
    false
}

/// Starts a transaction with an `INSERT` and drops a stream in it. Rolls back if the stream's error or the next use
/// of the connection asks for it, and commits otherwise. Returns whether it committed.
async fn drop_in_transaction(session: &mut Session, random: &mut Random) -> bool {
    session.run("BEGIN; INSERT INTO log VALUES ('x')").await;
    let transaction: i64 = scalar(&mut session.db, "SELECT txid_current()").await;
    let is_error_read = drop_at_random(&mut session.db, random).await;
    // No stream can start in a transaction that is known to be aborted.
    let next = session.use_for(random.one_of(if is_error_read { &NEXT_USES[..2] } else { &NEXT_USES })).await;
    let is_reported = next.inspect_err(assert_aborted).is_err();
    assert!(!(is_error_read && is_reported), "reported twice");
    let commit = !is_error_read && !is_reported;
    session.run(if commit { "COMMIT" } else { "ROLLBACK" }).await;
    let status = session.admin.client.query_one("SELECT txid_status($1)", &[&transaction]).await.unwrap();
    assert_eq!(status.get::<_, &str>(0), if commit { "committed" } else { "aborted" });
    commit
}

/// Fails unless Postgres and the next use of the connection always agree on whether a transaction is aborted.
async fn assert_reports_match_postgres(seed: u64) {
    let database = database();
    let mut session = Session::new(&database).await;
    let mut random = Random(seed);
    let mut committed = 0;
    for _ in 0..300 {
        committed += usize::from(drop_in_transaction(&mut session, &mut random).await);
    }
    eprintln!("300 transactions: {committed} committed");
    assert_eq!(session.log().await.len(), committed);
    assert!((50..250).contains(&committed), "{committed}");
}

#[tokio::test]
async fn transaction_is_reported_as_aborted_if_and_only_if_it_is() {
    assert_reports_match_postgres(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_is_reported_as_aborted_if_and_only_if_it_is_on_two_threads() {
    assert_reports_match_postgres(2).await;
}

#[tokio::test]
async fn rollback_to_a_savepoint_saves_the_transaction() {
    let database = database();
    let mut session = Session::new(&database).await;
    for exit in EARLY_EXITS {
        session.run("BEGIN; INSERT INTO log VALUES ('1 before')").await;
        session.run("SAVEPOINT before_stream; INSERT INTO log VALUES ('2 within')").await;
        session.exit_early(exit).await;
        assert_aborted(&session.use_for(NextUse::Client).await.unwrap_err());
        session.run("ROLLBACK TO before_stream; INSERT INTO log VALUES ('3 after')").await;
        session.use_for(NextUse::Stream).await.unwrap();
        session.assert_commits(&["1 before", "3 after"]).await;
    }
}

#[tokio::test]
async fn drain_keeps_the_transaction_and_returns_the_connection() {
    let database = database();
    let mut session = Session::new(&database).await;
    for (entity, limit) in [("t", 10), ("endless", 50_000), ("odd", 50_000)] {
        session.run("BEGIN; INSERT INTO log VALUES ('kept')").await;
        let mut stream = session.db.query::<Doc>(entity).limit(limit).stream().await.unwrap();
        within(SOON, stream.next()).await.unwrap().unwrap();
        let db: &mut Connection = within(SOON, stream.drain()).await.unwrap();
        assert_eq!(backend_pid(db).await, session.pid);
        session.assert_commits(&["kept"]).await;

        session.run("BEGIN; INSERT INTO log VALUES ('kept')").await;
        let mut stream = session.db.into_query::<Doc>(entity).limit(limit).stream().await.unwrap();
        within(SOON, stream.next()).await.unwrap().unwrap();
        session.db = within(SOON, stream.drain()).await.unwrap();
        assert_eq!(backend_pid(&mut session.db).await, session.pid);
        session.assert_commits(&["kept"]).await;
    }
}

#[tokio::test]
async fn drain_receives_and_counts_all_rows() {
    let database = database();
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("endless").limit(50_000).stream().await.unwrap();
    within(SOON, stream.next()).await.unwrap().unwrap();
    let observer = stream.observer();
    within(SOON, stream.drain()).await.unwrap();
    let stats = observer.stats();
    assert!(observer.is_ended() && stats.bytes > 50_000 * 100, "{stats}");
}

#[tokio::test]
async fn check_after_a_drop_keeps_the_snapshot_and_savepoints_of_the_transaction() {
    let database = database();
    let mut session = Session::new(&database).await;
    session.use_for(NextUse::Stream).await.unwrap();
    session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; INSERT INTO log VALUES ('own')").await;
    session.run("SAVEPOINT mine; DECLARE kept CURSOR FOR SELECT line FROM log").await;
    let transaction: i64 = scalar(&mut session.db, "SELECT txid_current()").await;
    session.admin.client.execute("INSERT INTO log VALUES ('other session')", &[]).await.unwrap();
    for next in NEXT_USES {
        let stream = session.db.query::<Doc>("t").stream().await.unwrap();
        session.admin.until_answered(session.pid, "t").await;
        drop(stream);
        session.use_for(next).await.unwrap();
        assert_eq!(scalar::<i64>(&mut session.db, "SELECT txid_current()").await, transaction);
        assert_eq!(scalar::<i64>(&mut session.db, "SELECT count(*) FROM log").await, 1);
        assert_eq!(session.log().await, ["other session"], "nothing is committed");
    }
    assert_eq!(scalar::<String>(&mut session.db, "FETCH kept").await, "own");
    session.run("RELEASE SAVEPOINT mine").await;
    session.assert_commits(&["other session", "own"]).await;
}
