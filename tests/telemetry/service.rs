//! Services that set up telemetry themselves, on request, or not at all.

use backends::Collector;
use fraiseql_stream::{Connection, Instruments, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::json;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::{BROKEN, Database, SILENT, database, table};

/// Runs streams that end in every possible way, without any set-up.
#[test]
#[ignore = "a scenario"]
fn without_telemetry() -> Result {
    scenario::run_scenario(async {
        scenario::report(&json!(streams().await?));
        Ok(())
    })
}

/// Runs the same in a service with its own `tracing` subscriber.
#[test]
#[ignore = "a scenario"]
fn with_a_subscriber() -> Result {
    scenario::run_scenario(async {
        let print = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(std::io::stderr);
        let print = tracing_subscriber::registry().with(print.with_target(true));
        let telemetry = if std::env::var_os("INIT").is_some() {
            print.init();
            otlp::init()?
        } else {
            let telemetry = otlp::set_global_providers()?;
            print.with(telemetry.layer()).init();
            telemetry
        };
        tracing::warn!("a warning of the service");
        scenario::report(&json!(streams().await?));
        Ok(telemetry.shutdown().await?)
    })
}

/// Runs the same with telemetry on request, and logs a warning.
#[test]
#[ignore = "a scenario"]
fn on_request() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init_if_configured()?;
        tracing::warn!("a warning of the service");
        streams().await?;
        let is_configured = telemetry.is_some();
        if let Some(telemetry) = telemetry {
            telemetry.shutdown().await?;
        }
        scenario::report(&json!(is_configured));
        Ok(())
    })
}

/// Reads one entity with the providers of the guard, and another one with the global providers.
#[test]
#[ignore = "a scenario"]
fn without_globals() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::build_providers()?;
        tracing_subscriber::registry().with(telemetry.layer()).init();
        let instruments = Instruments::new(&*telemetry.meter_provider());
        for (entity, builder) in [
            ("orders", Connection::builder(scenario::url()).instruments(&instruments)),
            ("global", Connection::builder(scenario::url())),
        ] {
            let mut db = builder.connect().await?;
            let mut rows = db.query::<RawJson>(entity).stream().await?;
            while rows.next().await.is_some() {}
        }
        Ok(telemetry.shutdown().await?)
    })
}

/// Sets up telemetry, and reports the error.
#[test]
#[ignore = "a scenario"]
fn failing_set_up() -> Result {
    scenario::run_scenario(async {
        let error = otlp::init().err().ok_or("the set-up succeeded")?;
        scenario::report(&json!({
            "text": error.to_string(),
            "kind": format!("{:?}", error.kind()),
            "cause": error.get_ref().map(ToString::to_string),
            "has_source": std::error::Error::source(&error).is_some(),
        }));
        Ok(())
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
fn streams_work_without_set_up_and_nothing_is_printed_or_exported() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::without_telemetry", &tables());
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!(outcome.reported, 3);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    assert!(Received::by(&collector).is_empty());
}

#[test]
fn service_adds_the_layer_to_its_own_subscriber() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::with_a_subscriber", &tables());
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert!(outcome.stderr.contains("a warning of the service"), "{}", outcome.stderr);
    let received = Received::by(&collector);
    let query = received.query("orders");
    assert!(received.logs.iter().any(|log| log.trace_id == query.trace_id));
    assert_eq!(received.value("fraiseql.stream.active", &[("entity", "orders")]), 0.0);
}

#[test]
fn init_keeps_an_installed_subscriber_and_warns() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::with_a_subscriber", &tables()).set("INIT", "");
    let outcome = scenario.to(&collector, "http/protobuf").run();
    let about = |line: &&str| line.contains("otlp::set_global_providers()");
    assert_eq!(outcome.warnings().into_iter().filter(about).count(), 1, "{}", outcome.stderr);
    let received = Received::by(&collector);
    assert!(received.spans.is_empty() && received.logs.is_empty());
    assert_eq!(received.value("fraiseql.stream.active", &[("entity", "orders")]), 0.0);
}

#[test]
fn warnings_before_any_subscriber_reach_standard_error_once() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::with_a_subscriber", &tables()).set("OTEL_TRACES_SAMPLER", "never");
    let outcome = scenario.to(&collector, "http/protobuf").run();
    let about = |line: &&str| line.contains("OTEL_TRACES_SAMPLER=\"never\" is invalid");
    assert_eq!(outcome.warnings().into_iter().filter(about).count(), 1, "{}", outcome.stderr);
}

