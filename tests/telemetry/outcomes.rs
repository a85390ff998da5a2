//! The outcome of a stream: complete once its last row was taken, even if its end was never polled.

use std::time::Duration;

use backends::Collector;
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;

use crate::received::{Received, text};
use crate::scenario::{self, Result, Scenario};
use crate::servers::database;

/// The number of times each stream is run.
const ROUNDS: u32 = 10;

/// Views and limits: less than a chunk, one chunk, and several.
const LIMITED: [(&str, u64); 4] = [("one", 1), ("few", 100), ("chunk", 128), ("many", 300)];

/// Drops streams at or before their last row.
#[test]
#[ignore = "a scenario"]
fn streams_left_at_their_last_row() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        for _ in 0..ROUNDS {
            leave_complete(&mut db).await?;
            leave_early(&mut db).await?;
        }
        db.close().await?;
        Ok(telemetry.shutdown().await?)
    })
}

/// Long enough for the end to arrive after the rows.
const SOON: Duration = Duration::from_millis(20);

/// Takes all rows, and does not poll for the end.
async fn leave_complete(db: &mut Connection) -> Result {
    for (entity, rows) in LIMITED {
        let stream = db.query::<RawJson>(entity).limit(rows).stream().await?;
        assert_eq!(stream.take(usize::try_from(rows)?).count().await, usize::try_from(rows)?);
    }
    let mut single = db.query::<RawJson>("single").stream().await?;
    single.next().await.ok_or("no row")??;
    tokio::time::sleep(SOON).await;
    drop(single);

    let mut chunks = db.query::<RawJson>("chunks").stream().await?;
    let mut rows = 0;
    while rows < 300 {
        rows += chunks.next_chunk().await?.ok_or("no rows")?.len();
    }
    tokio::time::sleep(SOON).await;
    Ok(())
}

/// Leaves at least one row.
async fn leave_early(db: &mut Connection) -> Result {
    let stream = db.query::<RawJson>("behind").limit(100).stream().await?;
    assert_eq!(stream.take(99).count().await, 99);
    let mut held = db.query::<RawJson>("held").stream().await?;
    held.next().await.ok_or("no row")??;
    tokio::time::sleep(SOON).await;
    drop(held);
    drop(db.query::<RawJson>("unread").stream().await?);
    Ok(())
}

fn assert_outcomes(runtime: &str) {
    let rows = [("single", 1), ("chunks", 300), ("behind", 300), ("held", 2), ("unread", 1)];
    let views = LIMITED.map(|(name, _)| (name, 500)).into_iter().chain(rows).map(|(name, rows)| {
        format!("CREATE VIEW {name} AS SELECT jsonb_build_object('id', i) AS data FROM generate_series(1, {rows}) i;")
    });
    let collector = Collector::start().expect("a collector");
    let scenario =
        Scenario::new("outcomes::streams_left_at_their_last_row", &database(&views.collect::<String>()));
    let outcome = scenario.to(&collector, "http/protobuf").on(runtime).run();
    assert_eq!(outcome.stderr, "");
    let received = Received::by(&collector);
    let complete = LIMITED.map(|(entity, _)| entity).into_iter().chain(["single", "chunks"]);
    let dropped = ["behind", "held", "unread"].map(|entity| (entity, "dropped"));
    for (entity, outcome) in complete.map(|entity| (entity, "complete")).chain(dropped) {
        for of in ["complete", "dropped"] {
            let streams = received.value("fraiseql.stream.ended", &[("entity", entity), ("outcome", of)]);
            assert_eq!(streams, if of == outcome { f64::from(ROUNDS) } else { 0.0 }, "{entity} {of}");
        }
        let outcomes: Vec<_> =
            received.queries(entity).iter().map(|span| text(span, "fraiseql.outcome").to_owned()).collect();
        assert_eq!(outcomes, vec![outcome; ROUNDS as usize], "{entity}");
    }
}

#[test]
fn stream_whose_last_row_was_taken_is_complete() {
    assert_outcomes("two_workers");
}

#[test]
fn stream_whose_last_row_was_taken_is_complete_on_one_thread() {
    assert_outcomes("current_thread");
}
