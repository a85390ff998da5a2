//! The guard flushes everything on every runtime, and keeps its timeout.

use std::error::Error as _;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use backends::{Collector, Postgres};
use fraiseql_stream::{Connection, JsonStream, RawJson, otlp};
use futures_util::StreamExt;
use opentelemetry_sdk::error::OTelSdkError;
use serde_json::{Value, json};

use crate::received::{Received, text};
use crate::scenario::{self, Outcome, Result, Scenario};
use crate::servers::{Database, SILENT, database, table};

const PROTOCOLS: [&str; 2] = ["http/protobuf", "grpc"];
const RUNTIMES: [&str; 2] = ["current_thread", "one_worker"];
/// The time in seconds that the guard may exceed its timeout by on a machine that is busy with other tests.
const GRACE: f64 = 0.7;

/// Streams and ends telemetry as given by the variables; reports the result and the time it took.
#[test]
#[ignore = "a scenario"]
fn an_ending() -> Result {
    scenario::run_scenario(async {
        let mut telemetry = otlp::init()?;
        if let Ok(seconds) = std::env::var("TIMEOUT") {
            telemetry = telemetry.with_timeout(Duration::from_secs_f64(seconds.parse()?));
        }
        let mut db = Connection::connect(&scenario::url()).await?;
        if std::env::var_os("IN_FLIGHT").is_some() {
            let mut silent = db.query::<RawJson>("silent").stream().await?;
            let waited = tokio::time::timeout(Duration::from_millis(100), silent.next()).await;
            assert!(waited.is_err());
            if std::env::var_os("WAITS").is_some() {
                scenario::announce("in flight");
                scenario::wait_for_resume();
            }
        } else {
            let orders = db.query::<RawJson>("orders").stream().await?;
            read(orders).await;
        }
        // From here on, only the guard is awaited.
        let begun = Instant::now();
        let error = if std::env::var_os("DROPPED").is_some() {
            drop(telemetry);
            None
        } else {
            telemetry.shutdown().await.err()
        };
        let took = begun.elapsed().as_secs_f64();
        let kind = error.as_ref().map(|error| format!("{:?}", error.kind()));
        let has_source = error.as_ref().map(|error| error.source().is_some());
        let cause = error.as_ref().and_then(otlp::ShutdownError::get_ref);
        let is_sdk_error = cause.is_some_and(<dyn std::error::Error + Send + Sync>::is::<OTelSdkError>);
        let error = error.map(|error| error.to_string());
        scenario::report(&json!({
            "error": error, "kind": kind, "has_source": has_source, "is_sdk_error": is_sdk_error, "took": took
        }));
        Ok(())
    })
}

async fn read<C: Unpin>(mut rows: JsonStream<RawJson, C>) {
    let mut read = 0;
    while rows.next().await.is_some() {
        read += 1;
    }
    assert_eq!(read, 1_000);
}

/// Shuts telemetry down while the runtime runs another task.
#[test]
#[ignore = "a scenario"]
fn a_busy_ending() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?.with_timeout(Duration::from_secs(2));
        let mut db = Connection::connect(&scenario::url()).await?;
        read(db.query("orders").stream().await?).await;
        let ticks = tokio::spawn(async {
            let mut ticks = 0_u64;
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                ticks += 1;
                scenario::announce(&format!("tick {ticks}"));
            }
        });
        let begun = Instant::now();
        let error = telemetry.shutdown().await.err().map(|error| error.to_string());
        ticks.abort();
        scenario::report(&json!({"error": error, "took": begun.elapsed().as_secs_f64()}));
        Ok(())
    })
}

fn tables() -> Database {
    database(&(table("orders", 1_000) + SILENT))
}

fn took(outcome: &Outcome) -> f64 {
    outcome.reported["took"].as_f64().expect("it was reported")
}

