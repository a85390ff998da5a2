//! Losing the backend or the whole server: an error that says which, all rows before it, and no hang.

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

/// An error that ended a stream because its connection broke, and what it must say.
fn assert_disconnected(error: &Error, rows: usize, says: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error:?}");
    assert!(says.iter().any(|says| text.contains(says)), "none of {says:?} in: {text}");
    assert_eq!(error.stats().expect("it ended a stream").rows, rows as u64, "{text}");
    assert!(text.contains(" rows in ") && text.lines().count() == 1, "{text}");
}

const ONLY_THE_BACKEND: &[&str] = &["the server still answers: only this backend is gone"];
const THE_WHOLE_SERVER: &[&str] = &["the whole server is gone", "the whole server goes down"];

/// The connection is closed, and says so instead of trying.
async fn assert_closed(db: &mut Connection) {
    crate::server::eventually("the connection is closed", || db.is_closed()).await;
    let error = within(SOON, db.query::<Doc>("t").stream()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    assert!(error.to_string().contains("the connection is closed; connect again"), "{error}");
    let error = within(SOON, db.client()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
}

#[tokio::test]
async fn a_terminated_backend_is_told_apart_from_a_lost_server() {
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
async fn a_backend_terminated_while_it_waits_for_us_to_read_is_told() {
    // It cannot say anything any more: the row that it was sending is cut off.
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
async fn a_backend_terminated_before_its_first_row_is_told() {
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
async fn a_backend_terminated_while_the_query_is_prepared_is_told() {
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
async fn a_connection_that_was_terminated_while_idle_says_so() {
    let database = Database::with(ENDLESS);
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    admin.run("pg_terminate_backend", pid).await;
    admin.until(pid, |now| now.is_none()).await;
    assert_closed(&mut db).await;
}

#[tokio::test]
async fn a_stream_dropped_after_its_backend_has_gone_harms_nobody() {
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

/// Three streams on a server that is about to be lost: one that sends, one that waits for us, one that is silent.
struct Doomed {
    server: Arc<Postgres>,
    admin: Admin,
}

impl Doomed {
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

    /// Runs the three streams, has the server lost in the midst of it, and reads them to their ends.
    async fn lose(self, how: impl FnOnce(&Postgres) + Send + 'static) {
        let ((mut one, _), (mut two, two_pid), (mut three, three_pid)) =
            (self.connect().await, self.connect().await, self.connect().await);
        let mut sends = one.query::<Doc>("slow").stream().await.unwrap();
        let mut waits = two.query::<Doc>("endless").stream().await.unwrap();
        let mut is_silent = three.query::<Value>("silent").stream().await.unwrap();
        let mut first = Vec::new();
        for _ in 0..5 {
            first.push(within(SOON, sends.next()).await.unwrap().unwrap());
        }
        within(SOON, self.admin.until_waits_for(two_pid, "Client")).await;
        within(SOON, self.admin.until_waits_for(three_pid, "Timeout")).await;
        let server = Arc::clone(&self.server);
        within(SOON, tokio::task::spawn_blocking(move || how(&server))).await.unwrap();

        let (mut rest, error) = read_all(&mut sends).await;
        first.append(&mut rest);
        assert_consecutive(&first);
        assert_disconnected(&error.expect("the stream must fail"), first.len(), THE_WHOLE_SERVER);
        let (rows, error) = read_all(&mut waits).await;
        assert_consecutive(&rows);
        assert!(rows.len() >= 256 && rows.len() < 1_000_000, "{}", rows.len());
        assert_disconnected(&error.expect("the stream must fail"), rows.len(), THE_WHOLE_SERVER);
        let (rows, error) = read_all(&mut is_silent).await;
        assert_disconnected(&error.expect("the stream must fail"), rows.len(), THE_WHOLE_SERVER);
        drop((sends, waits, is_silent));
        for db in [&mut one, &mut two, &mut three] {
            assert_closed(db).await;
        }
        let error = within(SOON, Connection::connect(&self.server.url())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Connect);
        tokio::task::spawn_blocking(move || drop(self.server)).await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_is_stopped_is_told_as_a_whole() {
    Doomed::start().await.lose(|server| server.stop().unwrap()).await;
}

#[tokio::test]
async fn a_lost_server_is_not_put_down_to_a_slow_consumer() {
    let doomed = Doomed::start().await;
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
    let stats = error.stats().expect("it ended a stream");
    assert_eq!((error.kind(), stats.verdict()), (ErrorKind::Disconnected, Verdict::ConsumerBound));
    let text = error.to_string();
    let (_, end) = text.rsplit_once(" after ").unwrap();
    let words: Vec<_> = end.split(' ').collect();
    assert!(matches!(words[..], [_, "rows", "in", _, "s"]), "how far, and no more: {text}");
    assert_eq!(words[0].replace(',', ""), stats.rows.to_string(), "{text}");
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_killed_is_told_as_a_whole() {
    Doomed::start().await.lose(|server| server.kill().unwrap()).await;
}

#[tokio::test]
async fn a_backend_that_is_killed_is_told() {
    let doomed = Doomed::start().await;
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
    // Postgres restarts after that; which of the two is true depends on the moment.
    let says =
        ["the server still answers: only this backend is gone", "the whole server goes down or comes up"];
    assert_disconnected(&error.expect("the stream must fail"), rows.len(), &says);
    drop(stream);
    assert_closed(&mut db).await;
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}

#[tokio::test]
async fn the_neighbours_of_a_killed_backend_end_with_an_error_too() {
    let doomed = Doomed::start().await;
    let ((_victim, victim), (mut db, _)) = (doomed.connect().await, doomed.connect().await);
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let mut rows = vec![within(SOON, stream.next()).await.unwrap().unwrap()];
    assert!(backends::send_signal("KILL", victim));
    let (mut rest, error) = read_all(&mut stream).await;
    rows.append(&mut rest);
    assert_consecutive(&rows);
    let says =
        ["the server still answers", "the whole server goes down or comes up", "the whole server is gone"];
    assert_disconnected(&error.expect("the stream must fail"), rows.len(), &says);
    tokio::task::spawn_blocking(move || drop(doomed.server)).await.unwrap();
}

#[tokio::test]
async fn a_stream_dropped_after_the_whole_server_has_gone_does_not_hang() {
    let doomed = Doomed::start().await;
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
