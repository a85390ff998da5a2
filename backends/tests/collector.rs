//! The private collector: tests can inspect what it receives, and it never outlives its owner.

use std::process::Command;
use std::time::Duration;

use backends::{Collector, collector_program, http, wait_until};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(10);

fn send(collector: &Collector, signal: &str, body: &serde_json::Value) {
    let (status, answer) =
        http::post_json(collector.http_port(), &format!("/v1/{signal}"), &body.to_string())
            .expect("the collector answers");
    assert_eq!(status, 200, "{answer}");
}

fn resource() -> serde_json::Value {
    json!({"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]})
}

#[test]
fn histogram_is_received_unchanged_and_exposed_under_the_same_name() {
    let collector = Collector::start().unwrap();
    let point = json!({
        "attributes": [{"key": "entity", "value": {"stringValue": "orders"}}],
        "startTimeUnixNano": "1000000000", "timeUnixNano": "2000000000",
        "count": "3", "sum": 250.5, "explicitBounds": [10, 50, 200, 240], "bucketCounts": ["1", "0", "1", "0", "1"],
    });
    let histogram = json!({"aggregationTemporality": 2, "dataPoints": [point]});
    let metrics =
        json!([{"name": "fraiseql_channel_occupancy_rows", "unit": "{row}", "histogram": histogram}]);
    let scope = json!({"scope": {"name": "test.scope"}, "metrics": metrics});
    send(
        &collector,
        "metrics",
        &json!({"resourceMetrics": [{"resource": resource(), "scopeMetrics": [scope]}]}),
    );

    assert!(wait_until(TIMEOUT, || !collector.metrics().is_empty()), "{}", collector.debug_log());
    let metric = collector.metric("fraiseql_channel_occupancy_rows").unwrap();
    assert_eq!((metric.kind, metric.temporality, metric.unit.as_str()), ("histogram", "cumulative", "{row}"));
    assert_eq!((metric.scope.as_str(), &metric.resource["service.name"]), ("test.scope", &json!("shop")));
    let point = metric.point(&[("entity", "orders")]).unwrap();
    assert_eq!((point.count, point.bucket_counts.as_slice()), (3, &[1, 0, 1, 0, 1][..]));
    assert_eq!(point.bounds, [10.0, 50.0, 200.0, 240.0]);
    assert!((point.sum - 250.5).abs() < f64::EPSILON && point.value.is_none());
    assert!(metric.point(&[("entity", "users")]).is_none());

    let line = |text: &str| {
        text.lines().any(|line| line.starts_with("fraiseql_channel_occupancy_rows_bucket{entity=\"orders\""))
    };
    assert!(
        wait_until(TIMEOUT, || line(&collector.prometheus_text().unwrap())),
        "{}",
        collector.prometheus_text().unwrap()
    );
}

#[test]
fn span_and_log_record_are_received_with_all_fields() {
    let collector = Collector::start().unwrap();
    let (trace, id, parent) = ("0af7651916cd43dd8448eb211c80319c", "0102030405060708", "0102030405060709");
    let span = json!({
        "traceId": trace, "spanId": id, "parentSpanId": parent, "name": "SELECT orders", "kind": 3,
        "startTimeUnixNano": "1000000000", "endTimeUnixNano": "3000000000",
        "attributes": [{"key": "rows", "value": {"intValue": "42"}}],
        "events": [{"name": "first row", "timeUnixNano": "2000000000"}],
        "status": {"code": 2, "message": "lost"},
    });
    let scope = json!({"scope": {"name": "test.scope"}, "spans": [span]});
    send(&collector, "traces", &json!({"resourceSpans": [{"resource": resource(), "scopeSpans": [scope]}]}));
    let log =
        json!({"body": {"stringValue": "hello"}, "severityText": "INFO", "traceId": trace, "spanId": id});
    let scope = json!({"scope": {"name": "test.scope"}, "logRecords": [log]});
    send(&collector, "logs", &json!({"resourceLogs": [{"resource": resource(), "scopeLogs": [scope]}]}));

    // Stopping the collector writes out everything it has received.
    collector.stop().unwrap();
    let span = &collector.spans()[0];
    assert_eq!((span.name.as_str(), span.kind, span.status_code), ("SELECT orders", "client", "error"));
    assert_eq!(
        (span.trace_id.as_str(), span.span_id.as_str(), span.parent_span_id.as_str()),
        (trace, id, parent)
    );
    assert_eq!(
        (span.start_ns, span.end_ns, span.events[0].time_ns),
        (1_000_000_000, 3_000_000_000, 2_000_000_000)
    );
    assert_eq!((&span.attributes["rows"], span.status_message.as_str()), (&json!(42), "lost"));
    let log = &collector.logs()[0];
    assert_eq!((log.body.as_str(), log.severity.as_str(), log.span_id.as_str()), (Some("hello"), "INFO", id));
}

#[test]
fn killed_collector_refuses_connections_until_it_is_restarted_at_the_same_endpoints() {
    let mut collector = Collector::start().unwrap();
    let (grpc, http) = (collector.grpc_endpoint(), collector.http_endpoint());
    collector.kill().unwrap();
    assert!(http::get(collector.http_port(), "/").is_err());
    collector.restart().unwrap();
    assert_eq!((collector.grpc_endpoint(), collector.http_endpoint()), (grpc, http));
    send(&collector, "traces", &json!({"resourceSpans": []}));
}

#[test]
fn dropped_collector_stops_listening() {
    let collector = Collector::start().unwrap();
    let port = collector.http_port();
    drop(collector);
    assert!(http::get(port, "/").is_err());
}

#[test]
fn invalid_configuration_is_rejected() {
    let program = collector_program().unwrap();
    let validate =
        |config: &str| Command::new(&program).args(["validate", "--config", config]).output().unwrap();
    let output = validate("yaml:receivers: {otlp: {protocols: {nonsense: {}}}}");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("nonsense"), "{output:?}");
}
