//! An unreachable collector costs telemetry and a line in the log at either end of the outage, never a row.

use std::time::Duration;

use backends::{Collector, wait_until};
use fraiseql_stream::{Connection, PollSpans, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::{database, table};

const ROWS: u32 = 20_000;
const SOON: Duration = Duration::from_secs(10);

/// Runs a stream with stops, at which the test stops or starts the collector.
#[test]
#[ignore = "a scenario"]
fn a_stream_with_stops() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::builder(scenario::url()).poll_spans(PollSpans::Every).connect().await?;
        let mut rows = db.query::<RawJson>("rows").stream().await?;
        let mut read = 0;
        while let Some(row) = rows.next().await {
            row?;
            read += 1;
            if read == ROWS / 2 {
                tokio::time::sleep(Duration::from_millis(500)).await;
                scenario::announce("half");
                scenario::wait_for_resume();
            }
            if read > ROWS / 2 && read % 100 == 0 {
                // More than a second in total, with at least ten exports of each signal.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        drop(rows);
        scenario::announce("end");
        scenario::wait_for_resume();
        let mut later = db.query::<RawJson>("later").stream().await?;
        while later.next().await.is_some() {}
        drop(later);
        let error = telemetry.shutdown().await.err().map(|error| error.to_string());
        scenario::report(&json!({"read": read, "error": error}));
        Ok(())
    })
}

/// Returns the scenario with very frequent exports.
fn stream() -> Scenario {
    let database = database(&(table("rows", ROWS) + &table("later", 10)));
    Scenario::new("outage::a_stream_with_stops", &database)
        .set("OTEL_METRIC_EXPORT_INTERVAL", "100")
        .set("OTEL_BSP_SCHEDULE_DELAY", "100")
        .set("OTEL_BLRP_SCHEDULE_DELAY", "100")
}

/// Returns the last value of a counter for this reason of failure.
fn failures(received: &Received, name: &str, reason: &str) -> f64 {
    let metric = received.export_metrics.iter().rfind(|metric| metric.name == name).expect("the metric");
    metric.point(&[("error.type", reason)]).and_then(|point| point.value).expect("a value")
}

fn assert_outage_is_survived(protocol: &str) {
    let mut collector = Collector::start().expect("a collector");
    let mut running = stream().to(&collector, protocol).start();
    running.wait_for("half");
    let is_exported = || !collector.metrics().is_empty() && !collector.spans().is_empty();
    assert!(wait_until(SOON, is_exported), "{protocol}: nothing arrived before the outage");
    collector.kill().expect("the collector is killed");
    running.resume();
    running.wait_for("end");
    collector.restart().expect("the collector starts again");
    running.resume();
    let outcome = running.finish();

    assert_eq!(
        (&outcome.reported["read"], &outcome.reported["error"]),
        (&json!(ROWS), &Value::Null),
        "{protocol}"
    );
    let warnings = outcome.warnings();
    assert_eq!(warnings.len(), 2, "{protocol}: {}", outcome.stderr);
    assert!(warnings[0].contains("not logged until export recovers"), "{protocol}: {}", outcome.stderr);
    let received = Received::by(&collector);
    let lost = |name| failures(&received, name, "_OTHER");
    let (spans, records) = (lost("otel.sdk.exporter.span.exported"), lost("otel.sdk.exporter.log.exported"));
    let expected = format!("{spans} spans and {records} log records were lost");
    assert!(spans > 0.0 && warnings[1].ends_with(&expected), "{protocol}: {expected}: {}", outcome.stderr);
    assert!(lost("otel.sdk.exporter.metric_data_point.exported") > 0.0, "{protocol}");
    let rows = [("entity", "rows"), ("outcome", "yielded")];
    assert_eq!(received.value("fraiseql.stream.rows", &rows), f64::from(ROWS), "{protocol}");
    let later = received.query("later");
    assert!(received.logs.iter().any(|log| log.trace_id == later.trace_id), "{protocol}");
}

#[test]
fn collector_lost_in_mid_stream_costs_no_row_and_two_lines_by_http() {
    assert_outage_is_survived("http/protobuf");
}

#[test]
fn collector_lost_in_mid_stream_costs_no_row_and_two_lines_by_grpc() {
    assert_outage_is_survived("grpc");
}

#[test]
fn collector_that_accepts_only_traces_is_logged_once() {
    let collector = Collector::start().unwrap();
    // There is no listener on port 9.
    let scenario = stream().to(&collector, "http/protobuf");
    let mut running =
        scenario.set("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:9/v1/metrics").start();
    running.wait_for("half");
    running.resume();
    running.wait_for("end");
    running.resume();
    let outcome = running.finish();
    assert_eq!(outcome.reported["read"], json!(ROWS));
    assert_eq!(outcome.warnings().len(), 1, "{}", outcome.stderr);
    for text in [&outcome.stderr, &outcome.reported["error"].to_string()] {
        assert!(text.contains("http://127.0.0.1:9") && text.contains("metrics"), "{text}");
        assert!(!text.contains("traces"), "{text}");
    }
    let received = Received::by(&collector);
    assert!(received.metrics.is_empty());
    assert_eq!((received.queries("rows").len(), received.queries("later").len()), (1, 1));
}

/// Records far more spans than the queue has room for.
#[test]
fn dropped_spans_are_counted_and_logged_once_a_minute() {
    let collector = Collector::start().unwrap();
    let mut running = stream()
        .to(&collector, "http/protobuf")
        .set("OTEL_BSP_MAX_QUEUE_SIZE", "4")
        .set("OTEL_BSP_SCHEDULE_DELAY", "50")
        .start();
    running.wait_for("half");
    running.resume();
    running.wait_for("end");
    running.resume();
    let outcome = running.finish();
    assert_eq!((&outcome.reported["read"], &outcome.reported["error"]), (&json!(ROWS), &Value::Null));
    let received = Received::by(&collector);
    let processed = "otel.sdk.processor.span.processed";
    let dropped = failures(&received, processed, "queue_full");
    let metric = received.export_metrics.iter().rfind(|metric| metric.name == processed).unwrap();
    let kept = metric.points.iter().find(|point| !point.attributes.contains_key("error.type"));
    let kept = kept.and_then(|point| point.value).expect("a value");
    let arrived = received.spans.len() as f64;
    assert!(
        dropped > 0.0 && kept > 0.0 && kept <= arrived,
        "{dropped} dropped, {kept} kept, {arrived} arrived"
    );
    let warnings = outcome.warnings();
    assert_eq!(warnings.len(), 1, "{}", outcome.stderr);
    assert!(warnings[0].contains(" spans were dropped: "), "{}", outcome.stderr);
    assert!(warnings[0].contains("OTEL_BSP_MAX_QUEUE_SIZE"), "{}", outcome.stderr);
}
