//! The Postgres server that all tests of this binary share, a database for each test, and helpers to wait for
//! conditions.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backends::Postgres;
use fraiseql_stream::tokio_postgres::{self, Client, NoTls};
use fraiseql_stream::{Connection, Error, FromJson, JsonStream};
use futures_util::StreamExt;
use serde::Deserialize;

/// Anything that takes longer is considered hung.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A view that sends no row for an hour.
pub(crate) const SILENT: &str =
    "CREATE VIEW silent AS SELECT jsonb_build_object('slept', pg_sleep(3600)::text) AS data;";

/// A view of a million small documents, which Postgres produces faster than a test reads them.
pub(crate) const ENDLESS: &str = "CREATE VIEW endless AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 100)) AS data FROM generate_series(0, 999999) i;";

/// The document type of nearly all tests.
#[derive(Debug, Deserialize, PartialEq)]
pub(crate) struct Doc {
    pub(crate) id: u64,
}

/// Returns the server that the tests of this binary share. It stops with the process.
pub(crate) fn shared() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| {
        let settings = Postgres::builder().set("max_connections", "200");
        settings.start().unwrap_or_else(|error| panic!("cannot start Postgres for the tests: {error}"))
    })
}

/// Starts a separate server, which the test may stop or kill.
pub(crate) fn private() -> Postgres {
    Postgres::start().unwrap_or_else(|error| panic!("cannot start Postgres for the test: {error}"))
}

/// A database for one test.
#[derive(Debug)]
pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) url: String,
}

impl Database {
    /// Creates an empty database and runs `script` in it.
    pub(crate) fn with(script: &str) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("it_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let url = shared().create_database(&name).unwrap_or_else(|error| panic!("{error}"));
        let database = Self { name, url };
        database.psql(script);
        database
    }

    pub(crate) fn psql(&self, script: &str) -> String {
        shared().psql(&self.name, script).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Returns the connection string for the Unix socket.
    pub(crate) fn socket(&self) -> String {
        let (dir, port) = (shared().socket_dir().display(), shared().port());
        format!("host={dir} port={port} user=postgres password={} dbname={}", shared().password(), self.name)
    }

    pub(crate) async fn connect(&self) -> Connection {
        connect(&self.url).await
    }

    /// Opens a second session to observe the first one from outside.
    pub(crate) async fn admin(&self) -> Admin {
        Admin::connect(&self.url).await
    }
}

pub(crate) async fn connect(url: &str) -> Connection {
    within(SOON, Connection::connect(url)).await.unwrap_or_else(|error| panic!("{error}"))
}

/// Creates a database with a table `t` of the documents `{"id": 0, "pad": "..."}`, ..., in order.
pub(crate) fn table(rows: usize, pad: usize) -> Database {
    Database::with(&table_script("t", rows, pad))
}

pub(crate) fn table_script(name: &str, rows: usize, pad: usize) -> String {
    format!(
        "CREATE TABLE {name} AS SELECT i AS id, jsonb_build_object('id', i, 'pad', repeat('x', {pad})) AS data FROM generate_series(0, {rows} - 1) i;"
    )
}

/// Returns a script for a view of `rows` documents that are sent one by one: Postgres takes `seconds` per row and
/// flushes each.
pub(crate) fn trickle(name: &str, rows: usize, seconds: f64) -> String {
    format!(
        "CREATE VIEW {name} AS SELECT jsonb_build_object('id', i, 'slept', pg_sleep({seconds})::text, 'pad', repeat('x', 9000)) AS data FROM generate_series(0, {rows} - 1) i;"
    )
}

/// A plain tokio-postgres session next to the one under test.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) client: Client,
}

/// A backend's entry in `pg_stat_activity`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    pub(crate) state: String,
    /// For example `Lock`, `Client` or `Timeout`.
    pub(crate) wait_event_type: String,
}

impl Activity {
    pub(crate) fn is_active(&self) -> bool {
        self.state == "active"
    }
}

impl Admin {
    pub(crate) async fn connect(url: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(url, NoTls)
            .await
            .unwrap_or_else(|error| panic!("cannot open a second session: {error}"));
        tokio::spawn(connection);
        Self { client }
    }

