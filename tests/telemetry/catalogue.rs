//! The metrics arrive by both protocols with the figures of the streams. `registry::compare` checks their names, units,
//! kinds and attributes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use std::time::Duration;

use backends::{Collector, Point};
use fraiseql_stream::{Connection, JsonStream, RawJson, otlp};
use futures_util::StreamExt;
use opentelemetry_semantic_conventions::SCHEMA_URL;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::received::{Received, about, prometheus_lines};
use crate::scenario::{self, Result, Scenario, figures};
use crate::servers::{BROKEN, database, table};

const STATES: [&str; 5] = ["source_wait", "scheduled", "decode", "consumer", "paused"];

#[derive(Deserialize)]
struct Document {
    id: i64,
}

/// Runs streams that end in every possible way.
#[test]
#[ignore = "a scenario"]
fn every_kind_of_stream() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;

        let orders = db.query::<Document>("orders").stream().await?;
        let orders = by_the_chunk(orders).await;
        let mixed = db.query::<Document>("mixed");
        let mixed = mixed.where_rust(|row| row.id % 2 == 0).stream().await?;
        let mixed = figures(&to_end(mixed).await);
        let broken = db.query::<Document>("broken").stream().await?;
        let broken = figures(&to_end(broken).await);
        let nowhere = db.query::<Document>("nowhere").stream().await.is_err();
        assert!(nowhere);

        let mut other = Connection::builder(scenario::url()).query_text(true).connect().await?;
        let mut dropped = db.query::<RawJson>("dropped").stream().await?;
        dropped.next().await.ok_or("no row")??;
        // The next stream has to wait for its clean-up.
        drop(dropped);

        let mut held = db.query::<RawJson>("held").stream().await?;
        let mut held_too = other.query::<RawJson>("held").stream().await?;
        held.next().await.ok_or("no row")??;
        held_too.next().await.ok_or("no row")??;
        // Lasts several exports.
        tokio::time::sleep(Duration::from_millis(700)).await;
        let full = [held.stats(), held_too.stats()];
        held.close().await?;
        held_too.close().await?;

        scenario::report(&json!({
            "orders": orders, "mixed": mixed, "broken": broken,
            "held": {
                "rows": full.iter().map(|stats| stats.buffered_rows).sum::<usize>(),
                "bytes": full.iter().map(|stats| stats.buffered_bytes).sum::<usize>(),
                "row_limit": full.iter().map(|stats| stats.row_limit).sum::<usize>(),
                "byte_limit": full.iter().map(|stats| stats.byte_limit).sum::<usize>(),
            },
        }));
        Ok(telemetry.shutdown().await?)
    })
}

async fn by_the_chunk<C: Unpin>(mut stream: JsonStream<Document, C>) -> Value {
    let mut batches = 0;
    while stream.next_chunk().await.expect("rows").is_some() {
        batches += 1;
    }
    let mut report = figures(&stream.stats());
    report["batches"] = json!(batches);
    report
}

async fn to_end<C: Unpin>(mut stream: JsonStream<Document, C>) -> fraiseql_stream::Stats {
    while stream.next().await.is_some() {}
    stream.stats()
}

pub(crate) struct Run {
    pub(crate) protocol: &'static str,
    reported: Value,
    pub(crate) received: Received,
    /// The lines that begin with `fraiseql_channel_occupancy_rows_bucket{entity="orders"`.
    buckets: Vec<String>,
    /// All lines of the collector's Prometheus exporter.
    pub(crate) prometheus: Vec<String>,
}

/// Returns the outcomes of the scenario by each protocol, which runs once for all tests of this file.
pub(crate) fn runs() -> &'static [Run; 2] {
    static RUNS: OnceLock<[Run; 2]> = OnceLock::new();
    RUNS.get_or_init(|| ["http/protobuf", "grpc"].map(run))
}

fn run(protocol: &'static str) -> Run {
    let mixed = "CREATE VIEW mixed AS SELECT CASE WHEN i % 10 = 0 THEN '\"no document\"' ELSE jsonb_build_object('id', i) END AS data
        FROM generate_series(1, 100) i;";
    let tables = [table("orders", 30_000), table("dropped", 50_000), table("held", 5_000)];
    let database = database(&(tables.concat() + mixed + BROKEN));
    let collector = Collector::start().expect("a collector");
    let scenario = Scenario::new("catalogue::every_kind_of_stream", &database);
    let scenario = scenario.set("OTEL_METRIC_EXPORT_INTERVAL", "50");
    let outcome = scenario.to(&collector, protocol).run();
    assert_eq!(outcome.stderr, "");
    let buckets = prometheus_lines(&collector, "fraiseql_channel_occupancy_rows_bucket{entity=\"orders\"");
    let prometheus = prometheus_lines(&collector, "");
    Run { protocol, reported: outcome.reported, received: Received::by(&collector), buckets, prometheus }
}

