//! Nobody's writes are lost: a transaction that a dropped stream has aborted is reported by the next use.

use std::time::Duration;

use fraiseql_stream::{Connection, Error, ErrorKind, Result};
use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;

use crate::server::{
    Admin, Database, Doc, ENDLESS, Random, SILENT, SOON, backend_of, ids, read_all, rows_of, scalar,
    table_script, within,
};

/// How a stream is left before its end.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// By `take(1)`.
    Take,
    /// Dropped after a row.
    Drop,
    /// By `?` on a row that is not a `Doc`.
    DecodeError,
    /// By a timeout around `next`.
    Timeout,
    /// Dropped while Postgres is silent, without any poll.
    Silence,
    /// By a drop of the future of `stream()`, which waits for a lock.
    Lock,
}

const WAYS: [Way; 6] = [Way::Take, Way::Drop, Way::DecodeError, Way::Timeout, Way::Silence, Way::Lock];

/// What the connection is used for next.
#[derive(Clone, Copy, Debug)]
enum Use {
    Client,
    ClientMut,
    Stream,
}

const USES: [Use; 3] = [Use::Client, Use::ClientMut, Use::Stream];

fn database() -> Database {
    Database::with(&format!(
        "{ENDLESS} {SILENT} {} {}
         CREATE TABLE log (line text);
         CREATE VIEW odd AS SELECT CASE i WHEN 3 THEN '\"no document\"'::jsonb ELSE jsonb_build_object('id', i) END AS data
             FROM generate_series(0, 999999) i;
         CREATE VIEW broken AS SELECT jsonb_build_object('id', i, 'part', 1 / (50 - i)) AS data FROM generate_series(0, 99) i;
         CREATE VIEW failing AS SELECT jsonb_build_object('id', i, 'part', 1 / (1000 - i)) AS data FROM generate_series(0, 99999) i;
         CREATE VIEW failing_in_plan AS SELECT to_jsonb(1 / 0) AS data;
         CREATE VIEW failing_at_once AS SELECT to_jsonb(1 / (i - 1)) AS data FROM generate_series(1, 1) i;",
        table_script("t", 10, 0),
        table_script("locked", 1, 0)
    ))
}

/// A connection, and whoever looks at it from outside.
struct Session {
    db: Connection,
    pid: i32,
    admin: Admin,
    /// Keeps a lock on `locked`.
    _locker: Admin,
}

impl Session {
    async fn new(database: &Database) -> Self {
        let (admin, locker) = (database.admin().await, database.admin().await);
        locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
        let mut db = database.connect().await;
        let pid = backend_of(&mut db).await;
        Self { db, pid, admin, _locker: locker }
    }

    async fn run(&mut self, script: &str) {
        let client = within(SOON, self.db.client()).await.unwrap();
        within(SOON, client.batch_execute(script)).await.unwrap();
    }

