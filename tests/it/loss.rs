//! Losing the backend or the whole server: all rows received before arrive, then an error says which of the two is
//! lost, and nothing hangs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::Postgres;
use fraiseql_stream::{Connection, Error, ErrorKind, Verdict};
use futures_util::StreamExt;
use serde_json::Value;

use crate::server::{
    Admin, Database, Doc, ENDLESS, SILENT, SOON, assert_consecutive, backend_pid, connect, private, read_all,
    table_script, trickle, within,
};

/// Fails unless the error is that of a stream whose connection broke after `rows` rows, and contains one of `says`.
fn assert_disconnected(error: &Error, rows: usize, says: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error:?}");
    assert!(says.iter().any(|says| text.contains(says)), "none of {says:?} in: {text}");
    assert_eq!(error.stats().expect("the error ended a stream").rows, rows as u64, "{text}");
    assert!(text.contains(" rows in ") && text.lines().count() == 1, "{text}");
}

const ONLY_THE_BACKEND: &[&str] = &["the server still answers: only this backend is gone"];
const THE_WHOLE_SERVER: &[&str] = &["the whole server is gone", "the whole server is shutting down"];

/// Fails unless the connection is closed and each use of it fails at once.
async fn assert_closed(db: &mut Connection) {
    crate::server::eventually("the connection is closed", || db.is_closed()).await;
    let error = within(SOON, db.query::<Doc>("t").stream()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    assert!(error.to_string().contains("the connection is closed; connect again"), "{error}");
    let error = within(SOON, db.client()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
}

#[tokio::test]
async fn terminated_backend_is_distinguished_from_a_lost_server() {
    let database = Database::with(&trickle("slow", 1_000, 0.01));
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let mut rows = Vec::new();
    for _ in 0..5 {
        rows.push(within(SOON, stream.next()).await.unwrap().unwrap());
    }
    admin.run("pg_terminate_backend", pid).await;
    let (mut rest, error) = read_all(&mut stream).await;
    rows.append(&mut rest);
    assert_consecutive(&rows);
    let error = error.expect("the stream must fail");
    assert_disconnected(&error, rows.len(), ONLY_THE_BACKEND);
    assert_eq!(error.sqlstate().unwrap().code(), "57P01");
    assert!(within(SOON, stream.next()).await.is_none());
    drop(stream);
    assert_closed(&mut db).await;
}

#[tokio::test]
async fn backend_terminated_while_it_waits_for_the_client_is_reported() {
    // It cannot send an error: it is in the middle of a row, which is cut off.
    let database = Database::with(ENDLESS);
    for connection in [database.url.clone(), database.socket()] {
        let admin = database.admin().await;
        let mut db = connect(&connection).await;
        let pid = backend_pid(&mut db).await;
        let mut stream = db.query::<Doc>("endless").stream().await.unwrap();
        within(SOON, admin.until_waits_for(pid, "Client")).await;
        admin.run("pg_terminate_backend", pid).await;
        admin.until(pid, |now| now.is_none()).await;
        let (rows, error) = read_all(&mut stream).await;
        assert_consecutive(&rows);
        assert!(rows.len() >= 256 && rows.len() < 1_000_000, "{}", rows.len());
        assert_disconnected(&error.expect("the stream must fail"), rows.len(), ONLY_THE_BACKEND);
        drop(stream);
        assert_closed(&mut db).await;
    }
}

#[tokio::test]
async fn backend_terminated_before_its_first_row_is_reported() {
    let database = Database::with(SILENT);
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    admin.until_waits_for(pid, "Timeout").await;
    admin.run("pg_terminate_backend", pid).await;
    let (rows, error) = read_all(&mut stream).await;
    let error = error.expect("the stream must fail");
    assert_disconnected(&error, rows.len(), ONLY_THE_BACKEND);
    assert_eq!(error.sqlstate().unwrap().code(), "57P01");
    drop(stream);
    assert_closed(&mut db).await;
}

#[tokio::test]
async fn backend_terminated_while_the_query_is_prepared_is_reported() {
    let database = Database::with(&table_script("locked", 1, 0));
    let (admin, locker) = (database.admin().await, database.admin().await);
    locker.client.batch_execute("BEGIN; LOCK TABLE locked").await.unwrap();
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let terminate = async {
        admin.until_waits_for(pid, "Lock").await;
        admin.run("pg_terminate_backend", pid).await;
    };
    let stream = db.query::<Value>("locked").stream();
    let (stream, ()) = within(SOON, async { tokio::join!(stream, terminate) }).await;
    let error = stream.map(drop).unwrap_err();
    assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Disconnected, "57P01"));
    assert!(error.to_string().contains(ONLY_THE_BACKEND[0]), "{error}");
    assert_closed(&mut db).await;
}

