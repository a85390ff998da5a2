//! Parses the JSON lines that a collector writes into flat records for tests.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Attributes by name. Integers are numbers here, although OTLP's JSON writes them as strings.
type Attributes = BTreeMap<String, Value>;

/// A span.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Span {
    /// The name.
    pub name: String,
    /// The trace id, as 32 hexadecimal digits.
    pub trace_id: String,
    /// The span id, as 16 hexadecimal digits.
    pub span_id: String,
    /// The span id of the parent; empty for a root span.
    pub parent_span_id: String,
    /// `internal`, `server`, `client`, `producer`, `consumer`, or `unspecified`.
    pub kind: &'static str,
    /// The start time, in ns since the Unix epoch.
    pub start_ns: u64,
    /// The end time, in ns since the Unix epoch.
    pub end_ns: u64,
    /// The attributes.
    pub attributes: BTreeMap<String, Value>,
    /// The events.
    pub events: Vec<Event>,
    /// `unset`, `ok` or `error`.
    pub status_code: &'static str,
    /// The description of an error.
    pub status_message: String,
    /// The attributes of the resource.
    pub resource: BTreeMap<String, Value>,
    /// The name of the instrumentation scope.
    pub scope: String,
}

/// An event of a span.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// The name.
    pub name: String,
    /// The time, in ns since the Unix epoch.
    pub time_ns: u64,
    /// The attributes.
    pub attributes: BTreeMap<String, Value>,
}

/// A log record.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Log {
    /// The body, usually a string.
    pub body: Value,
    /// The severity text, such as `INFO`.
    pub severity: String,
    /// The event name; empty if the record is not an event.
    pub event_name: String,
    /// The trace id; empty if there is none.
    pub trace_id: String,
    /// The span id; empty if there is none.
    pub span_id: String,
    /// The attributes.
    pub attributes: BTreeMap<String, Value>,
    /// The attributes of the resource.
    pub resource: BTreeMap<String, Value>,
    /// The name of the instrumentation scope.
    pub scope: String,
}

/// A metric of one export.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Metric {
    /// The name.
    pub name: String,
    /// The unit.
    pub unit: String,
    /// The description.
    pub description: String,
    /// `histogram`, `exponential_histogram`, `sum`, `gauge`, or `unknown`.
    pub kind: &'static str,
    /// Whether the metric is a monotonic sum; `false` for an up-down counter.
    pub monotonic: bool,
    /// `cumulative`, `delta`, or `unspecified` (a gauge has none).
    pub temporality: &'static str,
    /// The data points, one per set of attributes.
    pub points: Vec<Point>,
    /// The attributes of the resource.
    pub resource: BTreeMap<String, Value>,
    /// The name of the instrumentation scope.
    pub scope: String,
}

/// A data point of a metric. A histogram has `count`, `sum`, `bounds` and `bucket_counts`; all others have `value`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Point {
    /// The attributes.
    pub attributes: BTreeMap<String, Value>,
    /// The start time of a sum or histogram, in ns since the Unix epoch.
    pub start_ns: u64,
    /// The time of collection, in ns since the Unix epoch.
    pub time_ns: u64,
    /// The value of a sum or gauge.
    pub value: Option<f64>,
    /// The number of measurements in a histogram.
    pub count: u64,
    /// The sum of the measurements in a histogram.
    pub sum: f64,
    /// The bucket boundaries of a histogram.
    pub bounds: Vec<f64>,
    /// The bucket counts of a histogram, one more than `bounds`.
    pub bucket_counts: Vec<u64>,
}

impl Metric {
    /// Returns the first point whose attributes include all of these names and string values.
    pub fn point(&self, attributes: &[(&str, &str)]) -> Option<&Point> {
        let has = |point: &Point, name: &str, value: &str| {
            point.attributes.get(name).is_some_and(|found| found == value)
        };
        self.points.iter().find(|point| attributes.iter().all(|(name, value)| has(point, name, value)))
    }
}

pub(super) fn spans(lines: &str) -> Vec<Span> {
    each(lines, ["resourceSpans", "scopeSpans", "spans"], |span, resource, scope| Span {
        name: text(&span["name"]),
        trace_id: text(&span["traceId"]),
        span_id: text(&span["spanId"]),
        parent_span_id: text(&span["parentSpanId"]),
        kind: variant(
            &span["kind"],
            &["unspecified", "internal", "server", "client", "producer", "consumer"],
        ),
        start_ns: integer(&span["startTimeUnixNano"]),
        end_ns: integer(&span["endTimeUnixNano"]),
        attributes: attributes(&span["attributes"]),
        events: list(&span["events"]).iter().map(event).collect(),
        status_code: variant(&span["status"]["code"], &["unset", "ok", "error"]),
        status_message: text(&span["status"]["message"]),
        resource,
        scope,
    })
}

fn event(event: &Value) -> Event {
    Event {
        name: text(&event["name"]),
        time_ns: integer(&event["timeUnixNano"]),
        attributes: attributes(&event["attributes"]),
    }
}

