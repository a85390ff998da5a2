//! `docs/environment.md` lists every variable of the specification, which ones have no effect, and the metrics of the
//! export.

use std::collections::BTreeSet;

use backends::Collector;
use serde_json::json;

use crate::received::Received;
use crate::scenario::Scenario;
use crate::servers::{Database, database, table};

const DOCUMENT: &str = include_str!("../../docs/environment.md");

/// The variables of the specification's pages, without the variants of single signals.
const SPECIFIED: &str = "
    OTEL_SDK_DISABLED OTEL_ENTITIES OTEL_RESOURCE_ATTRIBUTES OTEL_SERVICE_NAME OTEL_LOG_LEVEL OTEL_PROPAGATORS
    OTEL_TRACES_SAMPLER OTEL_TRACES_SAMPLER_ARG
    OTEL_BSP_SCHEDULE_DELAY OTEL_BSP_EXPORT_TIMEOUT OTEL_BSP_MAX_QUEUE_SIZE OTEL_BSP_MAX_EXPORT_BATCH_SIZE
    OTEL_BLRP_SCHEDULE_DELAY OTEL_BLRP_EXPORT_TIMEOUT OTEL_BLRP_MAX_QUEUE_SIZE OTEL_BLRP_MAX_EXPORT_BATCH_SIZE
    OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT OTEL_ATTRIBUTE_COUNT_LIMIT
    OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT OTEL_SPAN_EVENT_COUNT_LIMIT
    OTEL_SPAN_LINK_COUNT_LIMIT OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT OTEL_LINK_ATTRIBUTE_COUNT_LIMIT
    OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT
    OTEL_EXPORTER_ZIPKIN_ENDPOINT OTEL_EXPORTER_ZIPKIN_TIMEOUT OTEL_EXPORTER_ZIPKIN_PROTOCOL
    OTEL_EXPORTER_PROMETHEUS_HOST OTEL_EXPORTER_PROMETHEUS_PORT
    OTEL_TRACES_EXPORTER OTEL_METRICS_EXPORTER OTEL_LOGS_EXPORTER
    OTEL_METRICS_EXEMPLAR_FILTER OTEL_METRIC_EXPORT_INTERVAL OTEL_METRIC_EXPORT_TIMEOUT
    OTEL_CONFIG_FILE OTEL_EXPERIMENTAL_CONFIG_FILE
    OTEL_EXPORTER_OTLP_ENDPOINT OTEL_EXPORTER_OTLP_INSECURE OTEL_EXPORTER_OTLP_SPAN_INSECURE
    OTEL_EXPORTER_OTLP_METRIC_INSECURE OTEL_EXPORTER_OTLP_CERTIFICATE OTEL_EXPORTER_OTLP_CLIENT_KEY
    OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE OTEL_EXPORTER_OTLP_HEADERS OTEL_EXPORTER_OTLP_COMPRESSION
    OTEL_EXPORTER_OTLP_TIMEOUT OTEL_EXPORTER_OTLP_PROTOCOL
    OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION
";

/// Returns the variables that have a row in this part of the document.
fn rows(part: &str) -> Vec<&str> {
    let name = |line: &'static str| line.strip_prefix("| `")?.split('`').next();
    let lines = DOCUMENT.split("\n## ").filter(|section| section.starts_with(part)).flat_map(str::lines);
    lines.filter_map(name).collect()
}

fn orders() -> Database {
    database(&table("orders", 1_000))
}

#[test]
fn each_variable_of_the_specification_is_documented_once() {
    let mut rows = rows("");
    rows.retain(|name| name.starts_with("OTEL_"));
    let documented: BTreeSet<_> = rows.iter().copied().collect();
    assert_eq!(rows.len(), documented.len(), "{rows:?}");
    assert_eq!(documented, SPECIFIED.split_whitespace().collect());
}

#[test]
fn each_variable_without_effect_causes_one_warning() {
    let names = rows("Without effect");
    assert!(names.len() > 10, "{names:?}");
    let collector = Collector::start().unwrap();
    let mut scenario = Scenario::new("environment::one_stream", &orders()).to(&collector, "http/protobuf");
    for name in &names {
        scenario = scenario.set(name, "1");
    }
    let outcome = scenario.run();
    for name in &names {
        let about = |line: &&&str| line.contains(&format!("{name} has no effect: "));
        assert_eq!(outcome.warnings().iter().filter(about).count(), 1, "{name}: {}", outcome.stderr);
    }
    assert_eq!(outcome.warnings().len(), names.len(), "{}", outcome.stderr);
    assert_eq!(Received::by(&collector).queries("orders").len(), 1);
}

#[test]
fn exemplar_filter_that_is_in_effect_causes_no_warning() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("environment::one_stream", &orders()).to(&collector, "http/protobuf");
    assert_eq!(scenario.set("OTEL_METRICS_EXEMPLAR_FILTER", "Always_Off").run().stderr, "");
}

#[test]
fn configuration_file_fails_the_set_up() {
    for name in ["OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE"] {
        let scenario = Scenario::new("service::failing_set_up", &orders()).set(name, "/etc/otel.yaml");
        let error = scenario.run().reported;
        assert_eq!((&error["kind"], &error["has_source"]), (&json!("Configuration"), &json!(false)));
        let text = error["text"].as_str().unwrap_or_default();
        assert!(
            text.starts_with(&format!("{name} is set: configuration files are not supported;")),
            "{text}"
        );
    }
}

#[test]
fn each_metric_of_the_export_is_documented() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("environment::one_stream", &orders()).to(&collector, "http/protobuf");
    assert_eq!(scenario.run().stderr, "");
    let received = Received::by(&collector);
    let exported: BTreeSet<_> = received.export_metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert_eq!(exported, rows("Failures of the export").into_iter().collect());
}
