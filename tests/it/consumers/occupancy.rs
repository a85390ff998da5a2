//! The rows that poll batches find in the channel, according to the exported histogram.

use std::time::Duration;

use fraiseql_stream::{Connection, Instruments};
use opentelemetry_sdk::metrics::data::{
    AggregatedMetrics, Metric, MetricData, ResourceMetrics, ScopeMetrics,
};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use tokio::time::Instant;

use super::sources;
use super::table::{BOTH, Flavor};
use super::ways::{NEXT, READY_CHUNKS_1000, RESPONSE_BODY, Way, Work};

/// Upper bounds of the histogram's buckets, and the counts in them.
#[derive(Debug)]
struct Occupancy(Vec<(f64, u64)>);

impl Occupancy {
    /// The share of poll batches in the buckets whose upper bound satisfies `wanted`.
    fn share(&self, wanted: impl Fn(f64) -> bool) -> f64 {
        let all: u64 = self.0.iter().map(|(_, count)| count).sum();
        let matching: u64 = self.0.iter().filter(|(bound, _)| wanted(*bound)).map(|(_, count)| count).sum();
        matching as f64 / all as f64
    }
}

fn exported(exporter: &InMemoryMetricExporter) -> Occupancy {
    let exports = exporter.get_finished_metrics().unwrap();
    let mut metrics = exports.iter().flat_map(ResourceMetrics::scope_metrics).flat_map(ScopeMetrics::metrics);
    let metric = metrics.find(|metric| metric.name() == "fraiseql_channel_occupancy_rows");
    let Some(AggregatedMetrics::U64(MetricData::Histogram(histogram))) = metric.map(Metric::data) else {
        panic!("no histogram of the occupancy: {exports:?}");
    };
    let point = histogram.data_points().next().unwrap();
    Occupancy(point.bounds().chain([f64::INFINITY]).zip(point.bucket_counts()).collect())
}

/// Consumes `entity` for a second and returns how full the poll batches found the channel.
fn measure(flavor: Flavor, way: Way, entity: &str, each: Duration) -> Occupancy {
    let exporter = InMemoryMetricExporter::default();
    let reader = PeriodicReader::builder(exporter.clone()).with_interval(Duration::from_secs(3_600)).build();
    let meters = SdkMeterProvider::builder().with_reader(reader).build();
    let instruments = Instruments::new(&meters);
    flavor.runtime().block_on(async {
        let builder = Connection::builder(sources::url()).instruments(&instruments);
        let stream = builder.connect().await.unwrap().into_query(entity).stream().await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(1);
        let work = Work { each, blocks: false, deadline };
        tokio::spawn(way.start(vec![stream], work)).await.unwrap();
    });
    meters.force_flush().unwrap();
    exported(&exporter)
}

#[test]
fn consumer_that_returns_late_finds_a_full_channel() {
    // Small rows fill chunks of 128, so a full channel holds two. The poll batch that takes the first chunk finds 256
    // rows, and the next one, right after it, finds 128.
    for flavor in BOTH {
        for way in [READY_CHUNKS_1000, RESPONSE_BODY] {
            let occupancy = measure(flavor, way, "small", Duration::from_micros(100));
            let (full, empty) =
                (occupancy.share(|bound| bound > 200.0), occupancy.share(|bound| bound == 0.0));
            let seen = format!("{}, {flavor}: {full:.2} full, {empty:.2} empty, {occupancy:?}", way.name());
            assert!(full > 0.4 && empty < 0.1, "{seen}");
        }
    }
}

#[test]
fn consumer_that_takes_rows_at_once_finds_an_empty_channel() {
    for flavor in BOTH {
        let occupancy = measure(flavor, NEXT, "every_5_ms", Duration::ZERO);
        let empty = occupancy.share(|bound| bound == 0.0);
        assert!(empty > 0.9, "{flavor}: {empty:.2} found no row, {occupancy:?}");
    }
}