/// Returns a figure that the scenario reported of a stream.
fn reported(run: &Run, entity: &str, figure: &str) -> f64 {
    let value = &run.reported[entity][figure];
    value.as_f64().unwrap_or_else(|| panic!("{figure} of {entity} was not reported"))
}

#[test]
fn prometheus_shows_the_occupancy_under_its_documented_name() {
    for run in runs() {
        let whole = run.buckets.iter().find(|line| line.contains("le=\"+Inf\""));
        let count = whole.and_then(|line| line.rsplit(' ').next()).map(str::parse);
        assert_eq!(count, Some(Ok(reported(run, "orders", "batches"))), "{:#?}", run.buckets);
        for threshold in ["10", "50", "200", "240"] {
            let label = format!("le=\"{threshold}\"");
            assert!(run.buckets.iter().any(|line| line.contains(&label)), "{:#?}", run.buckets);
        }
    }
}

#[test]
fn histograms_count_every_poll_batch() {
    for run in runs() {
        let of_orders = |name| run.received.point(name, &[("entity", "orders")]);
        let batches = reported(run, "orders", "batches");
        for name in ["fraiseql_channel_occupancy_rows", "fraiseql.channel.utilization", "fraiseql.chunk.size"]
        {
            assert_eq!(of_orders(name).count as f64, batches, "{name}");
        }
        assert_eq!(of_orders("fraiseql.chunk.size").sum, 30_000.0);
        let first = of_orders("fraiseql.stream.time_to_first_row");
        assert_eq!(first.count, 1);
        assert!(first.sum > 0.0 && first.sum < reported(run, "orders", "elapsed"));
    }
}

#[test]
fn rows_and_bytes_match_those_read() {
    for run in runs() {
        for entity in ["orders", "mixed", "broken"] {
            for (outcome, figure) in [("yielded", "rows"), ("filtered", "filtered"), ("failed", "failed")] {
                let rows = [("entity", entity), ("outcome", outcome)];
                let rows = run.received.value("fraiseql.stream.rows", &rows);
                assert_eq!(rows, reported(run, entity, figure), "{outcome} of {entity}");
            }
            let bytes = run.received.value("fraiseql.stream.io", &[("entity", entity)]);
            assert_eq!(bytes, reported(run, entity, "bytes"), "{entity}");
        }
        let read = |entity, figures: [&str; 3]| figures.map(|figure| reported(run, entity, figure));
        let figures = ["rows", "filtered", "failed"];
        assert_eq!(read("orders", figures), [30_000.0, 0.0, 0.0]);
        assert_eq!(read("mixed", figures), [40.0, 50.0, 10.0]);
        assert_eq!(read("broken", figures), [50.0, 0.0, 0.0]);
    }
}

#[test]
fn times_add_up_to_the_lifetime_of_the_stream() {
    for run in runs() {
        for entity in ["orders", "mixed", "broken"] {
            let seconds = |name, state| run.received.value(name, &[("entity", entity), ("state", state)]);
            let elapsed = reported(run, entity, "elapsed");
            let states = STATES.map(|state| seconds("fraiseql.stream.time", state));
            assert!(about(states.iter().sum(), elapsed), "{entity}: {states:?} of {elapsed}");
            let own = STATES.map(|state| run.reported[entity]["time"][state].as_f64().unwrap());
            for (state, (spent, own)) in STATES.iter().zip(states.into_iter().zip(own)) {
                assert!((spent - own).abs() < 0.01 * elapsed, "{state} of {entity}: {spent}, {own}");
            }
            // The split between decoding and consumer is sampled; their sum is exact.
            let held = |times: [f64; 5]| [times[0], times[1], times[2] + times[3], times[4]];
            for (spent, own) in held(states).into_iter().zip(held(own)) {
                assert!((spent - own).abs() < 1e-6, "{entity}: {states:?}, {own}");
            }
            for state in ["source", "room"] {
                let spent = seconds("fraiseql.producer.time", state);
                assert!(about(spent, reported(run, entity, state)), "{state} of {entity}: {spent}");
            }
            let backlog = run.received.value("fraiseql.channel.backlog.time", &[("entity", entity)]);
            assert!(about(backlog, reported(run, entity, "backlog")), "{entity}: {backlog}");
            let operations =
                run.received.point("db.client.operation.duration", &[("db.collection.name", entity)]);
            assert_eq!(operations.count, 1);
            assert!(about(operations.sum, elapsed), "{entity}: {} of {elapsed}", operations.sum);
        }
    }
}

