//! The instruments, by the names and units of the catalogue.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry::metrics::{AsyncInstrument, Counter, Histogram, Meter, MeterProvider};
use opentelemetry::{InstrumentationScope, KeyValue, global};

use super::SCOPE;
use super::registry::{Levels, OUTCOMES, Registry, STATES, Totals};

/// The metrics of all streams that are made with it, on one meter provider.
///
/// You need it only if your meter provider is not the global one, or is set after the first connection is
/// made: the default is made from the global provider at the first connection, or by `otlp::init()`. Make
/// one and keep it: observable instruments cannot be taken back, so each one made adds a set of callbacks.
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
    pub(super) ended: Counter<u64>,
    pub(super) operation_duration: Histogram<f64>,
    pub(super) returned_rows: Histogram<u64>,
}

static DEFAULT: Mutex<Option<Instruments>> = Mutex::new(None);

impl Instruments {
    /// Makes the instruments on a provider of yours.
    pub fn new(provider: &dyn MeterProvider) -> Self {
        let scope = InstrumentationScope::builder(SCOPE)
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        let meter = provider.meter_with_scope(scope);
        let registry = Arc::new(Registry::default());
        observe_totals(&meter, &registry);
        observe_levels(&meter, &registry);
        Self(Arc::new(synchronous(&meter, registry)))
    }

    /// The default ones, made from the global provider at first use.
    pub(crate) fn global() -> Self {
        let mut default = DEFAULT.lock().unwrap_or_else(PoisonError::into_inner);
        default
            .get_or_insert_with(|| Self::new(&*global::meter_provider()))
            .clone()
    }

    /// From now on the global provider of this moment is the one.
    #[cfg(feature = "otlp")]
    pub(crate) fn renew_global() {
        let made = Self::new(&*global::meter_provider());
        *DEFAULT.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
    }
}

impl fmt::Debug for Instruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instruments").finish_non_exhaustive()
    }
}

fn synchronous(meter: &Meter, registry: Arc<Registry>) -> Inner {
    let rows = |name, about, bounds: &[f64]| {
        meter
            .u64_histogram(name)
            .with_unit("{row}")
            .with_description(about)
            .with_boundaries(bounds.to_vec())
            .build()
    };
    let floats = |name, unit, about, bounds: &[f64]| {
        meter
            .f64_histogram(name)
            .with_unit(unit)
            .with_description(about)
            .with_boundaries(bounds.to_vec())
            .build()
    };
    Inner {
        registry,
        occupancy: rows(
            "fraiseql_channel_occupancy_rows",
            "Rows that wait in the channel, at every poll batch: below 10 the consumer is fast, 50 to 200 is balanced, above 240 the consumer is slow",
            &[
                0.0, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 150.0, 200.0, 240.0, 256.0, 512.0, 1024.0,
                4096.0,
            ],
        ),
        utilization: floats(
            "fraiseql.channel.utilization",
            "1",
            "The larger of rows to row limit and bytes to byte limit, at every poll batch",
            &[0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0],
        ),
        chunk_size: rows(
            "fraiseql.chunk.size",
            "Rows of a chunk, at every poll batch",
            &[
                1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
            ],
        ),
        time_to_first_row: floats(
            "fraiseql.stream.time_to_first_row",
            "s",
            "From the query to its first row",
            &[
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
                60.0,
            ],
        ),
        ended: meter
            .u64_counter("fraiseql.stream.ended")
            .with_unit("{stream}")
            .with_description("Streams that ended, by outcome")
            .build(),
        // Boundaries of both are those of the semantic conventions.
        operation_duration: floats(
            "db.client.operation.duration",
            "s",
            "Duration of database client operations",
            &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0],
        ),
        returned_rows: rows(
            "db.client.response.returned_rows",
            "The actual number of records returned by the database operation",
            &[
                1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0,
                10000.0,
            ],
        ),
    }
}

