//! Traces and baggage cross the border of the service by the global propagator, as `OTEL_PROPAGATORS` says.

use std::collections::HashMap;

use backends::Collector;
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use opentelemetry::global;
use serde_json::json;
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::received::Received;
use crate::scenario::{self, Result, Scenario};
use crate::servers::{database, table};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// Serves a request that came with headers, and reports the headers of a call to another service.
#[test]
#[ignore = "a scenario"]
fn a_request() -> Result {
    scenario::run_scenario(async {
        let with_layer = |guard: &otlp::Guard| tracing_subscriber::registry().with(guard.layer()).init();
        let telemetry = match std::env::var("SET_UP").as_deref() {
            Ok("set_global_providers") => otlp::set_global_providers().inspect(with_layer)?,
            Ok("build_providers") => otlp::build_providers().inspect(with_layer)?,
            _ => otlp::init()?,
        };
        let incoming: HashMap<String, String> = [
            ("traceparent".to_owned(), format!("00-{TRACE}-{CALLER}-01")),
            ("baggage".to_owned(), "tenant=acme".to_owned()),
        ]
        .into();
        let parent = global::get_text_map_propagator(|propagator| propagator.extract(&incoming));
        let request = tracing::info_span!("request");
        // Fails if spans are not exported.
        request.set_parent(parent.clone()).ok();
        let streamed = async {
            let mut db = Connection::connect(&scenario::url()).await?;
            let mut orders = db.query::<RawJson>("orders").stream().await?;
            while orders.next().await.is_some() {}
            Ok::<(), fraiseql_stream::Error>(())
        };
        streamed.instrument(request).await?;
        let mut outgoing = HashMap::new();
        global::get_text_map_propagator(|propagator| propagator.inject_context(&parent, &mut outgoing));
        scenario::report(&json!(outgoing));
        Ok(telemetry.shutdown().await?)
    })
}

/// Serves a request. Returns what was exported and the names of the headers of the outgoing call.
fn serve(set: &[(&str, &str)]) -> (Received, Vec<String>) {
    let collector = Collector::start().expect("a collector");
    let database = database(&table("orders", 100));
    let mut scenario = Scenario::new("propagation::a_request", &database).to(&collector, "http/protobuf");
    for (variable, value) in set {
        scenario = scenario.set(variable, value);
    }
    let outcome = scenario.run();
    assert_eq!(outcome.stderr, "");
    let outgoing = outcome.reported.as_object().expect("headers");
    let mut names: Vec<_> = outgoing.keys().filter(|name| *name != "tracestate").cloned().collect();
    names.sort();
    (Received::by(&collector), names)
}

/// Whether the span of the request is a child of the caller's, and the query belongs to its trace.
fn continues(received: &Received) -> bool {
    let request = received.spans.iter().find(|span| span.name == "request").expect("a span");
    let query = received.query("orders");
    assert_eq!((&query.trace_id, &query.parent_span_id), (&request.trace_id, &request.span_id));
    request.trace_id == TRACE && request.parent_span_id == CALLER
}

#[test]
fn trace_of_the_caller_continues() {
    for set_up in ["init", "set_global_providers"] {
        let (received, outgoing) = serve(&[("SET_UP", set_up)]);
        assert!(continues(&received), "{set_up}: {:#?}", received.spans);
        assert_eq!(outgoing, ["baggage", "traceparent"], "{set_up}");
    }
}

#[test]
fn trace_begins_anew_without_its_propagator() {
    for (propagators, expected) in [("none", &[][..]), ("Baggage, baggage", &["baggage"])] {
        let (received, outgoing) = serve(&[("OTEL_PROPAGATORS", propagators)]);
        assert!(!continues(&received), "{propagators}: {:#?}", received.spans);
        assert_eq!(outgoing, expected, "{propagators}");
    }
}

#[test]
fn providers_that_are_built_only_set_no_propagator() {
    let (received, outgoing) = serve(&[("SET_UP", "build_providers")]);
    assert!(!continues(&received) && outgoing.is_empty(), "{outgoing:?}");
}

#[test]
fn disabled_sdk_still_passes_the_headers_on() {
    let (received, outgoing) = serve(&[("OTEL_SDK_DISABLED", "true")]);
    assert!(received.is_empty());
    assert_eq!(outgoing, ["baggage", "traceparent"]);
}
