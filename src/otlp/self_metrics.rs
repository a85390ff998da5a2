//! Metrics of the export itself, with the names of the semantic conventions for SDKs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use opentelemetry::metrics::{AsyncInstrument, Meter, MeterProvider};
use opentelemetry::{InstrumentationScope, KeyValue};

use super::report::Health;
use super::settings::Settings;
use super::signal::{Exporter, Protocol, Signal};
use super::tally::Tally;

/// The name of the meter. It is not that of the streams' metrics, which a service can have without these.
const METER: &str = "fraiseql_stream.otlp";

/// What is counted of a signal.
struct Subject {
    name: &'static str,
    things: &'static str,
    unit: &'static str,
    tally: fn(&Health) -> &Tally,
}

const SPANS: Subject =
    Subject { name: "span", things: "spans", unit: "{span}", tally: |health| &health.spans };
const RECORDS: Subject =
    Subject { name: "log", things: "log records", unit: "{log_record}", tally: |health| &health.records };
const POINTS: Subject = Subject {
    name: "metric_data_point",
    things: "data points",
    unit: "{data_point}",
    tally: |health| &health.points,
};

/// The number of successes, the number of failures, and the reason of these.
type Counts = (fn(&Tally) -> [&AtomicU64; 2], &'static str);

const PROCESSED: Counts = (|tally| [&tally.processed, &tally.dropped], "queue_full");
const EXPORTED: Counts = (|tally| [&tally.exported, &tally.failed], "_OTHER");

/// Creates the metrics of the signals that are exported.
pub(super) fn observe(provider: &dyn MeterProvider, health: &Arc<Health>, settings: &Settings) {
    let scope = InstrumentationScope::builder(METER).with_version(env!("CARGO_PKG_VERSION"));
    let meter = Metrics { meter: provider.meter_with_scope(scope.build()), health };
    for (signal, subject, exporter) in [
        (&settings.traces, &SPANS, "span_exporter"),
        (&settings.logs, &RECORDS, "log_exporter"),
        (&settings.metrics, &POINTS, "metric_exporter"),
    ] {
        if signal.exporters.contains(&Exporter::Otlp) {
            meter.exporter(subject, &format!("{}_{exporter}", transport(signal)));
        }
    }
    for (signal, subject) in [(&settings.traces, &SPANS), (&settings.logs, &RECORDS)] {
        if signal.exporters.contains(&Exporter::Otlp) {
            meter.processor(subject);
        }
    }
}

fn transport(signal: &Signal) -> &'static str {
    match signal.protocol {
        Protocol::HttpProtobuf => "otlp_http",
        Protocol::Grpc => "otlp_grpc",
    }
}

struct Metrics<'a> {
    meter: Meter,
    health: &'a Arc<Health>,
}

impl Metrics<'_> {
    fn exporter(&self, subject: &Subject, component: &str) {
        let name = format!("otel.sdk.exporter.{}.exported", subject.name);
        let description = format!("The {} that were exported, or failed to be", subject.things);
        self.counter((name, description), subject, (component, EXPORTED));
    }

    fn processor(&self, subject: &Subject) {
        let name = format!("otel.sdk.processor.{}.processed", subject.name);
        let description = format!("The {} that were handed to the exporter, or dropped", subject.things);
        let component = format!("batching_{}_processor", subject.name);
        self.counter((name, description), subject, (&component, PROCESSED));
    }

    fn counter(
        &self,
        (name, description): (String, String),
        subject: &Subject,
        (component, (counts, reason)): (&str, Counts),
    ) {
        let succeeded = vec![
            KeyValue::new("otel.component.name", format!("{component}/0")),
            KeyValue::new("otel.component.type", component.to_owned()),
        ];
        let mut failed = succeeded.clone();
        failed.push(KeyValue::new("error.type", reason));
        let (health, tally) = (Arc::clone(self.health), subject.tally);
        let observe = move |instrument: &dyn AsyncInstrument<u64>| {
            let numbers = counts(tally(&health)).map(|number| number.load(Ordering::Relaxed));
            for (number, attributes) in numbers.into_iter().zip([&succeeded, &failed]) {
                instrument.observe(number, attributes);
            }
        };
        let builder = self.meter.u64_observable_counter(name).with_unit(subject.unit);
        builder.with_description(description).with_callback(observe).build();
    }
}
