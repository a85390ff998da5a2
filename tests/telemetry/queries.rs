//! The span of a query: its attributes, its parent, and its end.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backends::{Collector, Log, Postgres, Span, send_signal};
use fraiseql_stream::{Connection, RawJson, Stats, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tracing::{Instrument, info_span};

use crate::received::{Received, integer, number, seconds, text};
use crate::scenario::{self, Result, Scenario, figures};
use crate::servers::{BROKEN, Database, SILENT, database, postgres, table};

/// The value of a parameter, which belongs to the service.
const VALUE: &str = "the value of a parameter";

/// Runs queries below a span of the caller; they end in every possible way.
#[test]
#[ignore = "a scenario"]
fn every_kind_of_query() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let report = queries().instrument(info_span!("request", target = "/orders")).await?;
        scenario::report(&report);
        Ok(telemetry.shutdown().await?)
    })
}

async fn queries() -> Result<Value> {
    let mut db = Connection::connect(&scenario::url()).await?;
    let orders = read(&mut db, "orders").await?;
    read(&mut db, "sales.orders").await?;
    let broken = read(&mut db, "broken").await?;
    let nowhere = db.query::<RawJson>("nowhere").stream().await.is_err();
    assert!(nowhere);

    let mut silent = db.query::<RawJson>("silent").stream().await?;
    let waited = tokio::time::timeout(Duration::from_millis(200), silent.next()).await;
    assert!(waited.is_err());
    let dropped = now();
    silent.close().await?;

    abandon(&mut db).await?;

    let socket = std::env::var("SOCKET")?;
    read(&mut Connection::connect(&socket).await?, "by_socket").await?;
    let mut db = Connection::builder(scenario::url()).query_text(true).connect().await?;
    read(&mut db, "with_text").await?;
    Ok(json!({"orders": figures(&orders), "broken": figures(&broken), "dropped": dropped}))
}

/// Drops a query that Postgres has not accepted yet, since the relation is locked.
async fn abandon(db: &mut Connection) -> Result {
    let mut other = Connection::connect(&scenario::url()).await?;
    let other = other.client().await?;
    other.batch_execute("BEGIN; LOCK TABLE locked").await?;
    let accepted = db.query::<RawJson>("locked").stream();
    assert!(tokio::time::timeout(Duration::from_millis(100), accepted).await.is_err());
    // Returns when the clean-up is done.
    db.client().await?;
    Ok(other.batch_execute("COMMIT").await?)
}

/// Reads all rows of an entity.
async fn read(db: &mut Connection, entity: &str) -> Result<Stats> {
    let query = db.query::<RawJson>(entity).where_sql("data->>'status' IS DISTINCT FROM $1", &[&VALUE]);
    let mut rows = query.stream().await?;
    while rows.next().await.is_some() {}
    Ok(rows.stats())
}

/// Returns the time in ns since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

struct Run {
    database: Database,
    reported: Value,
    received: Received,
}

/// Returns the outcome of the scenario, which runs once for all tests of this file.
fn run() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        let sales =
            "CREATE SCHEMA sales; CREATE VIEW sales.orders AS SELECT data FROM public.orders LIMIT 10;
            CREATE VIEW by_socket AS TABLE sales.orders; CREATE VIEW with_text AS TABLE sales.orders;";
        let tables = table("orders", 2_000) + &table("locked", 1);
        let database = database(&(tables + sales + BROKEN + SILENT));
        let collector = Collector::start().expect("a collector");
        let socket = format!(
            "host={} port={} user=postgres password={} dbname={}",
            postgres().socket_dir().display(),
            postgres().port(),
            postgres().password(),
            database.name,
        );
        let scenario = Scenario::new("queries::every_kind_of_query", &database).set("SOCKET", &socket);
        let outcome = scenario.to(&collector, "http/protobuf").run();
        assert_eq!(outcome.stderr, "");
        Run { database, reported: outcome.reported, received: Received::by(&collector) }
    })
}

fn query(entity: &str) -> &'static Span {
    run().received.query(entity)
}

/// Whether two times in ns are at most `milliseconds` apart.
fn near(one: u64, other: u64, milliseconds: u64) -> bool {
    one.abs_diff(other) <= milliseconds * 1_000_000
}

