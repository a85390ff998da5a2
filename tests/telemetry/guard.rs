//! The guard: it flushes everything on every runtime, and never takes longer than it may.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use backends::{Collector, Postgres};
use fraiseql_stream::{Connection, JsonStream, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::received::{Received, text};
use crate::scenario::{self, Outcome, Result, Scenario};
use crate::servers::{Database, SILENT, database, table};

const PROTOCOLS: [&str; 2] = ["http/protobuf", "grpc"];
const RUNTIMES: [&str; 2] = ["current_thread", "one_worker"];
/// What the guard may take beside its timeout, in seconds, on a machine that is busy with other tests.
const GRACE: f64 = 0.7;

/// Streams and ends telemetry as the variables say; tells how that went.
#[test]
#[ignore = "a scenario"]
fn an_ending() -> Result {
    scenario::play(async {
        let mut telemetry = otlp::init()?;
        if let Ok(seconds) = std::env::var("TIMEOUT") {
            telemetry = telemetry.with_timeout(Duration::from_secs_f64(seconds.parse()?));
        }
        let mut db = Connection::connect(&scenario::url()).await?;
        if std::env::var_os("IN_FLIGHT").is_some() {
            let mut silent = db.query::<RawJson>("silent").stream().await?;
            let waited = tokio::time::timeout(Duration::from_millis(100), silent.next()).await;
            assert!(waited.is_err());
            if std::env::var_os("LISTENS").is_some() {
                scenario::say("in flight");
                scenario::listen();
            }
        } else {
            let orders = db.query::<RawJson>("orders").stream().await?;
            read(orders).await;
        }
        // From here on nothing is awaited but the guard.
        let begun = Instant::now();
        let error = if std::env::var_os("DROPPED").is_some() {
            drop(telemetry);
            None
        } else {
            telemetry.shutdown().await.err().map(|error| error.to_string())
        };
        scenario::tell(&json!({"error": error, "took": begun.elapsed().as_secs_f64()}));
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

/// Shuts telemetry down while the runtime has other work.
#[test]
#[ignore = "a scenario"]
fn a_busy_ending() -> Result {
    scenario::play(async {
        let telemetry = otlp::init()?.with_timeout(Duration::from_secs(2));
        let mut db = Connection::connect(&scenario::url()).await?;
        read(db.query("orders").stream().await?).await;
        let ticks = tokio::spawn(async {
            let mut ticks = 0_u64;
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                ticks += 1;
                scenario::say(&format!("tick {ticks}"));
            }
        });
        let begun = Instant::now();
        let error = telemetry.shutdown().await.err().map(|error| error.to_string());
        ticks.abort();
        scenario::tell(&json!({"error": error, "took": begun.elapsed().as_secs_f64()}));
        Ok(())
    })
}

fn tables() -> Database {
    database(&(table("orders", 1_000) + SILENT))
}

fn took(outcome: &Outcome) -> f64 {
    outcome.told["took"].as_f64().expect("it was told")
}

/// All that one stream leaves behind is there.
fn is_whole(received: &Received, case: &str) {
    let query = received.query("orders");
    assert!(!received.below(query, "poll_batch").is_empty(), "{case}");
    let rows = [("entity", "orders"), ("outcome", "yielded")];
    assert_eq!(received.value("fraiseql.stream.rows", &rows), 1_000.0, "{case}");
    let started = json!("stream started");
    assert!(received.logs.iter().any(|log| log.body == started), "{case}");
}

fn flushes(ending: &[(&str, &str)]) {
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
            assert_eq!((&outcome.told["error"], outcome.stderr.as_str()), (&Value::Null, ""), "{case}");
            assert!(took(&outcome) < 2.0, "{case}: {} s", took(&outcome));
            is_whole(&Received::by(&collector), &case);
        }
    }
}

#[test]
fn shutdown_flushes_everything_on_every_runtime_by_both_protocols() {
    flushes(&[]);
}

#[test]
fn dropping_the_guard_flushes_everything_as_well() {
    flushes(&[("DROPPED", "")]);
}

fn ends_in_flight(runtime: &str, ending: (&str, &str)) -> Received {
    let collector = Collector::start().expect("a collector");
    let scenario = Scenario::new("guard::an_ending", &tables()).to(&collector, PROTOCOLS[0]);
    let outcome = scenario.set("IN_FLIGHT", "").set(ending.0, ending.1).on(runtime).run();
    assert_eq!((&outcome.told["error"], outcome.stderr.as_str()), (&Value::Null, ""));
    Received::by(&collector)
}

#[test]
fn a_stream_that_is_dropped_just_before_shutdown_is_not_forgotten() {
    for runtime in RUNTIMES {
        let received = ends_in_flight(runtime, ("TIMEOUT", "5"));
        let ended = [("entity", "silent"), ("outcome", "dropped")];
        assert_eq!(received.value("fraiseql.stream.ended", &ended), 1.0, "{runtime}");
        assert_eq!(text(received.query("silent"), "fraiseql.outcome"), "dropped", "{runtime}");
    }
}

/// Its span may be lost: a drop cannot wait for the cancel.
#[test]
fn a_stream_that_is_dropped_just_before_the_guard_is_counted() {
    for runtime in RUNTIMES {
        let received = ends_in_flight(runtime, ("DROPPED", ""));
        let ended = [("entity", "silent"), ("outcome", "dropped")];
        assert_eq!(received.value("fraiseql.stream.ended", &ended), 1.0, "{runtime}");
        assert_eq!(received.value("fraiseql.stream.active", &ended[..1]), 0.0, "{runtime}");
    }
}

/// An endpoint where nobody listens.
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

/// The error names what was lost and where to, and the log has exactly one line on it.
fn tells_what_was_lost(outcome: &Outcome, endpoint: &str, case: &str) {
    let error = outcome.told["error"].as_str().unwrap_or_default();
    for part in ["traces", "metrics", "logs", endpoint] {
        assert!(error.contains(part), "{case}: {error}");
    }
    assert_eq!(outcome.warnings().len(), 1, "{case}: {}", outcome.stderr);
    assert!(outcome.stderr.contains("WARN") && outcome.stderr.contains(endpoint), "{}", outcome.stderr);
}

#[test]
fn shutdown_is_quick_when_the_collector_is_down() {
    for protocol in PROTOCOLS {
        let endpoint = closed_port();
        let outcome = ends_at(&endpoint, protocol, &[]);
        assert!(took(&outcome) < 3.0, "{protocol}: {} s", took(&outcome));
        tells_what_was_lost(&outcome, &endpoint, protocol);
    }
}

/// A place where connections are accepted, by the kernel, and never answered.
fn black_hole() -> (TcpListener, String) {
    let hole = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", hole.local_addr().expect("its address"));
    (hole, endpoint)
}

#[test]
fn shutdown_keeps_its_timeout_when_the_collector_is_a_black_hole() {
    let (_hole, endpoint) = black_hole();
    for (protocol, timeout) in [(PROTOCOLS[0], 1.0), (PROTOCOLS[1], 1.0), (PROTOCOLS[0], 5.0)] {
        let set = timeout.to_string();
        // Five seconds are the default.
        let set = Some(("TIMEOUT", set.as_str())).filter(|_| timeout < 5.0);
        let outcome = ends_at(&endpoint, protocol, set.as_slice());
        assert!(took(&outcome) < timeout + GRACE, "{protocol}: {} s", took(&outcome));
        tells_what_was_lost(&outcome, &endpoint, protocol);
    }
}

#[test]
fn a_dropped_guard_keeps_its_timeout_when_the_collector_is_a_black_hole() {
    let (_hole, endpoint) = black_hole();
    for protocol in PROTOCOLS {
        let outcome = ends_at(&endpoint, protocol, &[("DROPPED", ""), ("TIMEOUT", "1")]);
        assert!(took(&outcome) < 1.0 + GRACE, "{protocol}: {} s", took(&outcome));
        assert_eq!(outcome.warnings().len(), 1, "{protocol}: {}", outcome.stderr);
    }
}

/// Then even the cancel of a stream that was just dropped gets no answer.
#[test]
fn shutdown_keeps_its_timeout_when_postgres_hangs_as_well() {
    let (_hole, endpoint) = black_hole();
    let server = Postgres::start().unwrap();
    server.psql("postgres", SILENT).unwrap();
    let database = Database { name: "postgres".to_owned(), url: server.url() };
    let mut running = Scenario::new("guard::an_ending", &database)
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
        .set("TIMEOUT", "4")
        .set("IN_FLIGHT", "")
        .set("LISTENS", "")
        .start();
    running.wait_for("in flight");
    signal(&server, "STOP");
    running.go_on();
    let outcome = running.finish();
    signal(&server, "CONT");
    assert!(took(&outcome) < 4.0 + GRACE, "{} s", took(&outcome));
    assert_eq!(outcome.warnings().len(), 1, "{}", outcome.stderr);
}

fn signal(server: &Postgres, name: &str) {
    assert!(backends::send_signal(name, server.postmaster_pid()));
}

#[test]
fn shutdown_leaves_the_runtime_to_other_tasks() {
    let (_hole, endpoint) = black_hole();
    let scenario = Scenario::new("guard::a_busy_ending", &tables());
    let scenario = scenario.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).on("current_thread");
    let mut running = scenario.start();
    // A second of them at least.
    running.wait_for("tick 80");
    assert!(!running.finish().told["error"].is_null());
}
