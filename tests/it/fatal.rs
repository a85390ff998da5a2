//! FATAL and PANIC end the connection whatever their SQLSTATE; an ERROR never does.

use std::time::Duration;

use backends::{Postgres, send_signal};
use fraiseql_stream::ErrorKind;
use futures_util::StreamExt;
use serde_json::Value;

use crate::server::{
    Admin, Database, Doc, SILENT, SOON, backend_pid, connect, eventually, ids, read_all, rows_of, scalar,
    shared, table_script, within,
};

#[tokio::test]
async fn fatal_timeout_during_a_query_is_a_lost_connection_with_its_cause() {
    let database = Database::with(&table_script("t", 1, 0));
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let begin = "SET idle_in_transaction_session_timeout = '1s'; BEGIN";
    within(SOON, db.client()).await.unwrap().batch_execute(begin).await.unwrap();
    // The query is already sent when the timeout fires, as on a slow network.
    assert!(send_signal("STOP", pid));
    let resume = async {
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        assert!(send_signal("CONT", pid));
    };
    let stream = db.query::<Doc>("t").stream();
    let (stream, ()) = within(SOON, async { tokio::join!(stream, resume) }).await;
    let error = stream.map(drop).unwrap_err();
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Disconnected, "25P03"));
    let text = error.to_string();
    assert!(text.contains("terminating connection due to idle-in-transaction timeout (25P03)"), "{text}");
    assert!(text.contains("the server still answers: only this backend is gone"), "{text}");
    eventually("the connection is closed", || db.is_closed()).await;
}

#[tokio::test]
async fn server_panic_is_a_lost_connection_with_its_cause() {
    let settings = [("wal_level", "minimal"), ("max_wal_senders", "0"), ("autovacuum", "off")];
    let settings = settings.iter().fold(Postgres::builder(), |all, (name, value)| all.set(name, value));
    let server = tokio::task::spawn_blocking(move || settings.start().unwrap()).await.unwrap();
    let view = "CREATE VIEW v AS SELECT jsonb_build_object('id', i, 'switched', CASE i WHEN 3 THEN pg_switch_wal()::text END) AS data
                  FROM generate_series(0, 9) i; CHECKPOINT;";
    server.psql("postgres", view).unwrap();
    let mut db = connect(&server.url()).await;
    // Postgres panics when it cannot write its WAL.
    let data = server.socket_dir().join("data");
    std::fs::rename(data.join("pg_wal"), data.join("lost")).unwrap();
    let mut stream = db.query::<Doc>("v").stream().await.unwrap();
    let (_, error) = read_all(&mut stream).await;
    let error = error.expect("the stream must fail");
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Disconnected, "58P01"));
    let text = error.to_string();
    assert!(text.contains("file \"pg_wal/") && text.contains("No such file or directory (58P01)"), "{text}");
    drop(stream);
    eventually("the connection is closed", || db.is_closed()).await;
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[tokio::test]
async fn error_leaves_the_connection_alive_whatever_its_sqlstate() {
    let database = Database::with(&format!("{SILENT} {}", table_script("t", 1, 0)));
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let force = if shared().version() < 16 { "force_parallel_mode" } else { "debug_parallel_query" };
    let script = format!("SET {force} = on");
    within(SOON, db.client()).await.unwrap().batch_execute(&script).await.unwrap();
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    // The backend outlives its worker and passes on the worker's SQLSTATE.
    let worker = within(SOON, parallel_worker(&admin, pid)).await;
    admin.run("pg_terminate_backend", worker).await;
    let error = within(SOON, stream.next()).await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "57P01"), "{error}");
    drop(stream);
    assert_eq!(ids(&rows_of(db.query::<Doc>("t").stream().await.unwrap()).await), [0]);
    assert_eq!(scalar::<i32>(&mut db, "SELECT pg_backend_pid()").await, pid);
}

/// Waits for a parallel worker of the backend and returns its process id.
async fn parallel_worker(admin: &Admin, leader: i32) -> i32 {
    let text = "SELECT pid FROM pg_stat_activity WHERE leader_pid = $1 AND wait_event = 'PgSleep'";
    loop {
        if let Some(row) = admin.client.query_opt(text, &[&leader]).await.unwrap() {
            return row.get(0);
        }
    }
}
