//! The `OTEL_*` variables: each has the effect given by the specification, and an invalid value causes one warning.

use backends::{Collector, Span};
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::received::Received;
use crate::scenario::{self, Outcome, Result, Scenario};
use crate::servers::{Database, database, table};

const SCENARIO: &str = "environment::one_stream";
const HTTP: &str = "http/protobuf";
const OCCUPANCY: &str = "fraiseql_channel_occupancy_rows";

/// Reads one entity to its end; reports what could not be delivered.
#[test]
#[ignore = "a scenario"]
fn one_stream() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        if let Ok(warning) = std::env::var("WARNING") {
            tracing::warn!("{warning}");
        }
        let mut db = Connection::connect(&scenario::url()).await?;
        let mut orders = db.query::<RawJson>("orders").stream().await?;
        while orders.next().await.is_some() {}
        let rows = orders.stats().rows;
        drop(orders);
        let shutdown = telemetry.shutdown().await.err().map(|error| error.to_string());
        scenario::report(&json!({"rows": rows, "shutdown": shutdown}));
        Ok(())
    })
}

fn orders() -> Database {
    database(&table("orders", 1_000))
}

/// Runs the scenario with a new collector, to which it exports by HTTP unless a variable changes that.
fn run(set: &[(&str, &str)]) -> (Outcome, Received) {
    let collector = Collector::start().expect("a collector");
    let mut scenario = Scenario::new(SCENARIO, &orders()).to(&collector, HTTP);
    for (variable, value) in set {
        scenario = scenario.set(variable, value);
    }
    let outcome = scenario.run();
    assert_eq!(outcome.reported["rows"], 1_000);
    (outcome, Received::by(&collector))
}

/// A text that the console exporter of each signal prints.
const CONSOLE: [(&str, &str); 3] =
    [("TRACES", "SELECT orders"), ("METRICS", "fraiseql.stream.rows"), ("LOGS", "stream started")];

/// Whether traces, metrics and logs arrived.
fn signals(received: &Received) -> [bool; 3] {
    [!received.spans.is_empty(), !received.metrics.is_empty(), !received.logs.is_empty()]
}

#[test]
fn default_protocol_is_http() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new(SCENARIO, &orders());
    let outcome = scenario.set("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.http_endpoint()).run();
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null));
    assert_eq!(signals(&Received::by(&collector)), [true; 3]);
}

#[test]
fn disabled_sdk_exports_nothing() {
    let (outcome, received) = run(&[("OTEL_SDK_DISABLED", "True")]);
    assert!(received.is_empty(), "{:?}", signals(&received));
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
}

#[test]
fn each_signal_can_be_disabled() {
    for (index, (signal, _)) in CONSOLE.iter().enumerate() {
        let (outcome, received) = run(&[(&format!("OTEL_{signal}_EXPORTER"), "none")]);
        let mut expected = [true; 3];
        expected[index] = false;
        assert_eq!(signals(&received), expected, "without {signal}");
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    }
}

#[test]
fn warnings_reach_standard_error_whatever_is_disabled() {
    let variables = CONSOLE.map(|(signal, _)| format!("OTEL_{signal}_EXPORTER"));
    let none = variables.each_ref().map(|variable| (variable.as_str(), "none"));
    for disabled in [&none[..], &none[..1], &none[1..], &none[2..], &[("OTEL_SDK_DISABLED", "true")]] {
        let warning = [("WARNING", "a warning of the service")];
        let (outcome, _) = run(&[disabled, &warning[..]].concat());
        assert_eq!(outcome.warnings().len(), 1, "{disabled:?}: {}", outcome.stderr);
        assert!(outcome.stderr.ends_with("a warning of the service\n"), "{}", outcome.stderr);
    }
}

