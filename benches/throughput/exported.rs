//! Checks what the collector received from a run with telemetry.

use backends::Collector;
use serde_json::Value;

use crate::plan::{Case, Kind};
use crate::{Failure, f64_of};

/// Stops the collector and checks that the metrics it received count every row. Returns the share of the query spans
/// that it received.
pub(crate) fn check(collector: &Collector, case: &Case) -> Result<f64, Failure> {
    // Stopping it writes out everything, and leaves the CPU to the next run.
    collector.stop()?;
    let entity = case.entity();
    let warm_up = case.warm_up();
    // The warm-up queries are in the telemetry as well.
    let rows = f64_of(case.all_rows() + case.warm_up_rows());
    let queries = f64_of(case.all_queries() + warm_up.queries * case.streams as u64);

    let metrics = collector.metrics();
    let counters = metrics.iter().filter(|metric| metric.name == "fraiseql.stream.rows");
    let mut points =
        counters.filter_map(|metric| metric.point(&[("entity", &entity), ("outcome", "yielded")]));
    if !points.any(|point| point.value == Some(rows)) {
        return Err(
            format!("the collector did not receive fraiseql.stream.rows = {rows} for {entity}").into()
        );
    }

    let name = format!("SELECT {entity}");
    let mut spans = collector.spans();
    spans.retain(|span| span.name == name);
    let received = f64_of(spans.len() as u64) / queries;
    let rows = Value::from(case.size.rows);
    let have_rows = spans.iter().any(|span| span.attributes.get("fraiseql.rows") == Some(&rows));
    // Thousands of short queries per second fill the exporter's queue, which then drops spans.
    if !have_rows || (case.kind != Kind::Short && received < 1.0) {
        return Err(format!("the collector received {} of {queries} spans of {entity}", spans.len()).into());
    }
    Ok(received)
}