fn observe_totals(meter: &Meter, registry: &Arc<Registry>) {
    seconds(
        meter,
        registry,
        "fraiseql.stream.time",
        "Where the consumer's half of the streams' life goes",
        |totals| {
            STATES
                .iter()
                .zip(totals.time)
                .map(|(state, time)| (Some(("state", *state)), time))
                .collect()
        },
    );
    seconds(
        meter,
        registry,
        "fraiseql.producer.time",
        "Where the producer's half goes: waiting for Postgres, or for room",
        |totals| {
            ["source", "room"]
                .into_iter()
                .zip(totals.producer)
                .map(|(state, time)| (Some(("state", state)), time))
                .collect()
        },
    );
    seconds(
        meter,
        registry,
        "fraiseql.channel.backlog.time",
        "Time in which the consumer was busy while rows waited for it",
        |totals| vec![(None, totals.backlog)],
    );
    counter(
        meter,
        registry,
        (
            "fraiseql.stream.rows",
            "{row}",
            "Rows by what became of them",
        ),
        |totals| {
            OUTCOMES
                .iter()
                .zip(totals.rows)
                .map(|(outcome, rows)| (Some(("outcome", *outcome)), rows))
                .collect()
        },
    );
    counter(
        meter,
        registry,
        ("fraiseql.stream.io", "By", "Payload received"),
        |totals| vec![(None, totals.bytes)],
    );
    // Chunks have a fixed size so far; the series are there for the panels.
    counter(
        meter,
        registry,
        (
            "fraiseql.chunk.adjustments",
            "{adjustment}",
            "Changes of the chunk size",
        ),
        |_| {
            vec![
                (Some(("direction", "up")), 0),
                (Some(("direction", "down")), 0),
            ]
        },
    );
}

/// The values of one entity, each with the attribute that tells it from its siblings.
type Values = Vec<(Option<(&'static str, &'static str)>, u64)>;

fn attributes(entity: &KeyValue, own: Option<(&'static str, &'static str)>) -> Vec<KeyValue> {
    let own = own.map(|(key, value)| KeyValue::new(key, value));
    std::iter::once(entity.clone()).chain(own).collect()
}

fn seconds(
    meter: &Meter,
    registry: &Arc<Registry>,
    name: &'static str,
    about: &'static str,
    values: impl Fn(&Totals) -> Values + Send + Sync + 'static,
) {
    let registry = Arc::clone(registry);
    let observe = move |instrument: &dyn AsyncInstrument<f64>| {
        registry.totals(|entity, totals| {
            for (own, nanos) in values(totals) {
                instrument.observe(nanos as f64 / 1e9, &attributes(entity, own));
            }
        });
    };
    meter
        .f64_observable_counter(name)
        .with_unit("s")
        .with_description(about)
        .with_callback(observe)
        .build();
}

fn counter(
    meter: &Meter,
    registry: &Arc<Registry>,
    (name, unit, about): (&'static str, &'static str, &'static str),
    values: impl Fn(&Totals) -> Values + Send + Sync + 'static,
) {
    let registry = Arc::clone(registry);
    let observe = move |instrument: &dyn AsyncInstrument<u64>| {
        registry.totals(|entity, totals| {
            for (own, value) in values(totals) {
                instrument.observe(value, &attributes(entity, own));
            }
        });
    };
    meter
        .u64_observable_counter(name)
        .with_unit(unit)
        .with_description(about)
        .with_callback(observe)
        .build();
}

fn observe_levels(meter: &Meter, registry: &Arc<Registry>) {
    let level = |name, unit, about, value: fn(&Levels) -> usize| {
        let registry = Arc::clone(registry);
        let observe = move |instrument: &dyn AsyncInstrument<i64>| {
            registry.levels(|entity, levels| {
                let value = i64::try_from(value(levels)).unwrap_or(i64::MAX);
                instrument.observe(value, std::slice::from_ref(entity));
            });
        };
        meter
            .i64_observable_up_down_counter(name)
            .with_unit(unit)
            .with_description(about)
            .with_callback(observe)
            .build();
    };
    level(
        "fraiseql.channel.row.count",
        "{row}",
        "Rows that wait in the channels of live streams",
        |levels| levels.rows,
    );
    level(
        "fraiseql.channel.row.limit",
        "{row}",
        "Rows that may wait there",
        |levels| levels.row_limit,
    );
    level(
        "fraiseql.channel.memory.usage",
        "By",
        "Payload bytes that wait in the channels of live streams",
        |levels| levels.bytes,
    );
    level(
        "fraiseql.channel.memory.limit",
        "By",
        "Payload bytes that may wait there",
        |levels| levels.byte_limit,
    );
    level(
        "fraiseql.stream.active",
        "{stream}",
        "Live streams",
        |levels| levels.streams,
    );
    let registry = Arc::clone(registry);
    let observe = move |instrument: &dyn AsyncInstrument<f64>| {
        registry.levels(|entity, levels| {
            instrument.observe(
                levels.since_last_row as f64 / 1e9,
                std::slice::from_ref(entity),
            );
        });
    };
    let name = "fraiseql.stream.since_last_row";
    meter
        .f64_observable_gauge(name)
        .with_unit("s")
        .with_description("The longest time without a row over the live streams")
        .with_callback(observe)
        .build();
}