/// Asserts that all telemetry of one stream arrived.
fn assert_complete(received: &Received, case: &str) {
    let query = received.query("orders");
    assert!(!received.below(query, "poll_batch").is_empty(), "{case}");
    let rows = [("entity", "orders"), ("outcome", "yielded")];
    assert_eq!(received.value("fraiseql.stream.rows", &rows), 1_000.0, "{case}");
    let started = json!("stream started");
    assert!(received.logs.iter().any(|log| log.body == started), "{case}");
}

fn assert_flushed(ending: &[(&str, &str)]) {
    let database = tables();
    for protocol in PROTOCOLS {
        for runtime in RUNTIMES {
            let case = format!("{protocol} on {runtime}");
            let collector = Collector::start().expect("a collector");
            let mut scenario = Scenario::new("guard::an_ending", &database).to(&collector, protocol);
            for (variable, value) in ending {
                scenario = scenario.set(variable, value);
            }
            let outcome = scenario.on(runtime).run();
            assert_eq!((&outcome.reported["error"], outcome.stderr.as_str()), (&Value::Null, ""), "{case}");
            assert!(took(&outcome) < 2.0, "{case}: {} s", took(&outcome));
            assert_complete(&Received::by(&collector), &case);
        }
    }
}

#[test]
fn shutdown_flushes_everything_on_every_runtime_by_both_protocols() {
    assert_flushed(&[]);
}

#[test]
fn dropped_guard_flushes_everything() {
    assert_flushed(&[("DROPPED", "")]);
}

fn ends_in_flight(runtime: &str, ending: (&str, &str)) -> Received {
    let collector = Collector::start().expect("a collector");
    let scenario = Scenario::new("guard::an_ending", &tables()).to(&collector, PROTOCOLS[0]);
    let outcome = scenario.set("IN_FLIGHT", "").set(ending.0, ending.1).on(runtime).run();
    assert_eq!((&outcome.reported["error"], outcome.stderr.as_str()), (&Value::Null, ""));
    Received::by(&collector)
}

#[test]
fn stream_dropped_just_before_shutdown_is_counted_and_has_its_span() {
    for runtime in RUNTIMES {
        let received = ends_in_flight(runtime, ("TIMEOUT", "5"));
        let ended = [("entity", "silent"), ("outcome", "dropped")];
        assert_eq!(received.value("fraiseql.stream.ended", &ended), 1.0, "{runtime}");
        assert_eq!(text(received.query("silent"), "fraiseql.outcome"), "dropped", "{runtime}");
    }
}

/// Its span may be lost, since a drop cannot wait for the cancel.
#[test]
fn stream_dropped_just_before_the_guard_is_counted() {
    for runtime in RUNTIMES {
        let received = ends_in_flight(runtime, ("DROPPED", ""));
        let ended = [("entity", "silent"), ("outcome", "dropped")];
        assert_eq!(received.value("fraiseql.stream.ended", &ended), 1.0, "{runtime}");
        assert_eq!(received.value("fraiseql.stream.active", &ended[..1]), 0.0, "{runtime}");
    }
}

/// Returns an endpoint without a listener.
fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    format!("http://{address}")
}

