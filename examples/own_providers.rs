//! Streams a table in a service with OpenTelemetry providers of its own, and prints the metrics and spans.
//!
//! `DATABASE_URL=postgres://app@localhost/shop cargo run --example own_providers -- orders`

use fraiseql_stream::{Connection, Instruments, RawJson};
use futures_util::TryStreamExt as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::{filter::LevelFilter, prelude::*};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let metrics = opentelemetry_stdout::MetricExporter::default();
    let meters = SdkMeterProvider::builder().with_periodic_exporter(metrics).build();
    let spans = opentelemetry_stdout::SpanExporter::default();
    let tracers = SdkTracerProvider::builder().with_batch_exporter(spans).build();

    // Streams record their spans through `tracing`; only this layer passes them on to the tracer provider.
    let layer = tracing_opentelemetry::layer().with_tracer(tracers.tracer("shop"));
    tracing_subscriber::registry().with(layer.with_filter(LevelFilter::INFO)).init();

    let instruments = Instruments::new(&meters);
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL is set");
    let mut db = Connection::builder(&url).instruments(&instruments).connect().await?;
    let entity = std::env::args().nth(1).ok_or("usage: own_providers ENTITY")?;
    let mut rows = db.query::<RawJson>(&entity).stream().await?;
    while rows.try_next().await?.is_some() {}
    eprintln!("{}", rows.stats());
    drop(rows);

    db.close().await?;
    tracers.shutdown()?;
    Ok(meters.shutdown()?)
}
