//! The registry says exactly what a real collector received.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Attribute, Level, Registry, Type};
use crate::catalogue::{Run, runs};

fn names<'a>(attributes: impl IntoIterator<Item = &'a Attribute>) -> BTreeSet<&'a str> {
    attributes.into_iter().map(|attribute| attribute.name.as_str()).collect()
}

/// Asserts that the attributes of one point, span or record are those of the registry, with values of their type.
fn assert_attributes(registry: &Registry, of: &str, expected: &[Attribute], found: &BTreeMap<String, Value>) {
    let keys: BTreeSet<_> = found.keys().map(String::as_str).collect();
    let is_required = |attribute: &&Attribute| matches!(attribute.requirement_level, Level::Required);
    let missing: Vec<_> = names(expected.iter().filter(is_required)).difference(&keys).copied().collect();
    assert!(missing.is_empty(), "{of} lacks {missing:?}: {found:?}");
    let unknown: Vec<_> = keys.difference(&names(expected)).copied().collect();
    assert!(unknown.is_empty(), "{of} has {unknown:?}, which the registry lacks");
    for (key, value) in found {
        assert!(registry.accepts(key, value), "{key} of {of} is {value}");
    }
}

impl Registry {
    /// Whether a value has the type of the attribute. Accepts any value for an attribute of the conventions.
    fn accepts(&self, attribute: &str, value: &Value) -> bool {
        let Some(definition) = self.attributes.get(attribute) else { return true };
        match &definition.of {
            Type::Enum { members } => members.iter().any(|member| *value == *member.value),
            Type::Named(name) => match name.as_str() {
                "string" => value.is_string(),
                "int" => value.is_i64(),
                "double" => value.is_number(),
                other => panic!("{other} of {attribute} is no type"),
            },
        }
    }
}

fn instrument(metric: &backends::Metric) -> &'static str {
    match metric.kind {
        "sum" if metric.monotonic => "counter",
        "sum" => "updowncounter",
        other => other,
    }
}

#[test]
fn every_metric_arrives_as_the_registry_says_by_both_protocols() {
    let registry = Registry::read();
    for Run { protocol, received, .. } in runs() {
        for expected in &registry.metrics {
            let (metric, name) = (received.metric(&expected.name), &expected.name);
            let found = [instrument(metric), &metric.unit, &metric.description];
            let registered = [&expected.instrument, &expected.unit, &expected.brief];
            assert_eq!(found, registered.map(String::as_str), "{name} by {protocol}");
            let temporality = if expected.instrument == "gauge" { "unspecified" } else { "cumulative" };
            assert_eq!(metric.temporality, temporality, "{name} by {protocol}");
            for point in &metric.points {
                assert_eq!(point.bounds, expected.annotations.boundaries, "{name} by {protocol}");
                assert_attributes(&registry, name, &expected.attributes, &point.attributes);
            }
            let seen: BTreeSet<_> = metric.points.iter().flat_map(|point| point.attributes.keys()).collect();
            let unseen: Vec<_> = names(&expected.attributes)
                .into_iter()
                .filter(|key| !seen.iter().any(|seen| seen == key))
                .collect();
            assert!(unseen.is_empty(), "{name} never has {unseen:?}");
        }
    }
}

#[test]
fn no_metric_outside_the_registry_arrives() {
    let registry = Registry::read();
    let known: BTreeSet<_> = registry.metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert_eq!(known.len(), registry.metrics.len());
    for run in runs() {
        let found: BTreeSet<_> = run.received.metrics.iter().map(|metric| metric.name.as_str()).collect();
        assert_eq!(found, known, "by {}", run.protocol);
    }
}

/// The numbers from which `docs/metrics.md` computes what an entity costs.
#[test]
fn entity_has_the_registered_number_of_points_and_series_in_prometheus() {
    let registry = Registry::read();
    for run in runs() {
        for metric in &registry.metrics {
            let key = if metric.name.starts_with("db.") { "db.collection.name" } else { "entity" };
            let is_of = |attributes: &BTreeMap<String, Value>| attributes[key] == "orders";
            let points = &run.received.metric(&metric.name).points;
            let points = points.iter().filter(|point| is_of(&point.attributes)).count();
            assert_eq!(points, metric.annotations.points, "{}", metric.name);

            let name = metric.prometheus();
            let (base, label) = (name.trim_end_matches("_bucket"), key.replace('.', "_"));
            let names = [name.clone(), format!("{base}_count"), format!("{base}_sum")];
            let label = format!("{label}=\"orders\"");
            let is_series = |line: &&String| {
                let name = line.split('{').next().unwrap_or_default();
                names.iter().any(|own| own == name) && line.contains(&label)
            };
            let series = run.prometheus.iter().filter(is_series).count();
            assert_eq!(series, metric.series(), "{name} by {}", run.protocol);
        }
    }
}

#[test]
fn every_span_arrives_as_the_registry_says() {
    let registry = Registry::read();
    for run in runs() {
        let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for span in &run.received.spans {
            let of = |expected: &&super::Span| span.name.split(' ').next() == Some(&*expected.name);
            let expected = registry.spans.iter().find(of);
            let expected = expected.unwrap_or_else(|| panic!("{} is not in the registry", span.name));
            assert_eq!(span.kind, expected.kind, "{}", span.name);
            assert_attributes(&registry, &span.name, &expected.attributes, &span.attributes);
            let attributes = seen.entry(&expected.name).or_default();
            attributes.extend(span.attributes.keys().map(String::as_str));
        }
        for expected in &registry.spans {
            let unseen: Vec<_> =
                names(&expected.attributes).difference(&seen[&*expected.name]).copied().collect();
            // Other tests check what these have when they fail.
            let allowed: &[_] = match &*expected.name {
                "cancel" => &["error.type"],
                "connect" | "wait_for_connection" => &["db.response.status_code", "error.type"],
                _ => &[],
            };
            assert_eq!(unseen, allowed, "{}", expected.name);
        }
    }
}

#[test]
fn every_log_record_and_span_event_is_in_the_registry() {
    let registry = Registry::read();
    let event = |name: &str| registry.events.iter().find(|event| event.name == name);
    for run in runs() {
        for log in &run.received.logs {
            let expected = event(&log.event_name);
            let expected = expected.unwrap_or_else(|| panic!("{:?} is not in the registry", log.event_name));
            assert_attributes(&registry, &log.event_name, &expected.attributes, &log.attributes);
        }
        let names: BTreeSet<_> = run.received.logs.iter().map(|log| log.event_name.as_str()).collect();
        assert_eq!(names, BTreeSet::from(["fraiseql.stream.failed", "fraiseql.stream.started"]));
        for of_span in run.received.spans.iter().flat_map(|span| &span.events) {
            assert!(event(&of_span.name).is_some(), "{} is not in the registry", of_span.name);
        }
    }
}
