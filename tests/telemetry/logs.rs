//! Log records: a stream's start and its heartbeat, which tell of a stream whose span is not there yet.

use std::time::Duration;

use backends::{Collector, Log, send_signal};
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::json;
use tokio::time::Instant;

use crate::received::{Received, seconds};
use crate::scenario::{self, Result, Scenario};
use crate::servers::{SILENT, database, table};

/// A heartbeat comes every 30 s.
const LIFE: Duration = Duration::from_secs(31);
/// A stream that is dropped so late is being cancelled when its heartbeat would come.
const ALMOST: Duration = Duration::from_millis(27_500);

/// A stream whose consumer holds the first chunk for longer than a heartbeat, beside two that are over by then.
#[test]
#[ignore = "a scenario"]
fn long_streams() -> Result {
    scenario::play(async {
        let telemetry = otlp::init()?;
        let start = Instant::now();
        let mut db = Connection::connect(&scenario::url()).await?;
        let mut orders = db.query::<RawJson>("orders").stream().await?;
        orders.next().await.ok_or("no row")??;

        let mut other = Connection::connect(&scenario::url()).await?;
        let mut read = other.query::<RawJson>("read").stream().await?;
        while read.next().await.is_some() {}
        cancel_for_long(start).await?;

        tokio::time::sleep_until(start + LIFE).await;
        let stats = orders.stats();
        scenario::tell(&json!({"rows": stats.rows, "bytes": stats.bytes, "buffered": stats.buffered_rows}));
        orders.close().await?;
        read.close().await?;
        Ok(telemetry.shutdown().await?)
    })
}

/// Drops a stream whose query takes seconds to be cancelled.
async fn cancel_for_long(start: Instant) -> Result {
    let mut db = Connection::connect(&scenario::url()).await?;
    let pid: i32 = db.client().await?.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
    let silent = db.query::<RawJson>("silent").stream().await?;
    tokio::time::sleep_until(start + ALMOST).await;
    assert!(send_signal("STOP", pid));
    drop(silent);
    tokio::time::sleep_until(start + LIFE).await;
    assert!(send_signal("CONT", pid));
    // Returns when the query is cancelled, which was not given up.
    db.client().await?;
    Ok(())
}

/// The one record of the stream with this severity, which must be of the query's trace and span.
fn record<'a>(received: &'a Received, severity: &str) -> &'a Log {
    let of = |log: &&Log| log.severity == severity && log.attributes.get("entity") == Some(&json!("orders"));
    let records: Vec<_> = received.logs.iter().filter(of).collect();
    assert_eq!(records.len(), 1, "{:#?}", received.logs);
    let query = received.query("orders");
    assert_eq!((&records[0].trace_id, &records[0].span_id), (&query.trace_id, &query.span_id));
    records[0]
}

/// One test, since half a minute passes in it.
#[test]
fn start_and_heartbeat_are_logged_with_trace_counts_and_verdict_and_nothing_once_a_stream_is_over() {
    let collector = Collector::start().unwrap();
    let database = database(&(table("orders", 50_000) + &table("read", 10) + SILENT));
    let scenario = Scenario::new("logs::long_streams", &database);
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!(outcome.stderr, "");
    let received = Received::by(&collector);

    assert_eq!(record(&received, "DEBUG").body, json!("stream started"));
    let heartbeat = record(&received, "INFO");
    for (attribute, value) in [
        ("rows", &outcome.told["rows"]),
        ("bytes", &outcome.told["bytes"]),
        ("buffered_rows", &outcome.told["buffered"]),
        ("verdict", &json!("consumer_bound")),
        ("verdict_recent", &json!("consumer_bound")),
    ] {
        assert_eq!(heartbeat.attributes.get(attribute), Some(value), "{attribute}");
    }
    let body = heartbeat.body.as_str().unwrap_or_default();
    assert!(body.starts_with("orders: 1 rows, ") && body.contains("consumer-bound"), "{body}");
    // Of the three streams one is alive when it is time for a heartbeat.
    let number = |severity| received.logs.iter().filter(|log| log.severity == severity).count();
    assert_eq!((number("DEBUG"), number("INFO")), (3, 1), "{:#?}", received.logs);
    assert_eq!(received.logs.len(), 4, "{:#?}", received.logs);
    let cancel = received.below(received.query("silent"), "cancel");
    assert!(seconds(cancel[0]) > 3.0, "{cancel:#?}");
    // The event of the first row belongs to the span and not to the log.
    assert_eq!(received.query("orders").events.len(), 1);
}
