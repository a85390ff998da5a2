//! How a stream has ended: complete once its last row was taken, also where nobody looked for its end.

use std::time::Duration;

use backends::Collector;
use fraiseql_stream::{Connection, JsonStream, Query, RawJson, otlp};
use futures_util::StreamExt;

use crate::received::{Received, text};
use crate::scenario::{self, Result, Scenario};
use crate::servers::database;

/// How often each is read.
const ROUNDS: u32 = 10;

type Borrowed<'a> = &'a mut Connection;

/// Streams that are dropped at or before their last row.
#[test]
#[ignore = "a scenario"]
fn streams_left_at_their_last_row() -> Result {
    scenario::play(async {
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

async fn begin<'a>(
    db: &'a mut Connection,
    entity: &str,
    rows: u64,
) -> Result<JsonStream<RawJson, Borrowed<'a>>> {
    let query: Query<'_, RawJson, _> = db.query(entity);
    Ok(query.limit(rows).stream().await?)
}

/// Takes all rows, and does not ask whether there are more.
async fn leave_complete(db: &mut Connection) -> Result {
    assert_eq!(begin(db, "taken", 100).await?.take(100).count().await, 100);
    // Exactly a chunk.
    assert_eq!(begin(db, "exact", 128).await?.take(128).count().await, 128);

    let mut single = begin(db, "single", 1).await?;
    single.next().await.ok_or("no row")??;
    drop(single);

    let mut chunk = begin(db, "chunk", 100).await?;
    let rows = chunk.next_chunk().await?.ok_or("no rows")?;
    assert_eq!(rows.len(), 100);
    chunk.close().await?;

    let mut chunks = begin(db, "chunks", 400).await?;
    for _ in 0..399 {
        chunks.next().await.ok_or("no row")??;
    }
    // Behind it comes the end.
    tokio::time::sleep(Duration::from_millis(20)).await;
    chunks.next().await.ok_or("no row")??;
    Ok(())
}

/// Leaves at least a row behind.
async fn leave_early(db: &mut Connection) -> Result {
    assert_eq!(begin(db, "half", 100).await?.take(99).count().await, 99);
    drop(begin(db, "none", 1).await?);
    Ok(())
}

fn assert_outcomes(runtime: &str) {
    let views = ["taken", "exact", "single", "chunk", "chunks", "half", "none"].map(|name| {
        format!(
            "CREATE VIEW {name} AS SELECT jsonb_build_object('id', i) AS data FROM generate_series(1, 500) i;"
        )
    });
    let collector = Collector::start().expect("a collector");
    let scenario = Scenario::new("outcomes::streams_left_at_their_last_row", &database(&views.concat()));
    let outcome = scenario.to(&collector, "http/protobuf").on(runtime).run();
    assert_eq!(outcome.stderr, "");
    let received = Received::by(&collector);
    for (entity, outcome) in [
        ("taken", "complete"),
        ("exact", "complete"),
        ("single", "complete"),
        ("chunk", "complete"),
        ("chunks", "complete"),
        ("half", "dropped"),
        ("none", "dropped"),
    ] {
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
fn a_stream_whose_last_row_was_taken_is_complete() {
    assert_outcomes("two_workers");
}

#[test]
fn a_stream_whose_last_row_was_taken_is_complete_on_one_thread() {
    assert_outcomes("current_thread");
}
