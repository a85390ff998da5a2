//! Instruments on a provider of the service: they need no global, and leak nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use backends::Postgres;
use fraiseql_stream::{Connection, Instruments, RawJson};
use futures_util::StreamExt;
use opentelemetry_sdk::metrics::data::{
    AggregatedMetrics, Metric, MetricData, ResourceMetrics, ScopeMetrics,
};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use serde_json::json;

use crate::scenario::{self, Result, Scenario};
use crate::servers::{Database, database, slow_view, table};

const CONNECTIONS: u64 = 2_000;
/// The last one of each connection is dropped before its end.
const STREAMS_OF_EACH: u64 = 2;
/// The number of connections after which memory should no longer grow.
const WARM: u64 = 400;

struct Provider {
    exporter: InMemoryMetricExporter,
    meters: SdkMeterProvider,
}

impl Provider {
    fn new() -> Self {
        let exporter = InMemoryMetricExporter::default();
        // Exports when flushed only.
        let reader = PeriodicReader::builder(exporter.clone()).with_interval(Duration::from_secs(3_600));
        Self { exporter, meters: SdkMeterProvider::builder().with_reader(reader.build()).build() }
    }

    /// Returns the values of an export by metric and attributes.
    ///
    /// # Panics
    ///
    /// If a series is exported twice.
    fn series(&self) -> Result<BTreeMap<String, f64>> {
        self.exporter.reset();
        self.meters.force_flush()?;
        let mut series = BTreeMap::new();
        for export in self.exporter.get_finished_metrics()? {
            for (name, value) in points(&export) {
                let before = series.insert(name.clone(), value);
                assert!(before.is_none(), "{name} is exported twice");
            }
        }
        Ok(series)
    }
}

/// Returns the sums and gauges of an export, and the counts of its histograms.
fn points(export: &ResourceMetrics) -> Vec<(String, f64)> {
    let metrics = export.scope_metrics().flat_map(ScopeMetrics::metrics);
    let points = metrics.flat_map(|metric| {
        let points = match metric.data() {
            AggregatedMetrics::F64(data) => of(data, |value| value),
            AggregatedMetrics::U64(data) => of(data, |value| value as f64),
            AggregatedMetrics::I64(data) => of(data, |value| value as f64),
        };
        points.into_iter().map(|(attributes, value)| (format!("{}{attributes}", metric.name()), value))
    });
    points.collect()
}

fn of<T: Copy>(data: &MetricData<T>, number: impl Fn(T) -> f64) -> Vec<(String, f64)> {
    let text = |attributes: &mut dyn Iterator<Item = &opentelemetry::KeyValue>| {
        let sorted: BTreeSet<_> = attributes.map(|pair| format!("{}={}", pair.key, pair.value)).collect();
        format!("{sorted:?}")
    };
    match data {
        MetricData::Sum(sum) => {
            sum.data_points().map(|point| (text(&mut point.attributes()), number(point.value()))).collect()
        }
        MetricData::Gauge(gauge) => {
            gauge.data_points().map(|point| (text(&mut point.attributes()), number(point.value()))).collect()
        }
        MetricData::Histogram(histogram) => histogram
            .data_points()
            .map(|point| (text(&mut point.attributes()), point.count() as f64))
            .collect(),
        MetricData::ExponentialHistogram(_) => Vec::new(),
    }
}

async fn read(db: &mut Connection, rows: u64) -> Result {
    let mut orders = db.query::<RawJson>("orders").limit(rows).stream().await?;
    while let Some(row) = orders.next().await {
        row?;
    }
    assert_eq!(orders.stats().rows, rows);
    Ok(())
}

