//! A session in a transaction, how it exits streams early, and what it is used for next.

use std::time::Duration;

use fraiseql_stream::{Connection, Error, ErrorKind, Result};
use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;

use crate::server::{
    Admin, Database, Doc, ENDLESS, SILENT, SOON, backend_pid, ids, rows_of, table_script, within,
};

/// How a stream is dropped before its end.
#[derive(Clone, Copy, Debug)]
pub(super) enum EarlyExit {
    /// By `take(1)`.
    Take,
    /// By a drop after a row.
    Drop,
    /// By `?` on a row that does not decode.
    DecodeError,
    /// By a timeout around `next`.
    Timeout,
    /// By a drop before Postgres sends a row, without any poll.
    Silence,
    /// By a drop of the future of `stream()` while it waits for a lock.
    Lock,
}

pub(super) const EARLY_EXITS: [EarlyExit; 6] = [
    EarlyExit::Take,
    EarlyExit::Drop,
    EarlyExit::DecodeError,
    EarlyExit::Timeout,
    EarlyExit::Silence,
    EarlyExit::Lock,
];

/// What the connection is used for next.
#[derive(Clone, Copy, Debug)]
pub(super) enum NextUse {
    Client,
    ClientMut,
    Stream,
}

pub(super) const NEXT_USES: [NextUse; 3] = [NextUse::Client, NextUse::ClientMut, NextUse::Stream];

pub(super) fn database() -> Database {
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

/// A connection, with sessions that observe it from outside.
pub(super) struct Session {
    pub(super) db: Connection,
    pub(super) pid: i32,
    pub(super) admin: Admin,
    /// Holds a lock on `locked`.
    _locker: Admin,
}

impl Session {
    pub(super) async fn new(database: &Database) -> Self {
        let (admin, locker) = (database.admin().await, database.admin().await);
        locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
        let mut db = database.connect().await;
        let pid = backend_pid(&mut db).await;
        Self { db, pid, admin, _locker: locker }
    }

    pub(super) async fn run(&mut self, script: &str) {
        let client = within(SOON, self.db.client()).await.unwrap();
        within(SOON, client.batch_execute(script)).await.unwrap();
    }

    /// Starts a stream and drops it before its end.
    pub(super) async fn exit_early(&mut self, exit: EarlyExit) {
        match exit {
            EarlyExit::Take => {
                let stream = self.db.query::<Doc>("endless").stream().await.unwrap();
                assert_eq!(within(SOON, stream.take(1).count()).await, 1);
            }
            EarlyExit::Drop => {
                let mut stream = self.db.query::<Doc>("endless").stream().await.unwrap();
                within(SOON, stream.next()).await.unwrap().unwrap();
            }
            EarlyExit::DecodeError => {
                let error = within(SOON, read_odd(&mut self.db)).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Decode { row: 3 });
            }
            EarlyExit::Timeout => {
                let mut stream = self.db.query::<Value>("silent").stream().await.unwrap();
                let next = tokio::time::timeout(Duration::from_millis(30), stream.next()).await;
                assert!(next.is_err());
            }
            EarlyExit::Silence => {
                let stream = self.db.query::<Value>("silent").stream().await.unwrap();
                self.admin.until_waits_for(self.pid, "Timeout").await;
                drop(stream);
            }
            EarlyExit::Lock => tokio::select! {
                _ = self.db.query::<Value>("locked").stream() => panic!("the table is locked"),
                () = self.admin.until_waits_for(self.pid, "Lock") => {}
            },
        }
    }

    pub(super) async fn use_for(&mut self, next: NextUse) -> Result<()> {
        match next {
            NextUse::Client => within(SOON, self.db.client()).await.map(drop),
            NextUse::ClientMut => within(SOON, self.db.client_mut()).await.map(drop),
            NextUse::Stream => {
                let stream = within(SOON, self.db.query::<Doc>("t").stream()).await?;
                assert_eq!(rows_of(stream).await.len(), 10);
                Ok(())
            }
        }
    }

    /// Returns the committed lines of `log`.
    pub(super) async fn log(&self) -> Vec<String> {
        let rows = self.admin.client.query("SELECT line FROM log ORDER BY line", &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Fails unless the transaction is aborted, no use of the connection reports that again, and `ROLLBACK` ends it.
    pub(super) async fn assert_aborted_and_reported(&mut self) {
        for _ in 0..2 {
            let client = within(SOON, self.db.client()).await.unwrap();
            let error = within(SOON, client.batch_execute("SELECT 1")).await.unwrap_err();
            assert_eq!(error.code().unwrap().code(), "25P02");
        }
        self.run("ROLLBACK").await;
        let rows = rows_of(self.db.query::<Doc>("t").order_by("id").stream().await.unwrap()).await;
        assert_eq!(ids(&rows), (0..10).collect::<Vec<_>>());
        assert_eq!(self.log().await, [""; 0], "it was rolled back");
    }

    /// Fails unless the transaction is alive and its `COMMIT` writes exactly these lines.
    pub(super) async fn assert_commits(&mut self, lines: &[&str]) {
        self.run("COMMIT").await;
        assert_eq!(self.log().await, lines);
        self.run("TRUNCATE log").await;
    }
}

/// Reads rows with `?`, as a service does.
async fn read_odd(db: &mut Connection) -> Result<u64> {
    let mut stream = db.query::<Doc>("odd").stream().await?;
    let mut sum = 0;
    while let Some(doc) = stream.try_next().await? {
        sum += doc.id;
    }
    Ok(sum)
}

pub(super) fn assert_aborted(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::TransactionAborted, "{error}");
    let text = error.to_string();
    assert!(text.contains("transaction is aborted") && text.contains("run ROLLBACK"), "{text}");
}
