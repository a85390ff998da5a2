//! `Instruments`: the metrics of the catalogue, with their names, units and bounds.

use std::fmt;
use std::sync::{Arc, Mutex};

use opentelemetry::metrics::{AsyncInstrument, Histogram, Meter, MeterProvider};
use opentelemetry::{InstrumentationScope, KeyValue, global};

use super::ends::End;
use super::failure::log_failure;
use super::registry::{Levels, OUTCOMES, Registry, STATES, Totals};
use super::spans::seconds;
use super::{SCHEMA_URL, SCOPE};
use crate::error::Error;
use crate::sync::lock;

/// The instruments that record the metrics of streams, on one meter provider.
///
/// The default ones are created on the global provider, at the first connection or by `otlp::init()`. Create your own if
/// your meter provider is not the global one, or is set after the first connection is made. Create them once and keep
/// them: observable instruments cannot be removed, so each instance adds a set of callbacks, and two on one provider
/// overwrite each other's values.
///
/// # Metrics
///
/// [docs/metrics.md] describes each metric: its unit and attributes, what a high and a low value mean, and how many series
/// an entity has. They report
///
/// - the channel, at each poll batch, that is, each time a chunk is taken from it: `fraiseql_channel_occupancy_rows`,
///   `fraiseql.channel.*`, `fraiseql.chunk.*`
/// - where the time goes, as in [`StreamTime`](crate::StreamTime) and [`ProducerTime`](crate::ProducerTime):
///   `fraiseql.stream.time`, `fraiseql.producer.time`, `fraiseql.channel.backlog.time`
/// - rows, bytes, and the streams themselves: `fraiseql.stream.*`
/// - queries, after the semantic conventions: `db.client.operation.duration`, which contains the time of the consumer, and
///   `db.client.response.returned_rows`
///
/// [docs/metrics.md]: https://github.com/fraiseql/fraiseql-stream/blob/main/docs/metrics.md
///
/// # Entities
///
/// The attribute `entity` (in the `db.client` metrics `db.collection.name`) is the name passed to
/// [`Connection::query`](crate::Connection::query). The series of an entity begin when Postgres has accepted a query for
/// it, and never end. Keep the number of distinct entities small. Two values each stand for several names; spans have
/// the real name:
///
/// - `_OTHER`: all entities after the first 1,000.
/// - `_REFUSED`: streams that never began, because a setting was invalid, an error came before Postgres accepted the
///   query, or the future of `stream()` was dropped first. They are counted in `fraiseql.stream.ended` only and, if the
///   query was sent, in the `db.client` metrics.
///
/// With a meter provider of your own and more than 300 entities, raise the cardinality limit of the instruments with several
/// series per entity, as `otlp::init()` does: an SDK keeps 2,000 series per instrument unless a view sets another limit.
///
/// # Log records
///
/// Each stream logs through `tracing`, with the target `fraiseql_stream`: its start at level `debug`, its statistics every
/// 30 s at level `info`, and the error with which it fails, or is refused, once at level `error`. The text of the error
/// leaves out messages of Postgres that may quote values.
///
/// # Spans
///
/// Streams record their spans through `tracing`, at level `info` and with the target `fraiseql_stream`. They reach a
/// tracer provider only through a layer of [tracing-opentelemetry] in your subscriber; without one, there are no spans.
/// The layer of `otlp::Guard::layer` is one. The spans are those of connecting, of a stream that has to wait for its
/// connection, of a query, of its poll batches, and of its cancel requests. The first row is an event of its query span,
/// at level `debug` and with the target `fraiseql_stream::first_row`.
///
/// ```
/// use opentelemetry::trace::TracerProvider as _;
/// use opentelemetry_sdk::trace::SdkTracerProvider;
/// use tracing_subscriber::{filter::LevelFilter, prelude::*};
///
/// let provider = SdkTracerProvider::builder().build();
/// let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("shop"));
/// tracing_subscriber::registry().with(layer.with_filter(LevelFilter::INFO)).init();
/// ```
///
/// The example `own_providers` sets up both metrics and spans.
///
/// [tracing-opentelemetry]: https://docs.rs/tracing-opentelemetry
///
/// # Examples
///
/// ```
/// use fraiseql_stream::{Connection, Instruments};
/// use opentelemetry_sdk::metrics::SdkMeterProvider;
///
/// let provider = SdkMeterProvider::builder().build();
/// let instruments = Instruments::new(&provider);
/// let builder = Connection::builder("postgres://localhost/shop").instruments(&instruments);
/// ```
#[derive(Clone)]
pub struct Instruments(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) registry: Arc<Registry>,
    pub(super) occupancy: Histogram<u64>,
    pub(super) utilization: Histogram<f64>,
    pub(super) chunk_size: Histogram<u64>,
    pub(super) time_to_first_row: Histogram<f64>,
    pub(super) operation_duration: Histogram<f64>,
    pub(super) returned_rows: Histogram<u64>,
}

static DEFAULT: Mutex<Option<Instruments>> = Mutex::new(None);