#[test]
fn telemetry_on_request_is_exported_if_a_variable_is_set() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("service::on_request", &tables());
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!(outcome.reported, true);
    assert_is_the_warning(&outcome.warnings());
    let received = Received::by(&collector);
    assert_eq!(received.queries("orders").len(), 1);
    assert_eq!(received.value("fraiseql.stream.active", &[("entity", "orders")]), 0.0);
}

#[test]
fn telemetry_on_request_only_prints_warnings_if_no_variable_has_a_value() {
    let scenario = Scenario::new("service::on_request", &tables());
    let outcome = scenario.set("OTEL_EXPORTER_OTLP_ENDPOINT", " ").run();
    assert_eq!(outcome.reported, false);
    // An export to the default endpoint would add a line.
    assert_is_the_warning(&outcome.warnings());
}

/// Asserts that there is only the warning of the service, with a time and its target.
fn assert_is_the_warning(lines: &[&str]) {
    let [line] = lines else { panic!("{lines:#?}") };
    let (time, text) = line.split_once(' ').unwrap_or_default();
    assert_eq!(text.trim_start(), "WARN telemetry::service: a warning of the service");
    assert!(time.starts_with("20") && time.ends_with('Z') && time.contains('T'), "{line}");
}

#[test]
fn standard_error_is_filtered_as_asked_and_exports_are_not() {
    for (filter, warns, starts) in
        [("error", false, false), ("warn,fraiseql_stream=debug", true, true), ("telemetry=info", true, false)]
    {
        let collector = Collector::start().unwrap();
        let scenario = Scenario::new("service::on_request", &tables()).set("RUST_LOG", filter);
        let outcome = scenario.to(&collector, "http/protobuf").run();
        assert_eq!(
            outcome.stderr.contains("a warning of the service"),
            warns,
            "{filter}: {}",
            outcome.stderr
        );
        assert_eq!(outcome.stderr.contains("stream started"), starts, "{filter}: {}", outcome.stderr);
        let received = Received::by(&collector);
        let query = received.query("orders");
        let of_query = |log: &&backends::Log| log.trace_id == query.trace_id;
        assert_eq!(received.logs.iter().filter(of_query).count(), 1, "{filter}");
    }
}

#[test]
fn invalid_filter_causes_one_warning() {
    let scenario = Scenario::new("service::on_request", &tables());
    let outcome = scenario.set("RUST_LOG", "fraiseql_stream=loud").run();
    let about = |line: &&str| line.contains("RUST_LOG=\"fraiseql_stream=loud\" is invalid");
    assert_eq!(outcome.warnings().into_iter().filter(about).count(), 1, "{}", outcome.stderr);
    assert_eq!(outcome.warnings().len(), 2, "{}", outcome.stderr);
}

#[test]
fn providers_that_are_built_only_are_not_global() {
    let collector = Collector::start().unwrap();
    let database = database(&(table("orders", 1_000) + &table("global", 10)));
    let outcome = Scenario::new("service::without_globals", &database).to(&collector, "http/protobuf").run();
    assert_eq!(outcome.stderr, "");
    let received = Received::by(&collector);
    let rows = [("entity", "orders"), ("outcome", "yielded")];
    assert_eq!(received.value("fraiseql.stream.rows", &rows), 1_000.0);
    let metric = received.metric("fraiseql.stream.rows");
    assert!(metric.point(&[("entity", "global")]).is_none(), "{metric:#?}");
    // The layer belongs to the subscriber, which serves both connections.
    assert_eq!((received.queries("orders").len(), received.queries("global").len()), (1, 1));
}

#[test]
fn refused_endpoint_is_a_configuration_error_whose_text_includes_the_cause_and_no_secret() {
    let endpoint = format!("http://user:t0ken@localhost:4318/{}", "a".repeat(70_000));
    for protocol in ["http/protobuf", "grpc"] {
        let scenario = Scenario::new("service::failing_set_up", &tables());
        let scenario = scenario.set("OTEL_EXPORTER_OTLP_PROTOCOL", protocol);
        let outcome = scenario.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).run();
        let error = outcome.reported;
        assert_eq!(
            (&error["kind"], &error["has_source"]),
            (&json!("Configuration"), &json!(false)),
            "{error}"
        );
        let text = error["text"].as_str().expect("an error");
        let cause = error["cause"].as_str().expect("a cause");
        assert!(text.starts_with("cannot create the exporter for http://localhost:4318: "), "{text}");
        assert!(text.ends_with(cause) && text.lines().count() == 1 && text.len() < 1_000, "{text}: {cause}");
        assert!(!text.contains("t0ken"), "{text}");
    }
}
