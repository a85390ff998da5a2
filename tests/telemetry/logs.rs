//! Log records: the start of a stream and its heartbeat, which report a stream whose span has not ended yet.

use std::time::Duration;

use backends::{Collector, Log, send_signal};
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::json;
use tokio::time::Instant;

use crate::received::{Received, seconds};
use crate::scenario::{self, Result, Scenario};
use crate::servers::{SILENT, database, table};

/// Longer than the interval of heartbeats, 30 s.
const LIFE: Duration = Duration::from_secs(31);
/// A stream dropped at this time is being cancelled when its heartbeat is due.
const ALMOST: Duration = Duration::from_millis(27_500);

/// Runs a stream whose consumer holds the first chunk until after a heartbeat, and two that end before.
#[test]
#[ignore = "a scenario"]
fn long_streams() -> Result {
    scenario::run_scenario(async {
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
        scenario::report(&json!({"rows": stats.rows, "bytes": stats.bytes, "buffered": stats.buffered_rows}));
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
    // Returns when the query is cancelled.
    db.client().await?;
    Ok(())
}

/// Returns the only record of the stream with this severity, which must belong to the trace and span of the query.
fn record<'a>(received: &'a Received, severity: &str) -> &'a Log {
    let of = |log: &&Log| log.severity == severity && log.attributes.get("entity") == Some(&json!("orders"));
    let records: Vec<_> = received.logs.iter().filter(of).collect();
    assert_eq!(records.len(), 1, "{:#?}", received.logs);
    let query = received.query("orders");
    assert_eq!((&records[0].trace_id, &records[0].span_id), (&query.trace_id, &query.span_id));
    records[0]
}

/// This is one test because it takes half a minute.
#[test]
fn start_and_heartbeat_are_logged_and_nothing_after_the_end_of_a_stream() {
    let collector = Collector::start().unwrap();
    let database = database(&(table("orders", 50_000) + &table("read", 10) + SILENT));
    let scenario = Scenario::new("logs::long_streams", &database);
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!(outcome.stderr, "");
    let received = Received::by(&collector);

    let scopes = received.logs.iter().map(|log| &*log.scope);
    assert!(scopes.clone().all(|scope| scope == "fraiseql_stream"), "{:?}", scopes.collect::<Vec<_>>());
    // Only one of the three streams is alive when a heartbeat is due.
    let number = |severity| received.logs.iter().filter(|log| log.severity == severity).count();
    assert_eq!((number("DEBUG"), number("INFO")), (3, 1), "{:#?}", received.logs);
    assert_eq!(received.logs.len(), 4, "{:#?}", received.logs);

    let started = record(&received, "DEBUG");
    assert_eq!((&started.body, &*started.event_name), (&json!("stream started"), "fraiseql.stream.started"));
    let heartbeat = record(&received, "INFO");
    assert_eq!(heartbeat.event_name, "fraiseql.stream.heartbeat");
    for (attribute, value) in [
        ("rows", &outcome.reported["rows"]),
        ("bytes", &outcome.reported["bytes"]),
        ("buffered_rows", &outcome.reported["buffered"]),
        ("verdict", &json!("consumer_bound")),
        ("verdict_recent", &json!("consumer_bound")),
    ] {
        assert_eq!(heartbeat.attributes.get(attribute), Some(value), "{attribute}");
    }
    let body = heartbeat.body.as_str().unwrap_or_default();
    assert!(body.starts_with("orders: 1 row, ") && body.contains("consumer-bound"), "{body}");
    let cancel = received.below(received.query("silent"), "cancel");
    assert!(seconds(cancel[0]) > 3.0, "{cancel:#?}");
    // The first row is an event of the span, not a record of the log.
    assert_eq!(received.query("orders").events.len(), 1);
}
