//! Closing a connection leaves nothing behind, not even a line in the server's log.

use std::time::Instant;

use backends::Postgres;
use fraiseql_stream::ErrorKind;
use futures_util::StreamExt;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::server::{Database, ENDLESS, SILENT, SOON, backend_pid, connect, eventually, within};

/// Parts of what Postgres logs about a client that does not disconnect cleanly.
const COMPLAINTS: [&str; 6] =
    ["reset by peer", "EOF", "could not", "roken pipe", "connection to client lost", "FATAL"];

/// Starts a server that logs a line for each session that ends.
fn server() -> Postgres {
    let settings = Postgres::builder().set("log_disconnections", "on").set("log_line_prefix", "%a: ");
    let server =
        settings.start().unwrap_or_else(|error| panic!("cannot start Postgres for the test: {error}"));
    server.psql("postgres", &format!("{ENDLESS} {SILENT}")).unwrap();
    server
}

/// Waits until `sessions` sessions of this name have ended; fails if Postgres logged a complaint about one.
fn assert_no_complaint(server: &Postgres, (name, sessions): (&str, usize)) {
    let start = Instant::now();
    let ended = format!("{name}: LOG:  disconnection: ");
    while server.log().matches(&ended).count() < sessions {
        assert!(start.elapsed() < SOON, "{sessions} sessions of {name} have not ended: {}", server.log());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let log = server.log();
    let complaints = log.lines().filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)));
    assert_eq!(complaints.collect::<Vec<_>>(), [""; 0]);
}

fn runtimes() -> [Runtime; 2] {
    [Builder::new_multi_thread().worker_threads(2), &mut Builder::new_current_thread()]
        .map(|builder| builder.enable_all().build().unwrap())
}

/// Drops a stream after `rows` rows and closes the connection.
async fn drop_and_close(url: &str, entity: &str, rows: usize) {
    let mut db = connect(url).await;
    let mut stream = within(SOON, db.query::<Value>(entity).stream()).await.unwrap();
    for _ in 0..rows {
        within(SOON, stream.next()).await.unwrap().unwrap();
    }
    drop(stream);
    within(SOON, db.close()).await.unwrap();
}

#[test]
fn closing_after_a_cancel_and_exiting_leaves_no_complaint_in_the_server_log() {
    let server = server();
    let url = format!("{}?application_name=closer", server.url());
    let socket = server.socket_dir().to_str().unwrap().replace('/', "%2F");
    let by_socket = url.replace("127.0.0.1", &socket);
    let mut sessions = 0;
    for url in [url, by_socket] {
        for (entity, rows) in [("endless", 0), ("endless", 1), ("endless", 5_000), ("silent", 0)] {
            for runtime in (0..3).flat_map(|_| runtimes()) {
                runtime.block_on(drop_and_close(&url, entity, rows));
                // As at the end of a program.
                drop(runtime);
                sessions += 1;
            }
        }
    }
    assert_no_complaint(&server, ("closer", sessions));
}

#[tokio::test]
async fn closing_a_connection_ends_its_backend() {
    let database = Database::with(ENDLESS);
    let admin = database.admin().await;
    for rows in [0, 1, 5_000] {
        let mut db = database.connect().await;
        let pid = backend_pid(&mut db).await;
        let mut stream = db.into_query::<Value>("endless").stream().await.unwrap();
        for _ in 0..rows {
            within(SOON, stream.next()).await.unwrap().unwrap();
        }
        let db = within(SOON, stream.close()).await.unwrap();
        within(SOON, db.close()).await.unwrap();
        admin.until(pid, |now| now.is_none()).await;
    }
}

#[tokio::test]
async fn closing_a_lost_connection_fails_without_hanging() {
    let database = Database::with("");
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    database.admin().await.run("pg_terminate_backend", pid).await;
    eventually("the connection is lost", || db.is_closed()).await;
    assert_eq!(within(SOON, db.close()).await.unwrap_err().kind(), ErrorKind::Disconnected);
}