#[test]
fn streams_are_counted_by_outcome() {
    for run in runs() {
        let ended = run.received.metric("fraiseql.stream.ended");
        let end = |point: &Point| {
            let text = |key| point.attributes.get(key).and_then(Value::as_str).unwrap_or("");
            format!("{} {} {}: {}", text("entity"), text("outcome"), text("error.type"), point.value.unwrap())
        };
        // The other series are exported at zero.
        let some = ended.points.iter().filter(|point| point.value != Some(0.0));
        let ends: BTreeSet<_> = some.map(end).collect();
        let expected = [
            "_REFUSED failed query: 1",
            "broken failed query: 1",
            "dropped dropped : 1",
            "held dropped : 2",
            "mixed complete : 1",
            "orders complete : 1",
        ];
        assert_eq!(ends, expected.map(ToOwned::to_owned).into());
    }
}

#[test]
fn sums_never_decrease_from_one_export_to_the_next() {
    for run in runs() {
        let mut last = BTreeMap::new();
        let sums = run.received.metrics.iter().filter(|metric| metric.monotonic);
        for (metric, point) in sums.flat_map(|metric| metric.points.iter().map(move |point| (metric, point)))
        {
            let series = format!("{}{:?}", metric.name, point.attributes);
            let before = last.insert(series.clone(), point.value);
            assert!(
                before.is_none_or(|before| before <= point.value),
                "{series}: {before:?} {:?}",
                point.value
            );
        }
        assert!(last.len() > 50, "{} series", last.len());
    }
}

#[test]
fn database_metrics_have_the_server_and_the_error() {
    for run in runs() {
        for name in ["db.client.operation.duration", "db.client.response.returned_rows"] {
            let point = run.received.point(name, &[("db.collection.name", "broken")]);
            let has = |key: &str, value: Value| assert_eq!(point.attributes.get(key), Some(&value), "{name}");
            has("db.system.name", json!("postgresql"));
            has("db.operation.name", json!("SELECT"));
            has("db.query.summary", json!("SELECT broken"));
            has("server.address", json!("127.0.0.1"));
            has("server.port", json!(crate::servers::postgres().port()));
            has("error.type", json!("22012"));
            has("db.response.status_code", json!("22012"));
        }
        let rows = run.received.point("db.client.response.returned_rows", &[("db.collection.name", "mixed")]);
        assert_eq!((rows.count, rows.sum), (1, 100.0));
    }
}

#[test]
fn levels_count_live_streams_and_are_zero_without_any() {
    const LEVELS: [&str; 6] = [
        "fraiseql.channel.row.count",
        "fraiseql.channel.row.limit",
        "fraiseql.channel.memory.usage",
        "fraiseql.channel.memory.limit",
        "fraiseql.stream.active",
        "fraiseql.stream.since_last_row",
    ];
    for run in runs() {
        let held = [("entity", "held")];
        // The maximum over all exports.
        let most = |name: &str| {
            let points = run.received.metrics.iter().filter(|metric| metric.name == name);
            let values = points.filter_map(|metric| metric.point(&held)?.value);
            values.fold(0.0, f64::max)
        };
        let [rows, row_limit, bytes, byte_limit, active, since] = LEVELS.map(most);
        let held = ["rows", "row_limit", "bytes", "byte_limit"].map(|figure| reported(run, "held", figure));
        assert_eq!([rows, row_limit, bytes, byte_limit], held);
        assert_eq!(active, 2.0);
        assert!((0.3..0.9).contains(&since), "{since}");
        for name in LEVELS {
            for point in &run.received.metric(name).points {
                assert_eq!(point.value, Some(0.0), "{name} of {:?}", point.attributes);
            }
        }
    }
}

#[test]
fn metrics_carry_the_scope_with_its_version_and_schema() {
    let schema = format!("ScopeMetrics SchemaURL: {SCHEMA_URL}\n");
    for run in runs() {
        assert!(run.received.metrics.iter().all(|metric| metric.scope == "fraiseql_stream"));
        let scope = format!("InstrumentationScope fraiseql_stream {}", env!("CARGO_PKG_VERSION"));
        let of_streams = |metrics: &&str| !metrics.contains("InstrumentationScope fraiseql_stream.otlp ");
        let exports: Vec<_> = run.received.text.split("ScopeMetrics #").skip(1).filter(of_streams).collect();
        assert!(!exports.is_empty());
        for metrics in exports {
            assert!(metrics.contains(&scope) && metrics.contains(&schema), "{metrics:.300}");
        }
    }
}
