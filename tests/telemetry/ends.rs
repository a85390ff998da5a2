//! The first failure is visible: its series is exported at zero beforehand.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

use backends::{Collector, Point};
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::Value;

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::{BROKEN, database};

/// Lasts several exports.
const WHILE: Duration = Duration::from_millis(400);

/// Runs a query that is refused, one with a name that no relation can have, and a stream that fails while its consumer
/// works.
#[test]
#[ignore = "a scenario"]
fn first_failures() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        tokio::time::sleep(WHILE).await;
        let mut db = Connection::connect(&scenario::url()).await?;
        for refused in ["nowhere", "no..name"] {
            assert!(db.query::<RawJson>(refused).stream().await.is_err());
        }

        let mut broken = db.query::<RawJson>("broken").stream().await?;
        broken.next().await.ok_or("no row")??;
        tokio::time::sleep(WHILE).await;
        while broken.next().await.is_some() {}
        Ok(telemetry.shutdown().await?)
    })
}

/// Returns the telemetry of the scenario, which runs once for all tests of this file.
fn received() -> &'static Received {
    static RECEIVED: OnceLock<Received> = OnceLock::new();
    RECEIVED.get_or_init(|| {
        let collector = Collector::start().expect("a collector");
        let scenario = Scenario::new("ends::first_failures", &database(BROKEN));
        let scenario = scenario.set("OTEL_METRIC_EXPORT_INTERVAL", "50");
        let outcome = scenario.to(&collector, "http/protobuf").run();
        assert_eq!(outcome.stderr, "");
        Received::by(&collector)
    })
}

/// Returns the points of `fraiseql.stream.ended` with this entity, export by export.
fn exports(entity: &str) -> impl Iterator<Item = Vec<&'static Point>> {
    let ended = received().metrics.iter().filter(|metric| metric.name == "fraiseql.stream.ended");
    let of = move |point: &&Point| point.attributes["entity"] == entity;
    let exports = ended.map(move |metric| metric.points.iter().filter(of).collect::<Vec<_>>());
    exports.filter(|points| !points.is_empty())
}

/// Returns the values of a series, export by export.
fn values(entity: &str, error_type: &str) -> Vec<f64> {
    let of = |point: &&Point| point.attributes.get("error.type").is_some_and(|found| found == error_type);
    let values = exports(entity).map(|points| points.into_iter().find(of).and_then(|point| point.value));
    values.map(|value| value.expect("the series is exported from the start")).collect()
}

fn text<'a>(point: &'a Point, attribute: &str) -> &'a str {
    point.attributes.get(attribute).and_then(Value::as_str).unwrap_or("-")
}

/// Whether values start at zero, and are one from some export on.
fn step(values: &[f64]) -> bool {
    let before = values.iter().take_while(|value| **value == 0.0).count();
    before > 0 && before < values.len() && values[before..].iter().all(|value| *value == 1.0)
}

#[test]
fn first_failure_of_an_entity_is_a_step_from_zero_to_one() {
    let values = values("broken", "query");
    assert!(step(&values), "{values:?}");
}

#[test]
fn first_refusal_is_a_step_from_zero_to_one() {
    let values = values("_REFUSED", "query");
    assert!(step(&values), "{values:?}");
}

#[test]
fn invalid_name_is_counted_without_being_sent() {
    let values = values("_REFUSED", "config");
    assert!(step(&values), "{values:?}");
}

#[test]
fn entity_has_a_series_for_every_outcome_from_its_first_export_on() {
    let all = |entity: &str| {
        let first = exports(entity).next().expect("an export");
        let series = |point: &Point| format!("{} {}", text(point, "outcome"), text(point, "error.type"));
        first.iter().map(|point| series(point)).collect::<BTreeSet<_>>()
    };
    let set = |series: &[&str]| series.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    let of_broken =
        ["complete -", "dropped -", "failed disconnected", "failed lost", "failed query", "failed statement"];
    assert_eq!(all("broken"), set(&of_broken));
    let of_refused = [
        "dropped -",
        "failed config",
        "failed disconnected",
        "failed lost",
        "failed query",
        "failed statement",
        "failed transaction_aborted",
    ];
    assert_eq!(all("_REFUSED"), set(&of_refused));
}