    /// Returns `None` once the backend is gone.
    pub(crate) async fn activity(&self, pid: i32) -> Option<Activity> {
        let text = "SELECT coalesce(state, ''), coalesce(wait_event_type, '') FROM pg_stat_activity WHERE pid = $1::int4";
        let row = self.client.query_opt(text, &[&pid]).await.unwrap_or_else(|error| panic!("{error}"))?;
        Some(Activity { state: row.get(0), wait_event_type: row.get(1) })
    }

    /// Waits until the backend's activity satisfies `wanted`; returns the time that took.
    pub(crate) async fn until(&self, pid: i32, wanted: impl Fn(Option<&Activity>) -> bool) -> Duration {
        let start = Instant::now();
        loop {
            let now = self.activity(pid).await;
            if wanted(now.as_ref()) {
                return start.elapsed();
            }
            assert!(start.elapsed() < SOON, "backend {pid} is still {now:?}");
        }
    }

    /// Waits until the backend runs a query and waits for an event of this type.
    pub(crate) async fn until_waits_for(&self, pid: i32, event_type: &str) {
        self.until(pid, |now| now.is_some_and(|now| now.is_active() && now.wait_event_type == event_type))
            .await;
    }

    /// Waits until the backend has sent its complete answer.
    pub(crate) async fn until_idle(&self, pid: i32) {
        self.until(pid, |now| now.is_some_and(|now| !now.is_active())).await;
    }

    /// Waits until the backend has sent its complete answer to a query on this entity. The statement must already
    /// be prepared, and the previous query must be a different one.
    pub(crate) async fn until_answered(&self, pid: i32, entity: &str) {
        let text = "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND state <> 'active' AND query LIKE $2";
        let query = format!("SELECT data FROM \"{entity}\"%");
        let start = Instant::now();
        while self.client.query_opt(text, &[&pid, &query]).await.unwrap().is_none() {
            assert!(start.elapsed() < SOON, "backend {pid} does not finish the query on {entity}");
        }
    }

    pub(crate) async fn run(&self, function: &str, pid: i32) {
        let text = format!("SELECT {function}($1::int4)");
        self.client.execute(&text, &[&pid]).await.unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Returns the process id of the connection's backend.
pub(crate) async fn backend_pid(db: &mut Connection) -> i32 {
    scalar(db, "SELECT pg_backend_pid()").await
}

/// Queries a single value with the connection's client.
pub(crate) async fn scalar<T>(db: &mut Connection, query: &str) -> T
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    let client = within(SOON, db.client()).await.unwrap_or_else(|error| panic!("{error}"));
    within(SOON, client.query_one(query, &[])).await.unwrap_or_else(|error| panic!("{error}")).get(0)
}

/// Fails the test if `work` takes longer than `limit`.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| panic!("still running after {limit:?}"))
}

/// Waits until `holds` returns true; fails the test if that takes too long.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "still not the case: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Reads rows up to the end of the stream or its first error.
pub(crate) async fn read_all<T, C>(stream: &mut JsonStream<T, C>) -> (Vec<T>, Option<Error>)
where
    T: FromJson,
    C: Unpin,
{
    let mut rows = Vec::new();
    loop {
        match within(SOON, stream.next()).await {
            Some(Ok(row)) => rows.push(row),
            Some(Err(error)) => return (rows, Some(error)),
            None => return (rows, None),
        }
    }
}

/// Returns all rows of a stream; fails the test on an error.
pub(crate) async fn rows_of<T, C>(mut stream: JsonStream<T, C>) -> Vec<T>
where
    T: FromJson,
    C: Unpin,
{
    let (rows, error) = read_all(&mut stream).await;
    assert!(error.is_none(), "{error:?}");
    rows
}

pub(crate) fn ids(rows: &[Doc]) -> Vec<u64> {
    rows.iter().map(|row| row.id).collect()
}

/// Fails unless the rows are 0, 1, 2, ...: none lost, none duplicated, in order.
pub(crate) fn assert_consecutive(rows: &[Doc]) {
    let mismatch = rows.iter().zip(0..).find(|(row, id)| row.id != *id);
    assert!(mismatch.is_none(), "row and expected id: {mismatch:?}");
}

/// Returns everything that an error prints, its causes included.
pub(crate) fn all_of(error: &Error) -> String {
    let mut text = format!("{error}\n{error:?}\n{error:#?}");
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}\n{error}\n{error:?}\n{error:#?}");
        cause = error.source();
    }
    text
}

/// Reproducible random numbers (splitmix64).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[usize::try_from(self.below(choice.len() as u64)).unwrap()]
    }
}