#[tokio::test]
async fn instruments_record_on_a_provider_that_is_not_global() -> Result {
    let Database { url, .. } = database(&table("orders", 1_000));
    let provider = Provider::new();
    let instruments = Instruments::new(&provider.meters);
    let mut db = Connection::builder(&url).instruments(&instruments).connect().await?;
    read(&mut db, 1_000).await?;
    let series = provider.series()?;
    let value = |name: &str| series.get(name).copied();
    assert_eq!(value(r#"fraiseql.stream.rows{"entity=orders", "outcome=yielded"}"#), Some(1_000.0));
    assert_eq!(value(r#"fraiseql.stream.active{"entity=orders"}"#), Some(0.0));
    assert_eq!(value(r#"fraiseql.stream.ended{"entity=orders", "outcome=complete"}"#), Some(1.0));
    Ok(())
}

/// Returns the share of poll batches that found at most `rows` rows in the channel.
fn occupancy_up_to(provider: &Provider, rows: f64) -> Result<f64> {
    provider.series()?;
    let exports = provider.exporter.get_finished_metrics()?;
    let mut metrics = exports.iter().flat_map(ResourceMetrics::scope_metrics).flat_map(ScopeMetrics::metrics);
    let occupancy = metrics.find(|metric| metric.name() == "fraiseql_channel_occupancy_rows");
    let Some(AggregatedMetrics::U64(MetricData::Histogram(histogram))) = occupancy.map(Metric::data) else {
        return Err("no histogram of the occupancy".into());
    };
    let point = histogram.data_points().next().ok_or("no point")?;
    let buckets = point.bucket_counts().zip(point.bounds().chain([f64::INFINITY]));
    let below: u64 = buckets.filter(|(_, bound)| *bound <= rows).map(|(count, _)| count).sum();
    Ok(below as f64 / point.count() as f64)
}

#[tokio::test]
async fn consumer_faster_than_its_source_finds_fewer_than_10_rows() -> Result {
    let Database { url, .. } = database(&slow_view("orders", 400, 0.001));
    let provider = Provider::new();
    let instruments = Instruments::new(&provider.meters);
    let mut db = Connection::builder(&url).instruments(&instruments).connect().await?;
    read(&mut db, 400).await?;
    assert!(occupancy_up_to(&provider, 10.0)? > 0.9);
    Ok(())
}

#[tokio::test]
async fn consumer_slower_than_its_source_finds_more_than_240_rows() -> Result {
    let Database { url, .. } = database(&table("orders", 5_000));
    let provider = Provider::new();
    let instruments = Instruments::new(&provider.meters);
    let mut db = Connection::builder(&url).instruments(&instruments).connect().await?;
    let mut orders = db.query::<RawJson>("orders").limit(5_000).stream().await?;
    while orders.next_chunk().await.unwrap().is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(orders);
    assert!(occupancy_up_to(&provider, 240.0)? < 0.4, "all but the first and the last batches");
    Ok(())
}

#[tokio::test]
async fn connections_share_the_instruments_passed_to_them() -> Result {
    let Database { url, .. } = database(&table("orders", 10));
    let (one, other) = (Provider::new(), Provider::new());
    let instruments = [Instruments::new(&one.meters), Instruments::new(&other.meters)];
    for (number, of) in instruments.iter().enumerate() {
        for _ in 0..=number {
            let mut db = Connection::builder(&url).instruments(of).connect().await?;
            read(&mut db, 10).await?;
        }
    }
    let rows = |provider: &Provider| -> Result<f64> {
        Ok(provider.series()?[r#"fraiseql.stream.rows{"entity=orders", "outcome=yielded"}"#])
    };
    assert_eq!((rows(&one)?, rows(&other)?), (10.0, 20.0));
    Ok(())
}

/// Opens and closes connections, with some streams each.
#[test]
#[ignore = "a scenario"]
fn many_connections() -> Result {
    scenario::run_scenario(async {
        let provider = Provider::new();
        let instruments = Instruments::new(&provider.meters);
        let mut warm = 0;
        for number in 0..CONNECTIONS {
            let mut db = Connection::builder(scenario::url()).instruments(&instruments).connect().await?;
            for _ in 1..STREAMS_OF_EACH {
                read(&mut db, 1).await?;
            }
            let mut dropped = db.query::<RawJson>("orders").stream().await?;
            dropped.next().await.ok_or("no row")??;
            drop(dropped);
            if number == WARM {
                provider.series()?;
                warm = resident();
            }
        }
        let begun = Instant::now();
        let series = provider.series()?;
        let collected = begun.elapsed().as_secs_f64();
        scenario::report(&json!({"series": series, "grown": resident() - warm, "collected": collected}));
        Ok(())
    })
}

/// Returns the memory of this process in kB.
fn resident() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn thousands_of_connections_leave_one_set_of_series_and_a_flat_heap() {
    let server = Postgres::start().unwrap();
    // Checking a password is slow by design.
    let trust = "DO $$ BEGIN
          EXECUTE format('COPY (SELECT ''host all all 127.0.0.1/32 trust'') TO %L', current_setting('hba_file'));
        END $$;
        SELECT pg_reload_conf();";
    server.psql("postgres", &(table("orders", 10) + trust)).unwrap();
    let database = Database { name: "postgres".to_owned(), url: server.url() };
    let scenario = Scenario::new("own_provider::many_connections", &database);
    let report = scenario.on("current_thread").run().reported;
    let number = |name: &str| report["series"][name].as_f64();
    let streams = (CONNECTIONS * STREAMS_OF_EACH) as f64;
    assert_eq!(number(r#"fraiseql.stream.rows{"entity=orders", "outcome=yielded"}"#), Some(streams));
    let ended = ["complete", "dropped"]
        .map(|outcome| number(&format!(r#"fraiseql.stream.ended{{"entity=orders", "outcome={outcome}"}}"#)));
    assert_eq!(ended, [Some(streams / 2.0), Some(streams / 2.0)]);
    assert_eq!(number(r#"fraiseql.stream.active{"entity=orders"}"#), Some(0.0));
    let grown = report["grown"].as_i64().unwrap();
    assert!(grown < 1_024, "{grown} kB more");
    let collected = report["collected"].as_f64().unwrap();
    assert!(collected < 0.1, "an export takes {collected} s");
}
