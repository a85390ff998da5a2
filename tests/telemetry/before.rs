//! What happens before a query has a span: connecting, and waiting for the clean-up of a dropped stream.

use std::sync::OnceLock;
use std::time::Duration;

use backends::{Collector, Span, send_signal};
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use tracing::{Instrument, info_span};

use crate::received::{Received, integer, seconds, text};
use crate::scenario::{self, Result, Scenario};
use crate::servers::{SILENT, database, postgres, table};

/// A password that is wrong.
const WRONG: &str = "not-the-password";
/// The time for which a backend does not react to a cancel request.
const STOPPED: Duration = Duration::from_millis(300);

/// Connects, fails to connect, and runs a stream that has to wait for the clean-up of another one.
#[test]
#[ignore = "a scenario"]
fn connecting_and_waiting() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let wrong = scenario::url().replace(&std::env::var("PASSWORD")?, WRONG);
        let refused = Connection::connect(&wrong).instrument(info_span!("wrong")).await;
        assert!(refused.is_err());
        let mut db = Connection::connect(&scenario::url()).await?;
        let pid: i32 = db.client().await?.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
        let silent = db.query::<RawJson>("silent").stream().await?;
        assert!(send_signal("STOP", pid));
        drop(silent);
        tokio::spawn(async move {
            tokio::time::sleep(STOPPED).await;
            assert!(send_signal("CONT", pid));
        });
        for request in ["waits", "does_not_wait"] {
            let orders = db.query::<RawJson>("orders").stream();
            let orders = orders.instrument(info_span!("request", otel.name = request)).await?;
            assert_eq!(orders.count().await, 10);
        }
        Ok(telemetry.shutdown().await?)
    })
}

/// Returns the telemetry of the scenario, which runs once for all tests of this file.
fn received() -> &'static Received {
    static RECEIVED: OnceLock<Received> = OnceLock::new();
    RECEIVED.get_or_init(|| {
        let collector = Collector::start().expect("a collector");
        let database = database(&(table("orders", 10) + SILENT));
        let scenario = Scenario::new("before::connecting_and_waiting", &database);
        let scenario = scenario.set("PASSWORD", postgres().password());
        assert_eq!(scenario.to(&collector, "http/protobuf").run().stderr, "");
        Received::by(&collector)
    })
}

fn span(name: &str) -> &'static Span {
    let found = received().spans.iter().find(|span| span.name == name);
    found.unwrap_or_else(|| panic!("no span {name}"))
}

#[test]
fn connecting_is_a_client_span_with_the_server() {
    let is_good = |span: &&Span| span.name == "connect" && span.status_code == "unset";
    let connects: Vec<_> = received().spans.iter().filter(is_good).collect();
    assert_eq!(connects.len(), 1);
    let query = span("SELECT orders");
    assert_eq!(connects[0].kind, "client");
    for attribute in ["db.system.name", "db.namespace", "server.address"] {
        assert_eq!(text(connects[0], attribute), text(query, attribute), "{attribute}");
    }
    assert_eq!(integer(connects[0], "server.port"), i64::from(postgres().port()));
    assert!(!connects[0].attributes.contains_key("error.type"));
}

#[test]
fn failed_connecting_has_the_error_and_no_password() {
    let [connect] = received().below(span("wrong"), "connect")[..] else { panic!("one span") };
    assert_eq!((connect.status_code, text(connect, "error.type")), ("error", "28P01"));
    assert_eq!(text(connect, "db.response.status_code"), "28P01");
    let message = &connect.status_message;
    assert!(message.contains("password authentication failed for user"), "{message}");
    assert!(!message.contains("28P01") && !message.contains(WRONG), "{message}");
}

#[test]
fn stream_that_waits_for_a_clean_up_has_a_span_for_it() {
    let [wait] = received().below(span("waits"), "wait_for_connection")[..] else { panic!("one span") };
    assert!((0.2..2.0).contains(&seconds(wait)), "{} s", seconds(wait));
    assert_eq!(
        (wait.kind, wait.status_code, text(wait, "db.collection.name")),
        ("internal", "unset", "orders")
    );
    let query = received().below(span("waits"), "SELECT orders")[0];
    assert!(wait.end_ns <= query.start_ns + 1_000_000, "{wait:?} {query:?}");
}

#[test]
fn stream_that_does_not_wait_has_no_span_for_it() {
    assert_eq!(received().below(span("does_not_wait"), "SELECT orders").len(), 1);
    assert_eq!(received().below(span("does_not_wait"), "wait_for_connection").len(), 0);
}