    /// Begins a stream and leaves it early.
    async fn leave(&mut self, way: Way) {
        match way {
            Way::Take => {
                let stream = self.db.query::<Doc>("endless").stream().await.unwrap();
                assert_eq!(within(SOON, stream.take(1).count()).await, 1);
            }
            Way::Drop => {
                let mut stream = self.db.query::<Doc>("endless").stream().await.unwrap();
                within(SOON, stream.next()).await.unwrap().unwrap();
            }
            Way::DecodeError => {
                let error = within(SOON, read_odd(&mut self.db)).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Decode { row: 3 });
            }
            Way::Timeout => {
                let mut stream = self.db.query::<Value>("silent").stream().await.unwrap();
                let next = tokio::time::timeout(Duration::from_millis(30), stream.next()).await;
                assert!(next.is_err());
            }
            Way::Silence => {
                let stream = self.db.query::<Value>("silent").stream().await.unwrap();
                self.admin.until_waits_for(self.pid, "Timeout").await;
                drop(stream);
            }
            Way::Lock => tokio::select! {
                _ = self.db.query::<Value>("locked").stream() => panic!("the table is locked"),
                () = self.admin.until_waits_for(self.pid, "Lock") => {}
            },
        }
    }

    async fn use_for(&mut self, next: Use) -> Result<()> {
        match next {
            Use::Client => within(SOON, self.db.client()).await.map(drop),
            Use::ClientMut => within(SOON, self.db.client_mut()).await.map(drop),
            Use::Stream => {
                let stream = within(SOON, self.db.query::<Doc>("t").stream()).await?;
                assert_eq!(rows_of(stream).await.len(), 10);
                Ok(())
            }
        }
    }

    /// The lines of `log` that were committed.
    async fn log(&self) -> Vec<String> {
        let rows = self.admin.client.query("SELECT line FROM log ORDER BY line", &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Fails unless the transaction is aborted, no use of the connection says so again, and `ROLLBACK` ends it.
    async fn assert_aborted_and_reported(&mut self) {
        for _ in 0..2 {
            let client = within(SOON, self.db.client()).await.unwrap();
            let refused = within(SOON, client.batch_execute("SELECT 1")).await.unwrap_err();
            assert_eq!(refused.code().unwrap().code(), "25P02");
        }
        self.run("ROLLBACK").await;
        let rows = rows_of(self.db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
        assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
        assert_eq!(self.log().await, [""; 0], "it was rolled back");
    }

    /// Fails unless the transaction is alive and its `COMMIT` keeps these lines.
    async fn assert_commits(&mut self, lines: &[&str]) {
        self.run("COMMIT").await;
        assert_eq!(self.log().await, lines);
        self.run("TRUNCATE log").await;
    }
}

/// As a service does it, with `?`.
async fn read_odd(db: &mut Connection) -> Result<u64> {
    let mut stream = db.query::<Doc>("odd").stream().await?;
    let mut sum = 0;
    while let Some(doc) = stream.try_next().await? {
        sum += doc.id;
    }
    Ok(sum)
}

fn assert_aborted(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::TransactionAborted, "{error}");
    let text = error.to_string();
    assert!(text.contains("transaction is aborted") && text.contains("run ROLLBACK"), "{text}");
}

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
    for rows in [0, 1, 10, 11] {
        for next in USES {
            session.run("BEGIN; INSERT INTO log VALUES ('kept')").await;
            let mut stream = session.db.query::<Doc>("t").stream().await.unwrap();
            session.admin.until_idle(session.pid).await;
            let taken = within(SOON, stream.by_ref().take(rows).count()).await;
            assert_eq!(taken, rows.min(10));
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
        assert_eq!(backend_of(db).await, session.pid);
        session.assert_commits(&["kept"]).await;

        session.run("BEGIN; INSERT INTO log VALUES ('kept')").await;
        let mut stream = session.db.into_query::<Doc>(entity).limit(limit).stream().await.unwrap();
        within(SOON, stream.next()).await.unwrap().unwrap();
        session.db = within(SOON, stream.drain()).await.unwrap();
        assert_eq!(backend_of(&mut session.db).await, session.pid);
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
async fn a_drained_stream_that_fails_returns_its_error_and_reports_it_once() {
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
async fn a_stream_that_failed_and_whose_error_was_read_is_not_reported_again() {
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

/// Lets a stream fail whose error nobody reads: it is dropped `after` that, unless it was dropped before.
async fn fail_unread(session: &mut Session, entity: &str, (rows, after): (usize, Duration)) {
    let mut stream = session.db.query::<Value>(entity).stream().await.unwrap();
    for _ in 0..rows {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    session.admin.until_idle(session.pid).await;
    tokio::time::sleep(after).await;
}

#[tokio::test]
async fn a_stream_that_failed_and_was_dropped_before_its_error_was_read_is_reported_once() {
    let database = database();
    let mut session = Session::new(&database).await;
    for (entity, rows) in [("broken", 10), ("broken", 50), ("failing_at_once", 0), ("failing_in_plan", 0)] {
        // Before a task reads its rows, and after that.
        for after in [0, 2, 5, 30].map(Duration::from_millis) {
            session.run("BEGIN; INSERT INTO log VALUES ('lost')").await;
            fail_unread(&mut session, entity, (rows, after)).await;
            let next = session.use_for(Use::Client).await;
            assert_aborted(&next.expect_err(&format!("{entity} after {rows} rows and {after:?}")));
            session.assert_aborted_and_reported().await;
        }
    }
}

#[tokio::test]
async fn a_refusal_that_nobody_waited_for_is_reported_once() {
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
        // The refusal is here, and the future that waits for it is dropped.
        drop(stream);
        assert_aborted(&session.use_for(Use::Client).await.expect_err("the transaction is aborted"));
        session.assert_aborted_and_reported().await;
    }
}

#[tokio::test]
async fn the_check_after_a_drop_leaves_a_transaction_its_snapshot_and_its_savepoints() {
    let database = database();
    let mut session = Session::new(&database).await;
    session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; INSERT INTO log VALUES ('own')").await;
    session.run("SAVEPOINT mine; DECLARE kept CURSOR FOR SELECT line FROM log").await;
    let transaction: i64 = scalar(&mut session.db, "SELECT txid_current()").await;
    session.admin.client.execute("INSERT INTO log VALUES ('of another')", &[]).await.unwrap();
    for next in USES {
        let stream = session.db.query::<Doc>("t").stream().await.unwrap();
        session.admin.until_idle(session.pid).await;
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