#[test]
fn query_is_one_client_span_with_the_attributes_of_the_conventions() {
    let span = query("orders");
    assert_eq!((span.name.as_str(), span.kind), ("SELECT orders", "client"));
    assert_eq!(span.scope, "fraiseql_stream");
    for (attribute, value) in [
        ("db.system.name", "postgresql"),
        ("db.collection.name", "orders"),
        ("db.operation.name", "SELECT"),
        ("db.query.summary", "SELECT orders"),
        ("server.address", "127.0.0.1"),
    ] {
        assert_eq!(text(span, attribute), value, "{attribute}");
    }
    // Opt-in in the conventions, and not recorded.
    assert!(!span.attributes.contains_key("db.response.returned_rows"));
    assert_eq!(integer(span, "server.port"), i64::from(postgres().port()));
}

#[test]
fn namespace_is_the_database_with_the_schema_if_that_is_known() {
    let database = &run().database.name;
    // Postgres reports the search path at connect time since version 18.
    let unqualified = match postgres().version() {
        18.. => format!("{database}|public"),
        _ => database.clone(),
    };
    assert_eq!(text(query("orders"), "db.namespace"), unqualified);
    assert_eq!(text(query("sales.orders"), "db.namespace"), format!("{database}|sales"));
}

#[test]
fn address_of_a_unix_socket_is_its_path() {
    let span = query("by_socket");
    let socket = postgres().socket_dir().join(format!(".s.PGSQL.{}", postgres().port()));
    assert_eq!(text(span, "server.address"), socket.display().to_string());
}

/// Reads from a server on the default port.
#[test]
#[ignore = "a scenario"]
fn by_the_default_port() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        db.client().await?.batch_execute(&table("orders", 10)).await?;
        read(&mut db, "orders").await?;
        Ok(telemetry.shutdown().await?)
    })
}

#[test]
fn default_port_is_not_recorded() {
    // By its socket only, since another server may use the TCP port.
    let server = Postgres::builder().set("port", "5432").set("listen_addresses", "").start().unwrap();
    let (host, password) = (server.socket_dir().display(), server.password());
    let url = format!("host={host} user=postgres password={password}");
    let database = Database { name: "postgres".to_owned(), url };
    let collector = Collector::start().unwrap();
    Scenario::new("queries::by_the_default_port", &database).to(&collector, "http/protobuf").run();
    let received = Received::by(&collector);
    assert!(!received.query("orders").attributes.contains_key("server.port"));
    let durations = received.metric("db.client.operation.duration");
    assert!(durations.points.iter().all(|point| !point.attributes.contains_key("server.port")));
}

#[test]
fn query_span_has_rows_bytes_verdict_and_shares() {
    let (span, reported) = (query("orders"), &run().reported["orders"]);
    assert_eq!(Some(integer(span, "fraiseql.rows")), reported["rows"].as_i64());
    assert_eq!(Some(integer(span, "fraiseql.bytes")), reported["bytes"].as_i64());
    assert_eq!(text(span, "fraiseql.verdict"), reported["verdict"]);
    assert_eq!(text(span, "fraiseql.outcome"), "complete");
    let shares = ["backlog", "source_wait", "scheduled", "overlap"];
    let sum: f64 = shares.map(|share| number(span, &format!("fraiseql.share.{share}"))).iter().sum();
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    let states = ["source_wait", "scheduled", "decode", "consumer", "paused"];
    let sum: f64 = states.map(|state| number(span, &format!("fraiseql.time.{state}"))).iter().sum();
    let elapsed = reported["elapsed"].as_f64().unwrap();
    assert!((sum - elapsed).abs() < 0.01 * elapsed, "{sum} of {elapsed}");
    // The span starts slightly before the clock of the stream.
    assert!((seconds(span) - elapsed).abs() < 0.005 + 0.01 * elapsed, "{} for {elapsed}", seconds(span));
}

#[test]
fn query_text_is_recorded_on_request_only_and_values_never() {
    let expected = "SELECT data FROM \"with_text\"\nWHERE (data->>'status' IS DISTINCT FROM $1\n)";
    assert_eq!(text(query("with_text"), "db.query.text"), expected);
    for span in &run().received.spans {
        let has_text = span.attributes.contains_key("db.query.text");
        assert_eq!(has_text, span.name == "SELECT with_text", "{}", span.name);
    }
    assert!(!run().received.text.contains(VALUE));
}

