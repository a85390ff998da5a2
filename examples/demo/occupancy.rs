//! Reads back the histogram `fraiseql_channel_occupancy_rows` that the library records.
//!
//! Without telemetry export, the library uses a meter provider that keeps all metrics in memory. With export, it
//! uses a [`Tee`]: every measurement goes to the global provider, which exports it, and those of this histogram go
//! to memory as well.

use std::sync::Arc;
use std::time::Duration;

use fraiseql_stream::Instruments;
use opentelemetry::metrics::{
    AsyncInstrumentBuilder, Counter, Gauge, Histogram, HistogramBuilder, InstrumentBuilder,
    InstrumentProvider, Meter, MeterProvider, ObservableCounter, ObservableGauge, ObservableUpDownCounter,
    SyncInstrument, UpDownCounter,
};
use opentelemetry::{InstrumentationScope, KeyValue, global};
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, HistogramDataPoint, MetricData, ScopeMetrics};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};

const NAME: &str = "fraiseql_channel_occupancy_rows";
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);

/// Keeps the metrics of this process in memory.
pub(crate) struct Memory {
    provider: SdkMeterProvider,
    exporter: InMemoryMetricExporter,
}

/// The histogram of one entity: the number of rows that waited in the channel, recorded once per poll batch.
pub(crate) struct Occupancy {
    /// The upper bounds of the buckets. One more bucket lies above the last bound.
    pub(crate) bounds: Vec<f64>,
    pub(crate) counts: Vec<u64>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        let exporter = InMemoryMetricExporter::default();
        // The metrics are read on demand only, whatever OTEL_METRIC_EXPORT_INTERVAL says.
        let reader = PeriodicReader::builder(exporter.clone()).with_interval(NEVER).build();
        let provider = SdkMeterProvider::builder().with_reader(reader).build();
        Self { provider, exporter }
    }

    /// Creates the instruments of the demo's streams. With `export`, they feed the global provider as well.
    pub(crate) fn instruments(&self, export: bool) -> Instruments {
        if export {
            Instruments::new(&Tee { memory: self.provider.clone() })
        } else {
            Instruments::new(&self.provider)
        }
    }

    /// Returns what the library has recorded for an entity so far, or `None` if that is nothing.
    pub(crate) fn occupancy(&self, entity: &str) -> Option<Occupancy> {
        self.provider.force_flush().ok()?;
        // Each export is cumulative, so the last one contains everything.
        let exports = self.exporter.get_finished_metrics().ok()?;
        exports
            .last()?
            .scope_metrics()
            .flat_map(ScopeMetrics::metrics)
            .filter(|metric| metric.name() == NAME)
            .find_map(|metric| match metric.data() {
                AggregatedMetrics::U64(MetricData::Histogram(histogram)) => {
                    histogram.data_points().find(|point| belongs_to(point, entity)).map(Occupancy::of)
                }
                _ => None,
            })
    }
}

fn belongs_to(point: &HistogramDataPoint<u64>, entity: &str) -> bool {
    point
        .attributes()
        .any(|attribute| attribute.key.as_str() == "entity" && attribute.value.as_str() == entity)
}

impl Occupancy {
    fn of(point: &HistogramDataPoint<u64>) -> Self {
        Self { bounds: point.bounds().collect(), counts: point.bucket_counts().collect() }
    }

    /// Returns a quantile, interpolated within its bucket as by Prometheus's `histogram_quantile`.
    pub(crate) fn quantile(&self, quantile: f64) -> f64 {
        let rank = quantile * self.counts.iter().sum::<u64>() as f64;
        let (mut below, mut lower) = (0.0, 0.0);
        for (upper, count) in self.bounds.iter().zip(&self.counts) {
            let count = *count as f64;
            if count > 0.0 && below + count >= rank {
                return lower + (upper - lower) * ((rank - below) / count).clamp(0.0, 1.0);
            }
            below += count;
            lower = *upper;
        }
        lower
    }
}

/// Creates each instrument on the global provider, and the occupancy histogram on both.
struct Tee {
    memory: SdkMeterProvider,
}

impl MeterProvider for Tee {
    fn meter_with_scope(&self, scope: InstrumentationScope) -> Meter {
        Meter::new(Arc::new(TeeMeter {
            exported: global::meter_provider().meter_with_scope(scope.clone()),
            memory: self.memory.meter_with_scope(scope),
        }))
    }
}