#[tokio::test]
async fn connection_terminated_while_idle_is_closed() {
    let database = Database::with(ENDLESS);
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    admin.run("pg_terminate_backend", pid).await;
    admin.until(pid, |now| now.is_none()).await;
    assert_closed(&mut db).await;
}

#[tokio::test]
async fn stream_can_be_dropped_after_its_backend_is_gone() {
    let database = Database::with(ENDLESS);
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    let stream = db.query::<Doc>("endless").stream().await.unwrap();
    within(SOON, admin.until_waits_for(pid, "Client")).await;
    admin.run("pg_terminate_backend", pid).await;
    admin.until(pid, |now| now.is_none()).await;
    drop(stream);
    assert_closed(&mut db).await;
}

/// A server that the test takes down.
struct DoomedServer {
    server: Arc<Postgres>,
    admin: Admin,
}

impl DoomedServer {
    async fn start() -> Self {
        let server = Arc::new(tokio::task::spawn_blocking(private).await.unwrap());
        let script = format!("{ENDLESS} {SILENT} {}", trickle("slow", 10_000, 0.005));
        server.psql("postgres", &script).unwrap();
        let admin = Admin::connect(&server.url()).await;
        Self { server, admin }
    }

    async fn connect(&self) -> (Connection, i32) {
        let mut db = connect(&self.server.url()).await;
        let pid = backend_pid(&mut db).await;
        (db, pid)
    }

    /// Starts three streams (one receives rows, one waits for its consumer, one is silent), takes the server down, and
    /// reads the streams to their ends.
    async fn lose(self, how: impl FnOnce(&Postgres) + Send + 'static) {
        let ((mut one, _), (mut two, two_pid), (mut three, three_pid)) =
            (self.connect().await, self.connect().await, self.connect().await);
        let mut receives = one.query::<Doc>("slow").stream().await.unwrap();
        let mut waits = two.query::<Doc>("endless").stream().await.unwrap();
        let mut is_silent = three.query::<Value>("silent").stream().await.unwrap();
        let mut first = Vec::new();
        for _ in 0..5 {
            first.push(within(SOON, receives.next()).await.unwrap().unwrap());
        }
        within(SOON, self.admin.until_waits_for(two_pid, "Client")).await;
        within(SOON, self.admin.until_waits_for(three_pid, "Timeout")).await;
        let server = Arc::clone(&self.server);
        within(SOON, tokio::task::spawn_blocking(move || how(&server))).await.unwrap();

        let (mut rest, error) = read_all(&mut receives).await;
        first.append(&mut rest);
        assert_consecutive(&first);
        assert_disconnected(&error.expect("the stream must fail"), first.len(), THE_WHOLE_SERVER);
        let (rows, error) = read_all(&mut waits).await;
        assert_consecutive(&rows);
        assert!(rows.len() >= 256 && rows.len() < 1_000_000, "{}", rows.len());
        assert_disconnected(&error.expect("the stream must fail"), rows.len(), THE_WHOLE_SERVER);
        let (rows, error) = read_all(&mut is_silent).await;
        assert_disconnected(&error.expect("the stream must fail"), rows.len(), THE_WHOLE_SERVER);
        drop((receives, waits, is_silent));
        for db in [&mut one, &mut two, &mut three] {
            assert_closed(db).await;
        }
        let error = within(SOON, Connection::connect(&self.server.url())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Connect);
        tokio::task::spawn_blocking(move || drop(self.server)).await.unwrap();
    }
}

