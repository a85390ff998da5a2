//! The variables of the specification that have no effect. Each one that is set causes one warning.

use super::env::{Lookup, Variables};
use super::error::InitError;

const NO_TRUNCATION: &str = "the SDK does not shorten values";
const NO_RECORD_LIMIT: &str = "the SDK does not limit log records";
const NO_ZIPKIN: &str = "there is no Zipkin exporter; send OTLP to a collector, which can export to Zipkin";
const NO_PROMETHEUS: &str = "there is no Prometheus exporter; send OTLP to Prometheus itself, or to a collector that Prometheus scrapes";

/// Each variable, and why it has no effect or what to do instead.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("OTEL_LOG_LEVEL", "the SDK's own log is off, and failed exports are logged in any case"),
    ("OTEL_ENTITIES", "the SDK has no entities; use OTEL_RESOURCE_ATTRIBUTES"),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", NO_TRUNCATION),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", NO_TRUNCATION),
    ("OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT", NO_TRUNCATION),
    ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", NO_RECORD_LIMIT),
    ("OTEL_EXPORTER_OTLP_SPAN_INSECURE", "it is obsolete; use OTEL_EXPORTER_OTLP_TRACES_INSECURE"),
    ("OTEL_EXPORTER_OTLP_METRIC_INSECURE", "it is obsolete; use OTEL_EXPORTER_OTLP_METRICS_INSECURE"),
    ("OTEL_EXPORTER_ZIPKIN_ENDPOINT", NO_ZIPKIN),
    ("OTEL_EXPORTER_ZIPKIN_TIMEOUT", NO_ZIPKIN),
    ("OTEL_EXPORTER_ZIPKIN_PROTOCOL", NO_ZIPKIN),
    ("OTEL_EXPORTER_PROMETHEUS_HOST", NO_PROMETHEUS),
    ("OTEL_EXPORTER_PROMETHEUS_PORT", NO_PROMETHEUS),
    ("OTEL_METRICS_EXEMPLAR_FILTER", "the SDK records no exemplars"),
];

/// Warns of each variable that is set and has no effect.
pub(super) fn warn(env: &mut Variables<'_>) {
    for &(name, why) in UNSUPPORTED {
        let Some(value) = env.get(name) else { continue };
        // Without exemplars, this filter is in effect.
        if (name, value.to_ascii_lowercase().as_str()) != ("OTEL_METRICS_EXEMPLAR_FILTER", "always_off") {
            env.warn(format!("{name} has no effect: {why}"));
        }
    }
}

/// Refuses a configuration file: where one is given, the specification wants all other variables ignored.
pub(super) fn refuse_config_file(lookup: Lookup<'_>) -> Result<(), InitError> {
    let env = Variables::new(lookup);
    let names = ["OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE"];
    let Some(name) = names.into_iter().find(|name| env.get(name).is_some()) else {
        return Ok(());
    };
    Err(InitError::configuration(format!(
        "{name} is set: configuration files are not supported; unset it and use the other OTEL_* variables"
    )))
}