#[test]
fn each_signal_can_be_printed_instead_or_in_addition() {
    let printed = |outcome: &Outcome| CONSOLE.map(|(_, text)| outcome.stdout.contains(text));
    let (outcome, received) =
        run(&[("OTEL_TRACES_EXPORTER", "console"), ("OTEL_METRICS_EXPORTER", "otlp,console")]);
    assert_eq!(printed(&outcome), [true, true, false]);
    assert_eq!(signals(&received), [false, true, true]);
    let (outcome, received) = run(&[("OTEL_LOGS_EXPORTER", "Console"), ("OTEL_TRACES_EXPORTER", "otlp")]);
    assert_eq!(printed(&outcome), [false, false, true]);
    assert_eq!(signals(&received), [true, true, false]);
}

#[test]
fn each_signal_can_have_its_own_endpoint_and_protocol() {
    let (one, other) = (Collector::start().unwrap(), Collector::start().unwrap());
    let outcome = Scenario::new(SCENARIO, &orders())
        .to(&one, HTTP)
        .set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &format!("{}/v1/traces", other.http_endpoint()))
        .set("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", &other.grpc_endpoint())
        .set("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "grpc")
        .run();
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null));
    assert_eq!(signals(&Received::by(&one)), [false, true, false]);
    assert_eq!(signals(&Received::by(&other)), [true, false, true]);
}

#[test]
fn only_spans_are_left_out_by_sampling() {
    for sampler in ["always_off", "parentbased_always_off", "TraceIdRatio"] {
        let (outcome, received) = run(&[("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", "0")]);
        assert_eq!(signals(&received), [false, true, true], "{sampler}");
        assert_eq!(outcome.stderr, "", "{sampler}");
    }
}

#[test]
fn resource_has_the_name_and_the_decoded_attributes() {
    let (outcome, received) = run(&[
        ("OTEL_SERVICE_NAME", "the shop"),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "team=a%2Cb%3Dc%20d, service.name=not this,deployment.environment.name=t%C3%A4st",
        ),
    ]);
    assert_eq!(outcome.stderr, "");
    let spans = received.spans.iter().map(|span| &span.resource);
    let logs = received.logs.iter().map(|log| &log.resource);
    let metrics = received.metrics.iter().map(|metric| &metric.resource);
    for resource in spans.chain(logs).chain(metrics) {
        for (attribute, value) in [
            ("service.name", "the shop"),
            ("team", "a,b=c d"),
            ("deployment.environment.name", "täst"),
            ("telemetry.sdk.language", "rust"),
        ] {
            assert_eq!(resource.get(attribute), Some(&json!(value)), "{attribute}");
        }
    }
    let ids = received.spans.iter().map(|span| span.resource["service.instance.id"].to_string());
    let ids: std::collections::BTreeSet<_> = ids.collect();
    // A UUID in quotes.
    assert!(ids.len() == 1 && ids.iter().all(|id| id.len() == 38 && &id[15..16] == "4"), "{ids:?}");
    let scope = format!("InstrumentationScope fraiseql_stream {}", env!("CARGO_PKG_VERSION"));
    let traces = received.text.split("ScopeSpans #").nth(1).unwrap_or_default();
    assert!(traces.contains(&scope), "{traces:.300}");
}

#[test]
fn service_name_can_be_one_of_the_attributes() {
    let (_, received) = run(&[("OTEL_RESOURCE_ATTRIBUTES", "service.name=the shop")]);
    let name = |span: &Span| span.resource.get("service.name").cloned();
    assert_eq!(name(received.query("orders")), Some(json!("the shop")));
}

