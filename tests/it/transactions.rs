//! Nobody's writes are lost: a transaction that a dropped stream has aborted is reported by the next use.

mod failed;
mod session;

use std::time::Duration;

use fraiseql_stream::Connection;
use futures_util::StreamExt;
use serde_json::Value;

use crate::server::{Doc, Random, SOON, backend_pid, scalar, within};
use session::{Session, USES, Use, WAYS, Way, assert_aborted, database};

async fn assert_reported_once(way: Way) {
    let database = database();
    let mut session = Session::new(&database).await;
    for next in USES {
        session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
        session.leave(way).await;
        let error = session.use_for(next).await.expect_err("the transaction is aborted");
        assert_aborted(&error);
        session.assert_aborted_and_reported().await;
    }
    session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
    session.leave(way).await;
    let error = within(SOON, session.db.close()).await.expect_err("the transaction is aborted");
    assert_aborted(&error);
    session.admin.until(session.pid, |now| now.is_none()).await;
}

#[tokio::test]
async fn a_transaction_aborted_by_take_is_reported_once() {
    assert_reported_once(Way::Take).await;
}

#[tokio::test]
async fn a_transaction_aborted_by_a_drop_after_a_row_is_reported_once() {
    assert_reported_once(Way::Drop).await;
}

#[tokio::test]
async fn a_transaction_aborted_by_an_early_return_is_reported_once() {
    assert_reported_once(Way::DecodeError).await;
}

#[tokio::test]
async fn a_transaction_aborted_by_a_timeout_around_next_is_reported_once() {
    assert_reported_once(Way::Timeout).await;
}

#[tokio::test]
async fn a_transaction_aborted_by_a_drop_in_a_silence_is_reported_once() {
    assert_reported_once(Way::Silence).await;
}

#[tokio::test]
async fn a_transaction_aborted_by_a_drop_of_a_stream_that_waits_for_a_lock_is_reported_once() {
    assert_reported_once(Way::Lock).await;
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
async fn a_stream_dropped_outside_of_a_transaction_is_followed_by_no_error() {
    let database = database();
    let mut session = Session::new(&database).await;
    for way in WAYS {
        for next in USES {
            session.leave(way).await;
            session.use_for(next).await.unwrap_or_else(|error| panic!("{way:?}, {next:?}: {error}"));
        }
        let stream = session.db.query::<Doc>("endless").stream().await.unwrap();
        within(SOON, stream.close()).await.unwrap_or_else(|error| panic!("{error}"));
    }
    session.leave(Way::Silence).await;
    within(SOON, session.db.close()).await.unwrap();
}

#[tokio::test]
async fn a_transaction_outlives_a_stream_whose_result_was_complete_before_it_was_dropped() {
    let database = database();
    let mut session = Session::new(&database).await;
    session.use_for(Use::Stream).await.unwrap();
    for rows in [0, 1, 10, 11] {
        for next in USES {
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

/// Begins a stream and drops it at random. Returns whether its own error was seen before.
async fn drop_at_random(db: &mut Connection, random: &mut Random) -> bool {
    let entity = random.one_of(&["endless", "failing", "failing_in_plan"]);
    let (most, patience) = (random.one_of(&[10, 3_000, 100_000]), random.one_of(&[3_000, 30_000]));
    let (limit, to_read) = (random.below(most), random.below(3_000));
    let patience = Duration::from_micros(random.below(patience));
    let begun = tokio::time::timeout(patience, db.query::<Doc>(entity).limit(limit).stream()).await;
    let Ok(begun) = begun else { return false };
    let mut stream = begun.unwrap();
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

/// Begins a transaction with an `INSERT`, drops a stream in it, and ends the transaction as the next use of the
/// connection, or the stream's error, asks for. Returns whether it is kept.
async fn drop_in_transaction(session: &mut Session, random: &mut Random) -> bool {
    session.run("BEGIN; INSERT INTO log VALUES ('x')").await;
    let transaction: i64 = scalar(&mut session.db, "SELECT txid_current()").await;
    let is_known = drop_at_random(&mut session.db, random).await;
    // No stream begins in a transaction that is known to be aborted.
    let next = session.use_for(random.one_of(if is_known { &USES[..2] } else { &USES })).await;
    let is_reported = next.inspect_err(assert_aborted).is_err();
    assert!(!(is_known && is_reported), "reported twice");
    let keep = !is_known && !is_reported;
    session.run(if keep { "COMMIT" } else { "ROLLBACK" }).await;
    let status = session.admin.client.query_one("SELECT txid_status($1)", &[&transaction]).await.unwrap();
    assert_eq!(status.get::<_, &str>(0), if keep { "committed" } else { "aborted" });
    keep
}

/// Whatever became of a stream, Postgres and the next use agree on what became of the transaction.
async fn assert_agreed(seed: u64) {
    let database = database();
    let mut session = Session::new(&database).await;
    let mut random = Random(seed);
    let mut kept = 0;
    for _ in 0..300 {
        kept += usize::from(drop_in_transaction(&mut session, &mut random).await);
    }
    eprintln!("300 transactions: {kept} kept");
    assert_eq!(session.log().await.len(), kept);
    assert!((50..250).contains(&kept), "{kept}");
}

#[tokio::test]
async fn a_transaction_is_reported_aborted_if_and_only_if_it_is() {
    assert_agreed(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_is_reported_aborted_if_and_only_if_it_is_on_two_threads() {
    assert_agreed(2).await;
}

#[tokio::test]
async fn a_savepoint_before_the_stream_saves_the_transaction() {
    let database = database();
    let mut session = Session::new(&database).await;
    for way in WAYS {
        session.run("BEGIN; INSERT INTO log VALUES ('1 before')").await;
        session.run("SAVEPOINT before_stream; INSERT INTO log VALUES ('2 within')").await;
        session.leave(way).await;
        assert_aborted(&session.use_for(Use::Client).await.unwrap_err());
        session.run("ROLLBACK TO before_stream; INSERT INTO log VALUES ('3 after')").await;
        session.use_for(Use::Stream).await.unwrap();
        session.assert_commits(&["1 before", "3 after"]).await;
    }
}

#[tokio::test]
async fn a_drained_stream_keeps_its_transaction_and_returns_the_connection() {
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
async fn a_drained_stream_has_all_its_rows_sent_and_counted() {
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
async fn the_check_after_a_drop_leaves_a_transaction_its_snapshot_and_its_savepoints() {
    let database = database();
    let mut session = Session::new(&database).await;
    session.use_for(Use::Stream).await.unwrap();
    session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; INSERT INTO log VALUES ('own')").await;
    session.run("SAVEPOINT mine; DECLARE kept CURSOR FOR SELECT line FROM log").await;
    let transaction: i64 = scalar(&mut session.db, "SELECT txid_current()").await;
    session.admin.client.execute("INSERT INTO log VALUES ('of another')", &[]).await.unwrap();
    for next in USES {
        let stream = session.db.query::<Doc>("t").stream().await.unwrap();
        session.admin.until_answered(session.pid, "t").await;
        drop(stream);
        session.use_for(next).await.unwrap();
        assert_eq!(scalar::<i64>(&mut session.db, "SELECT txid_current()").await, transaction);
        assert_eq!(scalar::<i64>(&mut session.db, "SELECT count(*) FROM log").await, 1);
        assert_eq!(session.log().await, ["of another"], "nothing is committed");
    }
    assert_eq!(scalar::<String>(&mut session.db, "FETCH kept").await, "own");
    session.run("RELEASE SAVEPOINT mine").await;
    session.assert_commits(&["of another", "own"]).await;
}
