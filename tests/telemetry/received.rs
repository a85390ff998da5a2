//! The telemetry received by a collector.

use std::time::Duration;

use backends::{Collector, Log, Metric, Point, Span, wait_until};
use serde_json::Value;

/// All telemetry received by a collector, read after it has written everything.
pub(crate) struct Received {
    pub(crate) spans: Vec<Span>,
    pub(crate) logs: Vec<Log>,
    /// Those of streams.
    pub(crate) metrics: Vec<Metric>,
    /// Those of the export itself.
    pub(crate) export_metrics: Vec<Metric>,
    /// The same as the collector's debug exporter prints it.
    pub(crate) text: String,
}

impl Received {
    /// Stops the collector, which makes it write everything, and reads that.
    pub(crate) fn by(collector: &Collector) -> Self {
        collector.stop().expect("the collector stops");
        let of_streams = |metric: &Metric| metric.scope != "fraiseql_stream.otlp";
        let (metrics, export_metrics) = collector.metrics().into_iter().partition(of_streams);
        Self {
            spans: collector.spans(),
            logs: collector.logs(),
            metrics,
            export_metrics,
            text: collector.debug_log(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.spans.is_empty() && self.logs.is_empty() && self.metrics.is_empty()
    }

    /// Returns the last export of a metric.
    pub(crate) fn metric(&self, name: &str) -> &Metric {
        let found = self.metrics.iter().rfind(|metric| metric.name == name);
        found.unwrap_or_else(|| panic!("no metric {name}"))
    }

    /// Returns the last point with these attributes.
    pub(crate) fn point(&self, name: &str, attributes: &[(&str, &str)]) -> &Point {
        let found = self.metric(name).point(attributes);
        found.unwrap_or_else(|| panic!("no {name}{attributes:?}: {:?}", self.metric(name).points))
    }

    /// Returns the last value of a sum or gauge.
    pub(crate) fn value(&self, name: &str, attributes: &[(&str, &str)]) -> f64 {
        let point = self.point(name, attributes);
        point.value.unwrap_or_else(|| panic!("{name} has no value"))
    }

    /// Returns the spans of queries for this entity.
    pub(crate) fn queries(&self, entity: &str) -> Vec<&Span> {
        let of = |span: &&Span| is_query(span) && text(span, "db.collection.name") == entity;
        self.spans.iter().filter(of).collect()
    }

    /// Returns the span of the only query for this entity.
    pub(crate) fn query(&self, entity: &str) -> &Span {
        let queries = self.queries(entity);
        assert_eq!(queries.len(), 1, "queries for {entity}: {queries:#?}");
        queries[0]
    }

    /// Returns the children of a span with this name, in the order of their start.
    pub(crate) fn below(&self, parent: &Span, name: &str) -> Vec<&Span> {
        let is_child = |span: &&Span| span.parent_span_id == parent.span_id && span.name == name;
        let mut found: Vec<_> = self.spans.iter().filter(is_child).collect();
        found.sort_by_key(|span| span.start_ns);
        found
    }
}

fn is_query(span: &Span) -> bool {
    span.name.starts_with("SELECT ")
}

/// Returns the text of an attribute, or an empty one if it is missing.
pub(crate) fn text<'a>(span: &'a Span, attribute: &str) -> &'a str {
    span.attributes.get(attribute).and_then(Value::as_str).unwrap_or_default()
}

/// Returns an attribute that must be an integer.
pub(crate) fn integer(span: &Span, attribute: &str) -> i64 {
    let value = span.attributes.get(attribute);
    let number = value.and_then(Value::as_i64);
    number.unwrap_or_else(|| panic!("{attribute} of {} is {value:?}", span.name))
}

/// Returns an attribute that must be a number.
pub(crate) fn number(span: &Span, attribute: &str) -> f64 {
    let value = span.attributes.get(attribute);
    let number = value.and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("{attribute} of {} is {value:?}", span.name))
}

pub(crate) fn seconds(span: &Span) -> f64 {
    Duration::from_nanos(span.end_ns.saturating_sub(span.start_ns)).as_secs_f64()
}

/// Whether two times differ by at most 1 % or 10 µs.
pub(crate) fn about(one: f64, other: f64) -> bool {
    (one - other).abs() <= (0.01 * one.max(other)).max(0.000_01)
}

/// Waits until the collector's Prometheus text has a line with this beginning, and returns all such lines.
pub(crate) fn prometheus_lines(collector: &Collector, beginning: &str) -> Vec<String> {
    let mut lines = Vec::new();
    wait_until(Duration::from_secs(10), || {
        let text = collector.prometheus_text().unwrap_or_default();
        let begins = |line: &&str| line.starts_with(beginning);
        lines = text.lines().filter(begins).map(ToOwned::to_owned).collect();
        !lines.is_empty()
    });
    lines
}
