//! Entities by the thousand: the series stay within bounds.

use std::collections::BTreeSet;

use backends::Collector;
use fraiseql_stream::{Connection, PollSpans, RawJson, otlp};
use futures_util::StreamExt;

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::database;

const ENTITIES: usize = 1_010;
/// Where the series of new entities end.
const MOST: usize = 1_000;

/// Reads a row of each.
#[test]
#[ignore = "a scenario"]
fn more_than_a_thousand() -> Result {
    scenario::play(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::builder(&scenario::url()).poll_spans(PollSpans::Off).connect().await?;
        for number in 1..=ENTITIES {
            let mut rows = db.query::<RawJson>(&format!("entity_{number}")).stream().await?;
            rows.next().await.ok_or("no row")??;
        }
        Ok(telemetry.shutdown().await?)
    })
}

#[test]
fn beyond_a_thousand_entities_new_ones_share_their_series_and_one_line_says_so() {
    let database = database(&format!(
        "DO $$ BEGIN FOR i IN 1..{ENTITIES} LOOP
           EXECUTE format('CREATE VIEW entity_%s AS SELECT jsonb_build_object(''id'', 1) AS data', i);
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
        let key = if metric.name.starts_with("db.") { "db.collection.name" } else { "entity" };
        // An overflow of the SDK has no such attribute.
        let entities: BTreeSet<_> =
            metric.points.iter().filter_map(|point| point.attributes.get(key)?.as_str()).collect();
        assert!(metric.points.iter().all(|point| point.attributes.contains_key(key)), "{}", metric.name);
        assert_eq!(entities.len(), MOST + 1, "{}", metric.name);
        assert!(entities.contains("_OTHER"), "{}", metric.name);
    }
}
