//! Thousands of entities and of refused names: the number of series stays bounded.

use std::collections::BTreeSet;

use backends::{Collector, Metric};
use fraiseql_stream::{Connection, PollSpans, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::Value;

use crate::received::{Received, text};
use crate::scenario::{self, Result, Scenario};
use crate::servers::{Database, database, table};

const ENTITIES: usize = 1_010;
/// The number of entities that have their own series.
const MOST: usize = 1_000;
/// The number of names that Postgres refuses.
const GUESSES: usize = 1_100;

/// Reads a row of each entity. Each entity beyond `MOST` has its own schema.
#[test]
#[ignore = "a scenario"]
fn more_than_a_thousand() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::builder(scenario::url()).poll_spans(PollSpans::Off).connect().await?;
        for number in 1..=ENTITIES {
            let schema = if number > MOST { format!("schema_{number}.") } else { String::new() };
            let mut rows = db.query::<RawJson>(&format!("{schema}entity_{number}")).stream().await?;
            rows.next().await.ok_or("no row")??;
        }
        Ok(telemetry.shutdown().await?)
    })
}

/// Returns the values of `entity` in a metric. The overflow series of the SDK would have none.
fn entities(metric: &Metric) -> BTreeSet<&str> {
    let key = if metric.name.starts_with("db.") { "db.collection.name" } else { "entity" };
    let values = metric.points.iter().map(|point| point.attributes.get(key).and_then(Value::as_str));
    values.map(|value| value.unwrap_or_else(|| panic!("{} has a point without {key}", metric.name))).collect()
}

/// Returns the values of `db.namespace` for an entity.
fn namespaces<'a>(received: &'a Received, entity: &str) -> BTreeSet<&'a str> {
    let metric = received.metric("db.client.operation.duration");
    let points = metric.points.iter().filter(|point| point.attributes["db.collection.name"] == entity);
    points.filter_map(|point| point.attributes["db.namespace"].as_str()).collect()
}

#[test]
fn entities_beyond_a_thousand_share_their_series_and_one_line_is_logged() {
    let database = database(&format!(
        "DO $$ DECLARE schema text := ''; BEGIN FOR i IN 1..{ENTITIES} LOOP
           IF i > {MOST} THEN
             schema := format('schema_%s.', i);
             EXECUTE format('CREATE SCHEMA schema_%s', i);
           END IF;
           EXECUTE format('CREATE VIEW %sentity_%s AS SELECT jsonb_build_object(''id'', 1) AS data', schema, i);
         END LOOP; END $$"
    ));
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("entities::more_than_a_thousand", &database).to(&collector, "grpc");
    let scenario = scenario.set("OTEL_TRACES_EXPORTER", "none");
    let outcome = scenario.set("OTEL_LOGS_EXPORTER", "none").run();
    assert_eq!(outcome.warnings().len(), 1, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("_OTHER"), "{}", outcome.stderr);

    let received = Received::by(&collector);
    let rows = [("entity", "_OTHER"), ("outcome", "yielded")];
    assert_eq!(received.value("fraiseql.stream.rows", &rows), (ENTITIES - MOST) as f64);
    for metric in &received.metrics {
        let mut entities = entities(metric);
        // Exported from the start.
        entities.remove("_REFUSED");
        assert_eq!(entities.len(), MOST + 1, "{}", metric.name);
        assert!(entities.contains("_OTHER"), "{}", metric.name);
    }
    assert_eq!(namespaces(&received, "_OTHER"), namespaces(&received, "entity_1"));
}

/// Queries names that do not exist, as a service does when it is scanned, and then a table.
#[test]
#[ignore = "a scenario"]
fn guesses() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        for number in 1..=std::env::var("GUESSES")?.parse()? {
            let name = format!("guess_{number}.orders");
            assert!(db.query::<RawJson>(&name).stream().await.is_err());
        }
        let mut orders = db.query::<RawJson>("orders").stream().await?;
        while orders.next().await.is_some() {}
        Ok(telemetry.shutdown().await?)
    })
}

fn after_guesses(database: &Database, guesses: usize) -> Received {
    let collector = Collector::start().expect("a collector");
    let scenario = Scenario::new("entities::guesses", database).to(&collector, "http/protobuf");
    let outcome = scenario.set("GUESSES", &guesses.to_string()).run();
    assert_eq!(outcome.stderr, "");
    Received::by(&collector)
}

#[test]
fn refused_names_add_no_series_and_displace_no_entity() {
    let database = database(&table("orders", 10));
    let [few, many] = [1, GUESSES].map(|guesses| after_guesses(&database, guesses));
    let series = |received: &Received| {
        let of_each = received.metrics.iter().map(|metric| (metric.name.clone(), metric.points.len()));
        of_each.collect::<BTreeSet<_>>()
    };
    assert_eq!(series(&few), series(&many));
    for metric in &many.metrics {
        let may_be_refused = metric.name.starts_with("db.") || metric.name == "fraiseql.stream.ended";
        let expected = if may_be_refused { vec!["_REFUSED", "orders"] } else { vec!["orders"] };
        assert_eq!(entities(metric), BTreeSet::from_iter(expected), "{}", metric.name);
    }
    let refused = [("entity", "_REFUSED"), ("outcome", "failed"), ("error.type", "query")];
    assert_eq!(many.value("fraiseql.stream.ended", &refused), GUESSES as f64);
    let operations = [("db.collection.name", "_REFUSED"), ("db.response.status_code", "42P01")];
    assert_eq!(many.point("db.client.operation.duration", &operations).count, GUESSES as u64);
    assert_eq!(namespaces(&many, "_REFUSED"), namespaces(&many, "orders"));
    let span = many.query("guess_1.orders");
    assert_eq!(text(span, "db.namespace"), format!("{}|guess_1", database.name));
}