#[test]
fn queries_and_cancels_belong_to_the_trace_of_the_caller() {
    let received = &run().received;
    let request = received.spans.iter().find(|span| span.name == "request").expect("the caller's span");
    let queries = received.below(request, "SELECT orders").len();
    assert_eq!(queries, 1);
    assert!(received.spans.iter().all(|span| span.trace_id == request.trace_id));
    let all = received.spans.iter().filter(|span| span.name.starts_with("SELECT "));
    assert!(all.clone().all(|span| span.parent_span_id == request.span_id));
    assert_eq!(all.count(), 8);
}

#[test]
fn dropped_stream_ends_its_span_before_the_clean_up() {
    let (span, received) = (query("silent"), &run().received);
    let dropped = run().reported["dropped"].as_u64().unwrap();
    assert!(near(span.end_ns, dropped, 20), "{} ns late", span.end_ns.abs_diff(dropped));
    assert_eq!((text(span, "fraiseql.outcome"), span.status_code), ("dropped", "unset"));
    let is_cancel = |span: &&Span| span.name == "cancel" && near(span.start_ns, dropped, 50);
    let cancels: Vec<_> = received.spans.iter().filter(is_cancel).collect();
    assert_eq!(cancels.len(), 1);
    let cancel = cancels[0];
    assert_eq!((&cancel.trace_id, cancel.kind), (&span.trace_id, "client"));
    // The cancel is its child or its sibling.
    assert!([&span.span_id, &span.parent_span_id].contains(&&cancel.parent_span_id));
    assert!(cancel.start_ns + 1_000_000 >= span.end_ns && near(cancel.start_ns, span.end_ns, 50));
    assert_eq!(cancel.status_code, "unset");
    for attribute in ["db.system.name", "db.namespace", "server.address"] {
        assert_eq!(text(cancel, attribute), text(span, attribute), "{attribute}");
    }
    assert_eq!(integer(cancel, "server.port"), i64::from(postgres().port()));
}

#[test]
fn query_dropped_before_it_is_accepted_has_a_span() {
    let span = query("locked");
    assert_eq!((text(span, "fraiseql.outcome"), span.status_code), ("dropped", "unset"));
    assert!((0.1..0.2).contains(&seconds(span)), "{} s", seconds(span));
    let ended = [("entity", "_REFUSED"), ("outcome", "dropped")];
    assert_eq!(run().received.value("fraiseql.stream.ended", &ended), 1.0);
    let active = run().received.metric("fraiseql.stream.active");
    assert!(active.point(&[("entity", "locked")]).is_none());
}

#[test]
fn first_row_is_an_event() {
    for entity in ["orders", "broken"] {
        let span = query(entity);
        let names: Vec<_> = span.events.iter().map(|event| event.name.as_str()).collect();
        assert_eq!(names, ["fraiseql.first_row"], "{entity}");
        assert!((span.start_ns..=span.end_ns).contains(&span.events[0].time_ns));
    }
    assert!(query("silent").events.is_empty() && query("nowhere").events.is_empty());
}

/// Two entities that fail, their SQLSTATE, and the beginning of what is recorded.
const FAILURES: [(&str, &str, &str); 2] = [
    (
        "broken",
        "22012",
        "broken: data exception (its message may quote values, so it is not recorded) after 50 rows in ",
    ),
    ("nowhere", "42P01", "nowhere: relation \"nowhere\" does not exist; an entity is "),
];

#[test]
fn failed_query_has_status_error_and_its_cause_without_the_sqlstate() {
    for (entity, code, message) in FAILURES {
        let span = query(entity);
        assert_eq!(span.status_code, "error", "{entity}");
        assert!(span.status_message.starts_with(message), "{}", span.status_message);
        assert!(!span.status_message.contains(code), "{}", span.status_message);
        assert_eq!(text(span, "error.type"), code);
        assert_eq!(text(span, "db.response.status_code"), code);
        assert_eq!(text(span, "fraiseql.outcome"), "failed");
    }
    assert_eq!(integer(query("broken"), "fraiseql.rows"), 50);
}