pub(super) fn logs(lines: &str) -> Vec<Log> {
    each(lines, ["resourceLogs", "scopeLogs", "logRecords"], |log, resource, scope| Log {
        body: any_value(&log["body"]),
        severity: text(&log["severityText"]),
        event_name: text(&log["eventName"]),
        trace_id: text(&log["traceId"]),
        span_id: text(&log["spanId"]),
        attributes: attributes(&log["attributes"]),
        resource,
        scope,
    })
}

pub(super) fn metrics(lines: &str) -> Vec<Metric> {
    const KINDS: [(&str, &str); 4] = [
        ("histogram", "histogram"),
        ("exponentialHistogram", "exponential_histogram"),
        ("sum", "sum"),
        ("gauge", "gauge"),
    ];
    each(lines, ["resourceMetrics", "scopeMetrics", "metrics"], |metric, resource, scope| {
        let (key, kind) =
            KINDS.into_iter().find(|(key, _)| metric.get(key).is_some()).unwrap_or(("", "unknown"));
        let data = &metric[key];
        Metric {
            name: text(&metric["name"]),
            unit: text(&metric["unit"]),
            description: text(&metric["description"]),
            kind,
            monotonic: data["isMonotonic"].as_bool().unwrap_or_default(),
            temporality: variant(&data["aggregationTemporality"], &["unspecified", "delta", "cumulative"]),
            points: list(&data["dataPoints"]).iter().map(point).collect(),
            resource,
            scope,
        }
    })
}

fn point(point: &Value) -> Point {
    Point {
        attributes: attributes(&point["attributes"]),
        start_ns: integer(&point["startTimeUnixNano"]),
        time_ns: integer(&point["timeUnixNano"]),
        value: point.get("asDouble").or_else(|| point.get("asInt")).map(float),
        count: integer(&point["count"]),
        sum: float(&point["sum"]),
        bounds: list(&point["explicitBounds"]).iter().map(float).collect(),
        bucket_counts: list(&point["bucketCounts"]).iter().map(integer).collect(),
    }
}

/// Calls `make` for every record, with its resource and scope. Skips a last line that is still being written.
fn each<T>(
    lines: &str,
    [resources, scopes, records]: [&str; 3],
    make: impl Fn(&Value, Attributes, String) -> T,
) -> Vec<T> {
    let complete = lines.rsplit_once('\n').map_or("", |(complete, _)| complete);
    let batches: Vec<Value> = complete.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let mut found = Vec::new();
    for resource in batches.iter().flat_map(|batch| list(&batch[resources])) {
        let resource_attributes = attributes(&resource["resource"]["attributes"]);
        for scope in list(&resource[scopes]) {
            let name = text(&scope["scope"]["name"]);
            let record = |record| make(record, resource_attributes.clone(), name.clone());
            found.extend(list(&scope[records]).iter().map(record));
        }
    }
    found
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Returns the name of an enum value. A missing number is 0.
fn variant(value: &Value, names: &[&'static str]) -> &'static str {
    let index = usize::try_from(integer(value)).unwrap_or_default();
    names.get(index).copied().unwrap_or("unknown")
}

/// Parses an integer, which OTLP's JSON writes as a string if it has 64 bits.
fn integer(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
}

fn float(value: &Value) -> f64 {
    value.as_f64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
}

fn attributes(list: &Value) -> Attributes {
    pairs(list).collect()
}

fn pairs(pairs: &Value) -> impl Iterator<Item = (String, Value)> {
    list(pairs).iter().map(|pair| (text(&pair["key"]), any_value(&pair["value"])))
}

/// Converts an OTLP value (`{"intValue": "3"}`) to plain JSON (`3`).
fn any_value(value: &Value) -> Value {
    let Some((kind, value)) = value.as_object().and_then(|object| object.iter().next()) else {
        return Value::Null;
    };
    match kind.as_str() {
        "intValue" => value
            .as_str()
            .and_then(|digits| digits.parse::<i64>().ok())
            .map_or_else(|| value.clone(), Value::from),
        "arrayValue" => list(&value["values"]).iter().map(any_value).collect(),
        "kvlistValue" => Value::Object(pairs(&value["values"]).collect::<Map<_, _>>()),
        _ => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_converted_to_plain_json() {
        let value = serde_json::json!({"kvlistValue": {"values": [
            {"key": "n", "value": {"intValue": "-3"}},
            {"key": "list", "value": {"arrayValue": {"values": [{"boolValue": true}, {"doubleValue": 0.5}, {}]}}},
        ]}});
        assert_eq!(any_value(&value), serde_json::json!({"n": -3, "list": [true, 0.5, null]}));
    }

    #[test]
    fn line_that_is_still_being_written_is_skipped() {
        let line = r#"{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"one"}}]}]}]}"#;
        assert_eq!(logs(&format!("{line}\n{line}")).len(), 1);
        assert_eq!(logs(&format!("{line}\n{line}\n")).len(), 2);
        assert_eq!(logs("").len(), 0);
    }
}
