//! One private Postgres for all tests of this binary, a database for each test, and what tests wait by.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backends::Postgres;
use fraiseql_stream::tokio_postgres::{self, Client, NoTls};
use fraiseql_stream::{Connection, Error, FromJson, JsonStream};
use futures_util::StreamExt;
use serde::Deserialize;

/// What takes longer than this hangs.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A view that sends nothing for an hour.
pub(crate) const SILENT: &str =
    "CREATE VIEW silent AS SELECT jsonb_build_object('slept', pg_sleep(3600)::text) AS data;";

/// A view of a million small documents, which Postgres makes faster than a test reads them.
pub(crate) const ENDLESS: &str = "CREATE VIEW endless AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 100)) AS data FROM generate_series(0, 999999) i;";

/// The document of nearly all tests.
#[derive(Debug, Deserialize, PartialEq)]
pub(crate) struct Doc {
    pub(crate) id: u64,
}

/// The server that the tests of this binary share. It goes away with the process.
pub(crate) fn shared() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| {
        let settings = Postgres::builder().set("max_connections", "200");
        settings.start().unwrap_or_else(|error| panic!("no Postgres for the tests: {error}"))
    })
}

/// A server that its test may kill.
pub(crate) fn private() -> Postgres {
    Postgres::start().unwrap_or_else(|error| panic!("no Postgres for the test: {error}"))
}

/// A database of one test's own.
#[derive(Debug)]
pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) url: String,
}

impl Database {
    /// Makes an empty database and runs `script` in it.
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

    /// The connection string by way of the Unix socket.
    pub(crate) fn socket(&self) -> String {
        let (dir, port) = (shared().socket_dir().display(), shared().port());
        format!("host={dir} port={port} user=postgres password={} dbname={}", shared().password(), self.name)
    }

    pub(crate) async fn connect(&self) -> Connection {
        connect(&self.url).await
    }

    /// A second session, to look at the first one from outside.
    pub(crate) async fn admin(&self) -> Admin {
        Admin::connect(&self.url).await
    }
}

pub(crate) async fn connect(url: &str) -> Connection {
    within(SOON, Connection::connect(url)).await.unwrap_or_else(|error| panic!("{error}"))
}

/// A database with a table `t` of the documents `{"id": 0, "pad": "..."}`, ..., in order.
pub(crate) fn table(rows: usize, pad: usize) -> Database {
    Database::with(&table_script("t", rows, pad))
}

pub(crate) fn table_script(name: &str, rows: usize, pad: usize) -> String {
    format!(
        "CREATE TABLE {name} AS SELECT i AS id, jsonb_build_object('id', i, 'pad', repeat('x', {pad})) AS data FROM generate_series(0, {rows} - 1) i;"
    )
}

/// A view of `rows` documents, each sent by itself: Postgres takes `seconds` for a row and flushes it.
pub(crate) fn trickle(name: &str, rows: usize, seconds: f64) -> String {
    format!(
        "CREATE VIEW {name} AS SELECT jsonb_build_object('id', i, 'slept', pg_sleep({seconds})::text, 'pad', repeat('x', 9000)) AS data FROM generate_series(0, {rows} - 1) i;"
    )
}

/// A session beside the one under test, by plain tokio-postgres.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) client: Client,
}

/// What `pg_stat_activity` says of a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    pub(crate) state: String,
    /// Such as `Lock`, `Client` or `Timeout`.
    pub(crate) waits_for: String,
}

impl Activity {
    pub(crate) fn is_active(&self) -> bool {
        self.state == "active"
    }
}

impl Admin {
    pub(crate) async fn connect(url: &str) -> Self {
        let (client, wire) = tokio_postgres::connect(url, NoTls)
            .await
            .unwrap_or_else(|error| panic!("no second session: {error}"));
        tokio::spawn(wire);
        Self { client }
    }

    /// `None` once the backend is gone.
    pub(crate) async fn activity(&self, pid: i32) -> Option<Activity> {
        let text = "SELECT coalesce(state, ''), coalesce(wait_event_type, '') FROM pg_stat_activity WHERE pid = $1::int4";
        let row = self.client.query_opt(text, &[&pid]).await.unwrap_or_else(|error| panic!("{error}"))?;
        Some(Activity { state: row.get(0), waits_for: row.get(1) })
    }

    /// Waits until a backend is as wanted; the time that took.
    pub(crate) async fn until(&self, pid: i32, wanted: impl Fn(Option<&Activity>) -> bool) -> Duration {
        let start = Instant::now();
        loop {
            let now = self.activity(pid).await;
            if wanted(now.as_ref()) {
                return start.elapsed();
            }
            assert!(start.elapsed() < SOON, "backend {pid} stays {now:?}");
        }
    }

    /// Waits until the backend works on a query, and in it on this.
    pub(crate) async fn until_waits_for(&self, pid: i32, what: &str) {
        self.until(pid, |now| now.is_some_and(|now| now.is_active() && now.waits_for == what)).await;
    }

    /// Waits until the backend has sent the last byte of its answer.
    pub(crate) async fn until_idle(&self, pid: i32) {
        self.until(pid, |now| now.is_some_and(|now| !now.is_active())).await;
    }

    pub(crate) async fn run(&self, function: &str, pid: i32) {
        let text = format!("SELECT {function}($1::int4)");
        self.client.execute(&text, &[&pid]).await.unwrap_or_else(|error| panic!("{error}"));
    }
}

/// The process id of the connection's backend.
pub(crate) async fn backend_of(db: &mut Connection) -> i32 {
    scalar(db, "SELECT pg_backend_pid()").await
}

/// One value, by the client below the connection.
pub(crate) async fn scalar<T>(db: &mut Connection, query: &str) -> T
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    let client = within(SOON, db.client()).await.unwrap_or_else(|error| panic!("{error}"));
    within(SOON, client.query_one(query, &[])).await.unwrap_or_else(|error| panic!("{error}")).get(0)
}

/// Fails the test if `work` hangs.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| panic!("this hangs: no end after {limit:?}"))
}

/// Asks until it holds, or the test fails.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// All rows, and the error that ended the stream.
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

/// All rows of a stream that ends well.
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

/// Fails unless the rows are 0, 1, 2, ...: none lost, none doubled, in order.
pub(crate) fn assert_unbroken(rows: &[Doc]) {
    let broken = rows.iter().zip(0..).find(|(row, id)| row.id != *id);
    assert!(broken.is_none(), "row and number: {broken:?}");
}

/// Everything that an error shows anywhere, its causes included.
pub(crate) fn all_of(error: &Error) -> String {
    let mut text = format!("{error}\n{error:?}\n{error:#?}");
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}\n{error}\n{error:?}\n{error:#?}");
        cause = error.source();
    }
    text
}

/// Repeatable random numbers: splitmix64.
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