struct TeeMeter {
    exported: Meter,
    memory: Meter,
}

/// Recreates the instrument on the exporting meter, with the same unit and description.
macro_rules! forward {
    ($($method:ident($builder:ty) -> $instrument:ty;)*) => { $(
        fn $method(&self, builder: $builder) -> $instrument {
            let target = self.exported.$method(builder.name);
            target
                .with_unit(builder.unit.unwrap_or_default())
                .with_description(builder.description.unwrap_or_default())
                .build()
        }
    )* };
}

macro_rules! forward_observable {
    ($($method:ident($builder:ty) -> $instrument:ty;)*) => { $(
        fn $method(&self, builder: $builder) -> $instrument {
            let target = self.exported.$method(builder.name);
            let target = target
                .with_unit(builder.unit.unwrap_or_default())
                .with_description(builder.description.unwrap_or_default());
            let callbacks = builder.callbacks.into_iter();
            callbacks
                .fold(target, |target, callback| target.with_callback(callback))
                .build()
        }
    )* };
}

impl InstrumentProvider for TeeMeter {
    forward! {
        u64_counter(InstrumentBuilder<'_, Counter<u64>>) -> Counter<u64>;
        f64_counter(InstrumentBuilder<'_, Counter<f64>>) -> Counter<f64>;
        i64_up_down_counter(InstrumentBuilder<'_, UpDownCounter<i64>>) -> UpDownCounter<i64>;
        f64_up_down_counter(InstrumentBuilder<'_, UpDownCounter<f64>>) -> UpDownCounter<f64>;
        u64_gauge(InstrumentBuilder<'_, Gauge<u64>>) -> Gauge<u64>;
        f64_gauge(InstrumentBuilder<'_, Gauge<f64>>) -> Gauge<f64>;
        i64_gauge(InstrumentBuilder<'_, Gauge<i64>>) -> Gauge<i64>;
    }

    forward_observable! {
        u64_observable_counter(AsyncInstrumentBuilder<'_, ObservableCounter<u64>, u64>) -> ObservableCounter<u64>;
        f64_observable_counter(AsyncInstrumentBuilder<'_, ObservableCounter<f64>, f64>) -> ObservableCounter<f64>;
        i64_observable_up_down_counter(AsyncInstrumentBuilder<'_, ObservableUpDownCounter<i64>, i64>) -> ObservableUpDownCounter<i64>;
        f64_observable_up_down_counter(AsyncInstrumentBuilder<'_, ObservableUpDownCounter<f64>, f64>) -> ObservableUpDownCounter<f64>;
        u64_observable_gauge(AsyncInstrumentBuilder<'_, ObservableGauge<u64>, u64>) -> ObservableGauge<u64>;
        i64_observable_gauge(AsyncInstrumentBuilder<'_, ObservableGauge<i64>, i64>) -> ObservableGauge<i64>;
        f64_observable_gauge(AsyncInstrumentBuilder<'_, ObservableGauge<f64>, f64>) -> ObservableGauge<f64>;
    }

    fn f64_histogram(&self, builder: HistogramBuilder<'_, Histogram<f64>>) -> Histogram<f64> {
        let target = self.exported.f64_histogram(builder.name);
        let target = target
            .with_unit(builder.unit.unwrap_or_default())
            .with_description(builder.description.unwrap_or_default());
        match builder.boundaries {
            Some(bounds) => target.with_boundaries(bounds).build(),
            None => target.build(),
        }
    }

    fn u64_histogram(&self, builder: HistogramBuilder<'_, Histogram<u64>>) -> Histogram<u64> {
        let name = builder.name.clone();
        let bounds = builder.boundaries.clone();
        let make = |meter: &Meter| {
            let target = meter.u64_histogram(builder.name.clone());
            let target = target
                .with_unit(builder.unit.clone().unwrap_or_default())
                .with_description(builder.description.clone().unwrap_or_default());
            match bounds.clone() {
                Some(bounds) => target.with_boundaries(bounds).build(),
                None => target.build(),
            }
        };
        let exported = make(&self.exported);
        if name != NAME {
            return exported;
        }
        Histogram::new(Arc::new(Both(exported, make(&self.memory))))
    }
}

struct Both(Histogram<u64>, Histogram<u64>);

impl SyncInstrument<u64> for Both {
    fn measure(&self, rows: u64, attributes: &[KeyValue]) {
        self.0.record(rows, attributes);
        self.1.record(rows, attributes);
    }
}