#[test]
fn each_invalid_value_causes_one_warning_and_the_default_is_used() {
    let invalid = [
        ("OTEL_SDK_DISABLED", "perhaps"),
        ("OTEL_TRACES_EXPORTER", "carrier-pigeon"),
        ("OTEL_METRICS_EXPORTER", "otlp,smoke"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "by hand"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "many"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "-1"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop,team=a%zz"),
        ("OTEL_PROPAGATORS", "pigeon"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "few"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_EXPORTER_OTLP_INSECURE", "maybe"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "sometimes"),
        ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "round"),
    ];
    let (outcome, received) = run(&invalid);
    for (variable, value) in invalid {
        let about = |line: &&&str| line.contains(&format!("{variable}={value:?}"));
        let lines = outcome.warnings();
        assert_eq!(lines.iter().filter(about).count(), 1, "{variable}\n{}", outcome.stderr);
    }
    assert_eq!(outcome.warnings().len(), invalid.len(), "{}", outcome.stderr);
    assert_eq!((signals(&received), &outcome.reported["shutdown"]), ([true; 3], &Value::Null));
    let resource = &received.query("orders").resource;
    let name = resource["service.name"].as_str().unwrap_or_default();
    assert!(!resource.contains_key("team") && name.starts_with("unknown_service:"), "{resource:?}");
    let rows = received.metric("fraiseql.stream.rows");
    assert_eq!((rows.temporality, received.metric(OCCUPANCY).kind), ("cumulative", "histogram"));
}

#[test]
fn invalid_endpoint_causes_one_warning_and_the_default_is_used() {
    for (variable, lost) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", [false, false, false]),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", [true, true, false]),
    ] {
        let (outcome, received) = run(&[(variable, "nowhere")]);
        let about = |line: &&str| line.contains(variable);
        let lines: Vec<_> = outcome.warnings().into_iter().filter(about).collect();
        assert_eq!(lines.len(), 1, "{}", outcome.stderr);
        assert!(lines[0].contains("http://localhost:4318"), "{}", outcome.stderr);
        assert_eq!(signals(&received), lost, "{variable}");
    }
}

#[test]
fn empty_variables_count_as_unset() {
    let (outcome, received) = run(&[
        ("OTEL_SDK_DISABLED", ""),
        ("OTEL_TRACES_EXPORTER", ""),
        ("OTEL_TRACES_SAMPLER", ""),
        ("OTEL_SERVICE_NAME", ""),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ""),
        ("OTEL_METRIC_EXPORT_INTERVAL", " "),
    ]);
    assert_eq!((outcome.stderr.as_str(), signals(&received)), ("", [true; 3]));
}

#[test]
fn zero_is_no_timeout_and_no_delay() {
    let (outcome, received) = run(&[
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "0"),
        ("OTEL_BLRP_EXPORT_TIMEOUT", "0"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "0"),
    ]);
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null));
    assert_eq!(signals(&received), [true; 3]);
}

#[test]
fn grpc_endpoint_needs_no_scheme() {
    let collector = Collector::start().unwrap();
    let endpoint = collector.grpc_endpoint();
    let outcome = Scenario::new(SCENARIO, &orders())
        .set("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.trim_start_matches("http://"))
        .set("OTEL_EXPORTER_OTLP_INSECURE", "true")
        .run();
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null));
    assert_eq!(signals(&Received::by(&collector)), [true; 3]);
}

#[test]
fn histograms_can_be_exponential() {
    let aggregation = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION";
    let (outcome, received) = run(&[(aggregation, "base2_exponential_bucket_histogram")]);
    assert_eq!(outcome.stderr, "");
    for name in [OCCUPANCY, "fraiseql.stream.time_to_first_row", "db.client.operation.duration"] {
        let metric = received.metric(name);
        assert_eq!((metric.kind, metric.points[0].count > 0), ("exponential_histogram", true), "{name}");
    }
    assert_eq!(received.metric("fraiseql.stream.rows").kind, "sum");
}

#[test]
fn temporality_can_be_delta() {
    let (outcome, received) = run(&[("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "Delta")]);
    assert_eq!(outcome.stderr, "");
    for name in [OCCUPANCY, "fraiseql.stream.rows"] {
        assert_eq!(received.metric(name).temporality, "delta", "{name}");
    }
}

#[test]
fn attributes_and_events_of_spans_can_be_limited() {
    for limit in ["OTEL_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"] {
        let (outcome, received) = run(&[(limit, "3"), ("OTEL_SPAN_EVENT_COUNT_LIMIT", "0")]);
        assert_eq!(outcome.stderr, "", "{limit}");
        let queries: Vec<_> = received.spans.iter().filter(|span| span.name == "SELECT orders").collect();
        assert_eq!(
            (queries.len(), queries[0].attributes.len(), queries[0].events.len()),
            (1, 3, 0),
            "{limit}"
        );
    }
}