#[tokio::test]
async fn stopped_server_is_reported_as_lost() {
    DoomedServer::start().await.lose(|server| server.stop().unwrap()).await;
}

#[tokio::test]
async fn lost_server_is_not_blamed_on_a_slow_consumer() {
    let doomed = DoomedServer::start().await;
    let (mut db, _) = doomed.connect().await;
    let mut stream = db.query::<Doc>("endless").stream().await.unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        within(SOON, stream.next()).await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let server = Arc::clone(&doomed.server);
    within(SOON, tokio::task::spawn_blocking(move || server.stop().unwrap())).await.unwrap();
    let (_, error) = read_all(&mut stream).await;
    let error = error.expect("the stream must fail");
    let stats = error.stats().expect("the error ended a stream");
    assert_eq!((error.kind(), stats.verdict()), (ErrorKind::Disconnected, Verdict::ConsumerBound));
    let text = error.to_string();
    let (_, progress) = text.split_once(" after ").unwrap();
    let words: Vec<_> = progress.splitn(6, ' ').collect();
    assert!(matches!(words[..], [_, "rows", "in", _, "s;", _]), "{text}");
    assert_eq!(words[0].replace(',', ""), stats.rows.to_string(), "{text}");
    assert!(!text.contains("bound"), "there is no verdict: {text}");
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}

#[tokio::test]
async fn killed_server_is_reported_as_lost() {
    DoomedServer::start().await.lose(|server| server.kill().unwrap()).await;
}

#[tokio::test]
async fn killed_backend_is_reported() {
    let doomed = DoomedServer::start().await;
    let (mut db, pid) = doomed.connect().await;
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let mut rows = Vec::new();
    for _ in 0..5 {
        rows.push(within(SOON, stream.next()).await.unwrap().unwrap());
    }
    assert!(backends::send_signal("KILL", pid));
    let (mut rest, error) = read_all(&mut stream).await;
    rows.append(&mut rest);
    assert_consecutive(&rows);
    // Postgres restarts afterwards; which of the two is reported depends on the timing.
    let says = [
        "the server still answers: only this backend is gone",
        "the whole server is shutting down or starting up",
    ];
    assert_disconnected(&error.expect("the stream must fail"), rows.len(), &says);
    drop(stream);
    assert_closed(&mut db).await;
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}

#[tokio::test]
async fn streams_of_other_backends_fail_when_one_backend_is_killed() {
    let doomed = DoomedServer::start().await;
    let ((_victim, victim), (mut db, _)) = (doomed.connect().await, doomed.connect().await);
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let mut rows = vec![within(SOON, stream.next()).await.unwrap().unwrap()];
    assert!(backends::send_signal("KILL", victim));
    let (mut rest, error) = read_all(&mut stream).await;
    rows.append(&mut rest);
    assert_consecutive(&rows);
    let says = [
        "the server still answers",
        "the whole server is shutting down or starting up",
        "the whole server is gone",
    ];
    assert_disconnected(&error.expect("the stream must fail"), rows.len(), &says);
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}

#[tokio::test]
async fn closing_a_stream_after_the_server_is_gone_does_not_hang() {
    let doomed = DoomedServer::start().await;
    let (mut db, pid) = doomed.connect().await;
    let stream = db.query::<Doc>("endless").stream().await.unwrap();
    within(SOON, doomed.admin.until_waits_for(pid, "Client")).await;
    let server = Arc::clone(&doomed.server);
    tokio::task::spawn_blocking(move || server.kill().unwrap()).await.unwrap();
    let error = within(Duration::from_secs(6), stream.close()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    assert_closed(&mut db).await;
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}
