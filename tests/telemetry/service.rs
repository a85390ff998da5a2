//! Services that set up telemetry themselves, or not at all.

use backends::Collector;
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::json;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::{BROKEN, Database, SILENT, database, table};

/// Streams that end in every way, by a service without any set-up.
#[test]
#[ignore = "a scenario"]
fn without_telemetry() -> Result {
    scenario::play(async {
        scenario::tell(&json!(streams().await?));
        Ok(())
    })
}

/// The same, by a service with a `tracing` subscriber of its own.
#[test]
#[ignore = "a scenario"]
fn with_a_subscriber() -> Result {
    scenario::play(async {
        let print = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(std::io::stderr);
        let print = tracing_subscriber::registry().with(print.with_target(true));
        let telemetry = if std::env::var_os("INIT").is_some() {
            print.init();
            otlp::init()?
        } else {
            let telemetry = otlp::providers()?;
            print.with(telemetry.layer()).init();
            telemetry
        };
        tracing::warn!("the service's own subscriber");
        scenario::tell(&json!(streams().await?));
        Ok(telemetry.shutdown().await?)
    })
}

async fn streams() -> Result<u64> {
    let mut db = Connection::connect(&scenario::url()).await?;
    let mut rows = 0;
    for entity in ["orders", "broken", "nowhere", "silent"] {
        let Ok(mut stream) = db.query::<RawJson>(entity).stream().await else { continue };
        let wait = std::time::Duration::from_millis(200);
        while let Ok(Some(_)) = tokio::time::timeout(wait, stream.next()).await {}
        rows += stream.close().await.map(|_| 1)?;
    }
    Ok(rows)
}

fn tables() -> Database {
    database(&(table("orders", 1_000) + BROKEN + SILENT))
}

#[test]
fn without_provider_and_subscriber_streams_work_and_nothing_is_printed_or_sent() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::without_telemetry", &tables());
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!(outcome.told, 3);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    assert!(Received::by(&collector).is_empty());
}

#[test]
fn a_service_with_a_subscriber_of_its_own_adds_the_layer() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::with_a_subscriber", &tables());
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert!(outcome.stderr.contains("the service's own subscriber"), "{}", outcome.stderr);
    let received = Received::by(&collector);
    let query = received.query("orders");
    assert!(received.logs.iter().any(|log| log.trace_id == query.trace_id));
    assert_eq!(received.value("fraiseql.stream.active", &[("entity", "orders")]), 0.0);
}

#[test]
fn init_leaves_a_subscriber_that_is_there_and_says_so() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::with_a_subscriber", &tables()).set("INIT", "");
    let outcome = scenario.to(&collector, "http/protobuf").run();
    let about = |line: &&str| line.contains("otlp::providers()");
    assert_eq!(outcome.warnings().into_iter().filter(about).count(), 1, "{}", outcome.stderr);
    let received = Received::by(&collector);
    assert!(received.spans.is_empty() && received.logs.is_empty());
    assert_eq!(received.value("fraiseql.stream.active", &[("entity", "orders")]), 0.0);
}