impl Instruments {
    /// Creates the instruments on a meter provider.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::Instruments;
    /// use opentelemetry_sdk::metrics::SdkMeterProvider;
    ///
    /// let provider = SdkMeterProvider::builder().build();
    /// let instruments = Instruments::new(&provider);
    /// ```
    pub fn new(provider: &dyn MeterProvider) -> Self {
        let scope = InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION"));
        let meter = provider.meter_with_scope(scope.with_schema_url(SCHEMA_URL).build());
        let registry = Arc::new(Registry::default());
        observe_times(&meter, &registry);
        observe_counts(&meter, &registry);
        observe_ends(&meter, &registry);
        observe_levels(&meter, &registry);
        Self(Arc::new(Inner {
            registry,
            occupancy: u64_histogram(&meter, &OCCUPANCY),
            utilization: f64_histogram(&meter, &UTILIZATION),
            chunk_size: u64_histogram(&meter, &CHUNK_SIZE),
            time_to_first_row: f64_histogram(&meter, &TIME_TO_FIRST_ROW),
            operation_duration: f64_histogram(&meter, &OPERATION_DURATION),
            returned_rows: u64_histogram(&meter, &RETURNED_ROWS),
        }))
    }

    /// Counts and logs a stream that was refused before anything was sent.
    pub(crate) fn record_refusal(&self, entity: &str, error: &Error) {
        self.0.registry.count_refused(End::Failed(error));
        log_failure(entity, error);
    }

    /// Returns the default instruments, which are created on the global provider at first use.
    pub(crate) fn global() -> Self {
        let mut default = lock(&DEFAULT);
        default.get_or_insert_with(|| Self::new(&*global::meter_provider())).clone()
    }

    /// Creates the default instruments anew, on the current global provider.
    #[cfg(feature = "otlp")]
    pub(crate) fn renew_global() {
        let renewed = Self::new(&*global::meter_provider());
        *lock(&DEFAULT) = Some(renewed);
    }
}

impl fmt::Debug for Instruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instruments").finish_non_exhaustive()
    }
}

/// An instrument of the catalogue.
struct Spec {
    name: &'static str,
    unit: &'static str,
    description: &'static str,
}

/// A histogram of the catalogue, with the upper bounds of its buckets.
struct HistogramSpec(Spec, &'static [f64]);

const fn spec(name: &'static str, unit: &'static str, description: &'static str) -> Spec {
    Spec { name, unit, description }
}

const OCCUPANCY: HistogramSpec = HistogramSpec(
    spec(
        "fraiseql_channel_occupancy_rows",
        "{row}",
        "Rows waiting in the channel at each poll batch: below 10 the consumer is fast, 50 to 200 is balanced, above 240 the consumer is slow",
    ),
    &[0.0, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 150.0, 200.0, 240.0, 256.0, 512.0, 1024.0, 4096.0],
);
const UTILIZATION: HistogramSpec = HistogramSpec(
    spec(
        "fraiseql.channel.utilization",
        "1",
        "The larger of rows / row limit and bytes / byte limit, at each poll batch",
    ),
    &[0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0],
);
const CHUNK_SIZE: HistogramSpec = HistogramSpec(
    spec("fraiseql.chunk.size", "{row}", "Rows of the chunk taken by each poll batch"),
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0],
);
const TIME_TO_FIRST_ROW: HistogramSpec = HistogramSpec(
    spec("fraiseql.stream.time_to_first_row", "s", "Time from the query to its first row"),
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0],
);
// The semantic conventions define the bounds of these two.
const OPERATION_DURATION: HistogramSpec = HistogramSpec(
    spec("db.client.operation.duration", "s", "Duration of database client operations."),
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0],
);
const RETURNED_ROWS: HistogramSpec = HistogramSpec(
    spec(
        "db.client.response.returned_rows",
        "{row}",
        "The actual number of records returned by the database operation",
    ),
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0],
);

fn u64_histogram(meter: &Meter, HistogramSpec(spec, bounds): &HistogramSpec) -> Histogram<u64> {
    let builder = meter.u64_histogram(spec.name).with_unit(spec.unit);
    builder.with_description(spec.description).with_boundaries(bounds.to_vec()).build()
}

fn f64_histogram(meter: &Meter, HistogramSpec(spec, bounds): &HistogramSpec) -> Histogram<f64> {
    let builder = meter.f64_histogram(spec.name).with_unit(spec.unit);
    builder.with_description(spec.description).with_boundaries(bounds.to_vec()).build()
}

/// The values of one entity, each with the attribute that distinguishes it.
type Values = Vec<(Option<(&'static str, &'static str)>, u64)>;

/// Returns the values with the attribute `key`, whose values are `names`.
fn by(key: &'static str, names: &[&'static str], values: &[u64]) -> Values {
    names.iter().zip(values).map(|(name, value)| (Some((key, *name)), *value)).collect()
}

