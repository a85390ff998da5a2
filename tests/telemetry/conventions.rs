//! Names that belong to OpenTelemetry are those of the published semantic conventions.

use std::collections::BTreeSet;

use opentelemetry_semantic_conventions::{attribute, metric};

use crate::catalogue::{Run, runs};

/// The namespaces of OpenTelemetry in which this crate has metrics or attributes.
const NAMESPACES: [&str; 3] = ["db.", "server.", "error."];

const ATTRIBUTES: [&str; 10] = [
    attribute::DB_COLLECTION_NAME,
    attribute::DB_NAMESPACE,
    attribute::DB_OPERATION_NAME,
    attribute::DB_QUERY_SUMMARY,
    attribute::DB_QUERY_TEXT,
    attribute::DB_RESPONSE_STATUS_CODE,
    attribute::DB_SYSTEM_NAME,
    attribute::ERROR_TYPE,
    attribute::SERVER_ADDRESS,
    attribute::SERVER_PORT,
];
const METRICS: [&str; 2] = [metric::DB_CLIENT_OPERATION_DURATION, metric::DB_CLIENT_RESPONSE_RETURNED_ROWS];

/// The boundaries that the conventions advise.
const DURATIONS: [f64; 9] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0];
const ROWS: [f64; 13] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0];

/// Returns the names in the namespaces of OpenTelemetry.
fn of_opentelemetry<'a>(names: impl Iterator<Item = &'a String>) -> BTreeSet<&'a str> {
    let belongs = |name: &&str| NAMESPACES.iter().any(|namespace| name.starts_with(namespace));
    names.map(String::as_str).filter(belongs).collect()
}

#[test]
fn attributes_in_the_namespaces_of_opentelemetry_are_published() {
    for Run { protocol, received, .. } in runs() {
        let points = received.metrics.iter().flat_map(|metric| &metric.points);
        let of_points = points.flat_map(|point| point.attributes.keys());
        let of_spans = received.spans.iter().flat_map(|span| span.attributes.keys());
        let of_logs = received.logs.iter().flat_map(|log| log.attributes.keys());
        let found = of_opentelemetry(of_points.chain(of_spans).chain(of_logs));
        assert_eq!(found, BTreeSet::from(ATTRIBUTES), "by {protocol}");
    }
}

#[test]
fn metrics_in_the_namespaces_of_opentelemetry_are_published_with_their_boundaries() {
    for Run { protocol, received, .. } in runs() {
        let found = of_opentelemetry(received.metrics.iter().map(|metric| &metric.name));
        assert_eq!(found, BTreeSet::from(METRICS), "by {protocol}");
        for (name, bounds) in METRICS.into_iter().zip([&DURATIONS[..], &ROWS]) {
            assert!(received.metric(name).points.iter().all(|point| point.bounds == bounds), "{name}");
        }
    }
}
