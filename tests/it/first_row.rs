//! Time to the first row: barely longer than with plain tokio-postgres on the same server.

use std::pin::pin;
use std::time::{Duration, Instant};

use fraiseql_stream::tokio_postgres::types::{FromSql, Type};
use fraiseql_stream::{Connection, RawJson};
use futures_util::StreamExt;

use crate::server::{Admin, Database, SOON, connect, trickle, within};

/// The length of a column that is received but not decoded.
struct Raw(usize);

impl FromSql<'_> for Raw {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(raw.len()))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

async fn plain(admin: &Admin, entity: &str) -> Duration {
    let text = format!("SELECT data FROM {entity} LIMIT 200");
    let start = Instant::now();
    let rows = admin.client.query_raw(&text, Vec::<i32>::new()).await.unwrap();
    let mut rows = pin!(rows);
    let row = within(SOON, rows.next()).await.unwrap().unwrap();
    assert!(row.get::<_, Raw>(0).0 > 9_000);
    let took = start.elapsed();
    while rows.next().await.is_some() {}
    took
}

async fn ours(db: &mut Connection, entity: &str) -> Duration {
    let start = Instant::now();
    let mut stream = db.query::<RawJson>(entity).limit(200).stream().await.unwrap();
    let row = within(SOON, stream.next()).await.unwrap().unwrap();
    assert!(row.as_bytes().len() > 9_000);
    let took = start.elapsed();
    while stream.next().await.is_some() {}
    took
}

/// Returns the medians of interleaved rounds, by tokio-postgres and by this crate.
async fn medians(connection: &str, entity: &str, rounds: usize) -> (Duration, Duration) {
    let (admin, mut db) = (Admin::connect(connection).await, connect(connection).await);
    let (mut plain_times, mut our_times) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        plain_times.push(plain(&admin, entity).await);
        our_times.push(ours(&mut db, entity).await);
    }
    plain_times.sort();
    our_times.sort();
    let medians = (plain_times[rounds / 2], our_times[rounds / 2]);
    eprintln!(
        "first row of {entity}: {:?} by tokio-postgres, {:?} by this crate (medians of {rounds})",
        medians.0, medians.1
    );
    medians
}

/// Retries, because a real delay shows in every attempt, but one caused by a busy machine does not.
async fn assert_barely_later(database: &Database, entity: &str, (rounds, allowed): (usize, Duration)) {
    for connection in [&database.url, &database.socket()] {
        let mut attempts = Vec::new();
        while attempts.last().is_none_or(|(plain, ours)| *ours >= *plain + allowed) {
            assert!(attempts.len() < 5, "more than {allowed:?} later than tokio-postgres: {attempts:?}");
            attempts.push(medians(connection, entity, rounds).await);
        }
    }
}

#[tokio::test]
async fn first_row_of_20_kb_arrives_within_3_ms_of_plain_tokio_postgres() {
    let database = Database::with(
        "CREATE TABLE wide AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 20000)) AS data FROM generate_series(0, 199) i",
    );
    assert_barely_later(&database, "wide", (41, Duration::from_millis(3))).await;
}

#[tokio::test]
async fn first_row_is_not_held_back_until_a_chunk_is_full() {
    // At 5 ms per row, waiting for all twenty would take a tenth of a second.
    let database = Database::with(&trickle("slow", 20, 0.005));
    assert_barely_later(&database, "slow", (7, Duration::from_millis(40))).await;
}

#[tokio::test]
async fn only_row_of_a_short_result_arrives_within_1_ms_of_plain_tokio_postgres() {
    let database = Database::with(
        "CREATE TABLE one AS SELECT jsonb_build_object('id', 0, 'pad', repeat('x', 10000)) AS data",
    );
    assert_barely_later(&database, "one", (101, Duration::from_millis(1))).await;
}