fn observe_times(meter: &Meter, registry: &Arc<Registry>) {
    let times = |name, description, values: fn(&Totals) -> Values| {
        let registry = Arc::clone(registry);
        let observe = move |instrument: &dyn AsyncInstrument<f64>| {
            observe_all(&registry, values, |nanos, attributes| {
                instrument.observe(seconds(nanos), attributes);
            });
        };
        let builder = meter.f64_observable_counter(name).with_unit("s").with_description(description);
        builder.with_callback(observe).build();
    };
    times("fraiseql.stream.time", "Time of the streams, by what the consumer's half was doing", |totals| {
        by("state", &STATES, &totals.time)
    });
    times(
        "fraiseql.producer.time",
        "Time of the streams, by what the producer's half was waiting for: Postgres, or room in the channel",
        |totals| by("state", &["source", "room"], &totals.producer),
    );
    times(
        "fraiseql.channel.backlog.time",
        "Time in which the consumer was busy while rows, or the end of the stream, waited for it",
        |totals| vec![(None, totals.backlog)],
    );
}

fn observe_counts(meter: &Meter, registry: &Arc<Registry>) {
    let counts = |spec: Spec, values: fn(&Totals) -> Values| {
        let registry = Arc::clone(registry);
        let observe = move |instrument: &dyn AsyncInstrument<u64>| {
            observe_all(&registry, values, |value, attributes| instrument.observe(value, attributes));
        };
        let builder = meter.u64_observable_counter(spec.name).with_unit(spec.unit);
        builder.with_description(spec.description).with_callback(observe).build();
    };
    counts(spec("fraiseql.stream.rows", "{row}", "Rows by outcome"), |totals| {
        by("outcome", &OUTCOMES, &totals.rows)
    });
    counts(spec("fraiseql.stream.io", "By", "Payload bytes received from Postgres"), |totals| {
        vec![(None, totals.bytes)]
    });
    // The chunk size is fixed in this version: the zeros are true, and dashboards can already use the metric.
    counts(spec("fraiseql.chunk.adjustments", "{adjustment}", "Changes of the chunk size"), |_| {
        by("direction", &["up", "down"], &[0, 0])
    });
}

fn observe_ends(meter: &Meter, registry: &Arc<Registry>) {
    let registry = Arc::clone(registry);
    let observe = move |instrument: &dyn AsyncInstrument<u64>| {
        registry.ends(|entity, count| {
            let error_type = count.error_type.map(|kind| KeyValue::new("error.type", kind));
            let outcome = KeyValue::new("outcome", count.outcome);
            let attributes: Vec<_> =
                [Some(entity.clone()), error_type, Some(outcome)].into_iter().flatten().collect();
            instrument.observe(count.streams, &attributes);
        });
    };
    let builder = meter.u64_observable_counter("fraiseql.stream.ended").with_unit("{stream}");
    builder
        .with_description(
            "Streams that ended, by outcome; failed ones by the kind of their error (the SQLSTATE is in db.client.operation.duration)",
        )
        .with_callback(observe)
        .build();
}

fn observe_levels(meter: &Meter, registry: &Arc<Registry>) {
    let level = |spec: Spec, value: fn(&Levels) -> usize| {
        let registry = Arc::clone(registry);
        let observe = move |instrument: &dyn AsyncInstrument<i64>| {
            registry.levels(|entity, levels| {
                let value = i64::try_from(value(levels)).unwrap_or(i64::MAX);
                instrument.observe(value, std::slice::from_ref(entity));
            });
        };
        let builder = meter.i64_observable_up_down_counter(spec.name).with_unit(spec.unit);
        builder.with_description(spec.description).with_callback(observe).build();
    };
    level(spec("fraiseql.channel.row.count", "{row}", "Rows waiting in the channels"), |levels| levels.rows);
    level(
        spec("fraiseql.channel.row.limit", "{row}", "Maximum number of rows waiting in the channels"),
        |levels| levels.row_limit,
    );
    level(spec("fraiseql.channel.memory.usage", "By", "Payload bytes waiting in the channels"), |levels| {
        levels.bytes
    });
    level(
        spec(
            "fraiseql.channel.memory.limit",
            "By",
            "Maximum number of payload bytes waiting in the channels",
        ),
        |levels| levels.byte_limit,
    );
    level(spec("fraiseql.stream.active", "{stream}", "Streams that have begun and not ended"), |levels| {
        levels.streams
    });
    let registry = Arc::clone(registry);
    let observe = move |instrument: &dyn AsyncInstrument<f64>| {
        registry.levels(|entity, levels| {
            instrument.observe(seconds(levels.since_last_row), std::slice::from_ref(entity));
        });
    };
    let builder = meter.f64_observable_gauge("fraiseql.stream.since_last_row").with_unit("s");
    builder
        .with_description("The longest time since the last row, of all live streams")
        .with_callback(observe)
        .build();
}

/// Calls `observe` with each value of each entity and its attributes.
fn observe_all(
    registry: &Registry,
    values: fn(&Totals) -> Values,
    mut observe: impl FnMut(u64, &[KeyValue]),
) {
    registry.totals(|entity, totals| {
        for (attribute, value) in values(totals) {
            let attribute = attribute.map(|(key, name)| KeyValue::new(key, name));
            let attributes: Vec<_> = std::iter::once(entity.clone()).chain(attribute).collect();
            observe(value, &attributes);
        }
    });
}
