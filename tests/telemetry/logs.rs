//! Log records: a stream's start and its heartbeat, which tell of a stream whose span is not there yet.

use std::time::Duration;

use backends::{Collector, Log};
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::json;

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::{database, table};

/// A heartbeat comes every 30 s.
const LIFE: Duration = Duration::from_millis(30_500);

/// A stream whose consumer holds the first chunk for longer than a heartbeat.
#[test]
#[ignore = "a scenario"]
fn a_long_stream() -> Result {
    scenario::play(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        let mut orders = db.query::<RawJson>("orders").stream().await?;
        orders.next().await.ok_or("no row")??;
        tokio::time::sleep(LIFE).await;
        let stats = orders.stats();
        scenario::tell(&json!({"rows": stats.rows, "bytes": stats.bytes, "buffered": stats.buffered_rows}));
        orders.close().await?;
        Ok(telemetry.shutdown().await?)
    })
}

/// The one record with this severity, which must be of the query's trace and span.
fn record<'a>(received: &'a Received, severity: &str) -> &'a Log {
    let records: Vec<_> = received.logs.iter().filter(|log| log.severity == severity).collect();
    assert_eq!(records.len(), 1, "{:#?}", received.logs);
    let query = received.query("orders");
    assert_eq!((&records[0].trace_id, &records[0].span_id), (&query.trace_id, &query.span_id));
    assert_eq!(records[0].attributes.get("entity"), Some(&json!("orders")));
    records[0]
}

/// One test, since half a minute passes in it.
#[test]
fn start_and_heartbeat_are_logged_with_trace_counts_and_verdict_and_nothing_else_is() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("logs::a_long_stream", &database(&table("orders", 50_000)));
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
    assert_eq!(received.logs.len(), 2, "{:#?}", received.logs);
    // The event of the first row belongs to the span and not to the log.
    assert_eq!(received.query("orders").events.len(), 1);
}