fn ends_at(endpoint: &str, protocol: &str, ending: &[(&str, &str)]) -> Outcome {
    let mut scenario = Scenario::new("guard::an_ending", &tables());
    for (variable, value) in ending {
        scenario = scenario.set(variable, value);
    }
    scenario
        .set("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        .on("current_thread")
        .run()
}

/// Asserts that the error names the lost signals and the endpoint, and that exactly one line is logged.
fn assert_loss_is_reported(outcome: &Outcome, endpoint: &str, case: &str) {
    let error = outcome.reported["error"].as_str().unwrap_or_default();
    for part in ["traces", "metrics", "logs", endpoint] {
        assert!(error.contains(part), "{case}: {error}");
    }
    assert_eq!(outcome.warnings().len(), 1, "{case}: {}", outcome.stderr);
    assert!(outcome.stderr.contains("WARN") && outcome.stderr.contains(endpoint), "{}", outcome.stderr);
}

#[test]
fn shutdown_is_quick_if_the_collector_is_down() {
    for protocol in PROTOCOLS {
        let endpoint = closed_port();
        let outcome = ends_at(&endpoint, protocol, &[]);
        assert!(took(&outcome) < 3.0, "{protocol}: {} s", took(&outcome));
        assert_loss_is_reported(&outcome, &endpoint, protocol);
        assert_eq!(
            (&outcome.reported["kind"], &outcome.reported["is_sdk_error"]),
            (&json!("Export"), &json!(true))
        );
        let error = outcome.reported["error"].as_str().unwrap_or_default();
        assert!(error.contains("Connection refused") && !error.contains('\n'), "{protocol}: {error}");
        assert_eq!(outcome.reported["has_source"], json!(false), "the text includes the cause");
    }
}

/// Returns an endpoint where the kernel accepts connections and no one answers.
fn black_hole() -> (TcpListener, String) {
    let hole = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", hole.local_addr().expect("its address"));
    (hole, endpoint)
}

#[test]
fn shutdown_keeps_its_timeout_if_the_collector_is_a_black_hole() {
    let (_hole, endpoint) = black_hole();
    for (protocol, timeout) in [(PROTOCOLS[0], 1.0), (PROTOCOLS[1], 1.0), (PROTOCOLS[0], 5.0)] {
        let set = timeout.to_string();
        // The default is five seconds.
        let set = Some(("TIMEOUT", set.as_str())).filter(|_| timeout < 5.0);
        let outcome = ends_at(&endpoint, protocol, set.as_slice());
        assert!(took(&outcome) < timeout + GRACE, "{protocol}: {} s", took(&outcome));
        assert_loss_is_reported(&outcome, &endpoint, protocol);
        assert_eq!(outcome.reported["kind"], json!("Timeout"), "{protocol}: {}", outcome.reported["error"]);
    }
}

#[test]
fn dropped_guard_keeps_its_timeout_if_the_collector_is_a_black_hole() {
    let (_hole, endpoint) = black_hole();
    for protocol in PROTOCOLS {
        let outcome = ends_at(&endpoint, protocol, &[("DROPPED", ""), ("TIMEOUT", "1")]);
        assert!(took(&outcome) < 1.0 + GRACE, "{protocol}: {} s", took(&outcome));
        assert_eq!(outcome.warnings().len(), 1, "{protocol}: {}", outcome.stderr);
    }
}

/// The cancel of a stream that was just dropped gets no answer either.
#[test]
fn shutdown_keeps_its_timeout_if_postgres_hangs_as_well() {
    let (_hole, endpoint) = black_hole();
    let server = Postgres::start().unwrap();
    server.psql("postgres", SILENT).unwrap();
    let database = Database { name: "postgres".to_owned(), url: server.url() };
    let mut running = Scenario::new("guard::an_ending", &database)
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
        .set("TIMEOUT", "4")
        .set("IN_FLIGHT", "")
        .set("WAITS", "")
        .start();
    running.wait_for("in flight");
    signal(&server, "STOP");
    running.resume();
    let outcome = running.finish();
    signal(&server, "CONT");
    assert!(took(&outcome) < 4.0 + GRACE, "{} s", took(&outcome));
    assert_eq!(outcome.warnings().len(), 1, "{}", outcome.stderr);
}

fn signal(server: &Postgres, name: &str) {
    assert!(backends::send_signal(name, server.postmaster_pid()));
}

#[test]
fn shutdown_does_not_block_the_runtime() {
    let (_hole, endpoint) = black_hole();
    let scenario = Scenario::new("guard::a_busy_ending", &tables());
    let scenario = scenario.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).on("current_thread");
    let mut running = scenario.start();
    // At least 0.8 s of ticks.
    running.wait_for("tick 80");
    assert!(!running.finish().reported["error"].is_null());
}