#[test]
fn failed_stream_is_one_error_record_of_its_span() {
    let errors = run().received.logs.iter().filter(|log| log.severity == "ERROR");
    assert_eq!(errors.count(), FAILURES.len());
    for (entity, code, _) in FAILURES {
        let is_of = |log: &&Log| log.attributes.get("entity") == Some(&json!(entity));
        let log = run().received.logs.iter().filter(is_of).find(|log| log.severity == "ERROR");
        let (log, span) = (log.expect("a record"), query(entity));
        assert_eq!(log.event_name, "fraiseql.stream.failed");
        assert_eq!((&log.trace_id, &log.span_id), (&span.trace_id, &span.span_id));
        assert_eq!(log.attributes.get("error.type"), Some(&json!(code)));
        assert_eq!(log.body, json!(span.status_message));
    }
}

/// Uses a connection after it was lost.
#[test]
#[ignore = "a scenario"]
fn on_a_lost_connection() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        let killed = db.client().await?.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
        assert!(killed.is_err());
        while db.client().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let refused = db.query::<RawJson>("orders").stream();
        let refused = refused.instrument(info_span!("request")).await;
        assert!(refused.is_err());
        Ok(telemetry.shutdown().await?)
    })
}

#[test]
fn stream_that_is_refused_before_its_span_is_one_error_record_of_the_caller() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("queries::on_a_lost_connection", &database(""));
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!((outcome.stderr.as_str(), outcome.failures.len()), ("", 1));
    let received = Received::by(&collector);
    let [log] = &received.logs[..] else { panic!("{:#?}", received.logs) };
    let request = received.spans.iter().find(|span| span.name == "request").expect("the caller's span");
    assert_eq!((&log.trace_id, log.severity.as_str()), (&request.trace_id, "ERROR"));
    assert_eq!(log.event_name, "fraiseql.stream.failed");
    assert_eq!(log.body, json!("orders: the connection is closed; connect again"));
    assert_eq!(log.attributes.get("error.type"), Some(&json!("disconnected")));
}

/// Drops a stream whose backend does not answer.
#[test]
#[ignore = "a scenario"]
fn cancelled_in_vain() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        let pid: i32 = db.client().await?.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
        let silent = db.query::<RawJson>("silent").stream().await?;
        assert!(send_signal("STOP", pid));
        drop(silent);
        // Returns when the connection was given up.
        let given_up = db.client().await.is_err();
        assert!(send_signal("CONT", pid) && given_up);
        Ok(telemetry.shutdown().await?)
    })
}

#[test]
fn cancel_that_fails_has_an_error_and_is_logged_within_its_span() {
    let collector = Collector::start().unwrap();
    let scenario = Scenario::new("queries::cancelled_in_vain", &database(SILENT));
    let outcome = scenario.to(&collector, "http/protobuf").run();
    assert_eq!(outcome.warnings().len(), 1, "{}", outcome.stderr);
    let received = Received::by(&collector);
    let [cancel] = received.below(received.query("silent"), "cancel")[..] else {
        panic!("{:#?}", received.spans)
    };
    assert_eq!((cancel.status_code, text(cancel, "error.type")), ("error", "timeout"));
    assert_eq!(cancel.status_message, "it did not end within 5 s");
    let log = received.logs.iter().find(|log| log.severity == "WARN").expect("a record");
    assert_eq!((&log.trace_id, &log.span_id), (&cancel.trace_id, &cancel.span_id));
    assert_eq!(log.event_name, "fraiseql.cancel.failed");
}

#[test]
fn complete_query_leaves_its_status_unset() {
    for entity in ["orders", "sales.orders", "by_socket", "with_text"] {
        let span = query(entity);
        assert_eq!((span.status_code, span.status_message.as_str()), ("unset", ""));
        assert!(!span.attributes.contains_key("error.type"));
    }
}

#[test]
fn scope_of_a_span_is_its_emitter_and_no_attribute_is_empty() {
    for span in &run().received.spans {
        let emitter = if span.name == "request" { module_path!() } else { "fraiseql_stream" };
        assert_eq!(span.scope, emitter, "{}", span.name);
        // The layer passes the target to the tracer in an attribute of this name.
        assert_eq!(span.attributes.get("target"), Some(&json!("/orders")).filter(|_| span.name == "request"));
        for (name, value) in &span.attributes {
            assert!(*value != json!("") && !value.is_null(), "{name} of {}", span.name);
        }
    }
}
