//! The span of a query: what it says, where it hangs, and when it ends.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backends::{Collector, Postgres, Span};
use fraiseql_stream::{Connection, RawJson, Stats, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tracing::{Instrument, info_span};

use crate::received::{Received, integer, number, seconds, text};
use crate::scenario::{self, Result, Scenario, figures};
use crate::servers::{BROKEN, Database, SILENT, database, postgres, table};

/// The value of a parameter, which is the service's data.
const VALUE: &str = "the value of a parameter";

/// Queries below a span of the caller's, which end in every way there is.
#[test]
#[ignore = "a scenario"]
fn every_kind_of_query() -> Result {
    scenario::play(async {
        let telemetry = otlp::init()?;
        let told = queries().instrument(info_span!("request")).await?;
        scenario::tell(&told);
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
    let mut db = Connection::builder(&scenario::url()).query_text(true).connect().await?;
    read(&mut db, "told").await?;
    Ok(json!({"orders": figures(&orders), "broken": figures(&broken), "dropped": dropped}))
}

/// Gives up a query that Postgres has not even accepted yet: the relation is locked.
async fn abandon(db: &mut Connection) -> Result {
    let mut other = Connection::connect(&scenario::url()).await?;
    let other = other.client().await?;
    other.batch_execute("BEGIN; LOCK TABLE locked").await?;
    let accepted = db.query::<RawJson>("locked").stream();
    assert!(tokio::time::timeout(Duration::from_millis(100), accepted).await.is_err());
    // Returns when the clean-up is through.
    db.client().await?;
    Ok(other.batch_execute("COMMIT").await?)
}

/// Reads all that an entity has.
async fn read(db: &mut Connection, entity: &str) -> Result<Stats> {
    let query = db.query::<RawJson>(entity).where_sql("data->>'status' IS DISTINCT FROM $1", &[&VALUE]);
    let mut rows = query.stream().await?;
    while rows.next().await.is_some() {}
    Ok(rows.stats())
}

/// In ns since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

struct Run {
    database: Database,
    told: Value,
    received: Received,
}

/// The scenario, run once for all tests of this file.
fn run() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        let sales =
            "CREATE SCHEMA sales; CREATE VIEW sales.orders AS SELECT data FROM public.orders LIMIT 10;
            CREATE VIEW by_socket AS TABLE sales.orders; CREATE VIEW told AS TABLE sales.orders;";
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
        Run { database, told: outcome.told, received: Received::by(&collector) }
    })
}

fn query(entity: &str) -> &'static Span {
    run().received.query(entity)
}

/// Whether two moments, in ns, are at most so many milliseconds apart.
fn near(one: u64, other: u64, milliseconds: u64) -> bool {
    one.abs_diff(other) <= milliseconds * 1_000_000
}

#[test]
fn a_query_is_one_client_span_in_the_words_of_the_conventions() {
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
    assert_eq!(integer(span, "server.port"), i64::from(postgres().port()));
}

#[test]
fn the_namespace_is_the_database_with_its_schema_where_that_is_known() {
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
fn a_unix_socket_is_named_by_its_path() {
    let span = query("by_socket");
    let socket = postgres().socket_dir().join(format!(".s.PGSQL.{}", postgres().port()));
    assert_eq!(text(span, "server.address"), socket.display().to_string());
}

/// Reads from a server whose port is the usual one.
#[test]
#[ignore = "a scenario"]
fn by_the_default_port() -> Result {
    scenario::play(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        db.client().await?.batch_execute(&table("orders", 10)).await?;
        read(&mut db, "orders").await?;
        Ok(telemetry.shutdown().await?)
    })
}

#[test]
fn the_default_port_is_not_told() {
    // By its socket alone: the port may be another server's.
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
fn a_query_tells_rows_bytes_verdict_and_shares() {
    let (span, told) = (query("orders"), &run().told["orders"]);
    assert_eq!(Some(integer(span, "fraiseql.rows")), told["rows"].as_i64());
    assert_eq!(Some(integer(span, "fraiseql.bytes")), told["bytes"].as_i64());
    assert_eq!(text(span, "fraiseql.verdict"), told["verdict"]);
    assert_eq!(text(span, "fraiseql.outcome"), "complete");
    let shares = ["backlog", "source_wait", "scheduled", "overlap"];
    let sum: f64 = shares.map(|share| number(span, &format!("fraiseql.share.{share}"))).iter().sum();
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    let states = ["source_wait", "scheduled", "decode", "consumer", "paused"];
    let sum: f64 = states.map(|state| number(span, &format!("fraiseql.time.{state}"))).iter().sum();
    let elapsed = told["elapsed"].as_f64().unwrap();
    assert!((sum - elapsed).abs() < 0.01 * elapsed, "{sum} of {elapsed}");
    // The span begins a little before the stream and its clock.
    assert!((seconds(span) - elapsed).abs() < 0.005 + 0.01 * elapsed, "{} for {elapsed}", seconds(span));
}

#[test]
fn the_number_of_returned_rows_is_an_integer() {
    assert_eq!(integer(query("orders"), "db.response.returned_rows"), 2_000);
}

#[test]
fn the_text_of_a_query_is_told_on_request_only_and_values_never() {
    let expected = "SELECT data FROM \"told\"\nWHERE (data->>'status' IS DISTINCT FROM $1\n)";
    assert_eq!(text(query("told"), "db.query.text"), expected);
    for span in &run().received.spans {
        let has_text = span.attributes.contains_key("db.query.text");
        assert_eq!(has_text, span.name == "SELECT told", "{}", span.name);
    }
    assert!(!run().received.words.contains(VALUE));
}

#[test]
fn queries_and_cancels_belong_to_the_callers_trace() {
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
fn a_dropped_stream_ends_its_span_before_the_clean_up() {
    let (span, received) = (query("silent"), &run().received);
    let dropped = run().told["dropped"].as_u64().unwrap();
    assert!(near(span.end_ns, dropped, 20), "{} ns late", span.end_ns.abs_diff(dropped));
    assert_eq!((text(span, "fraiseql.outcome"), span.status_code), ("dropped", "unset"));
    let is_cancel = |span: &&Span| span.name == "cancel" && near(span.start_ns, dropped, 50);
    let cancels: Vec<_> = received.spans.iter().filter(is_cancel).collect();
    assert_eq!(cancels.len(), 1);
    let cancel = cancels[0];
    assert_eq!((&cancel.trace_id, cancel.kind), (&span.trace_id, "client"));
    // Its child, or its sibling.
    assert!([&span.span_id, &span.parent_span_id].contains(&&cancel.parent_span_id));
    assert!(cancel.start_ns + 1_000_000 >= span.end_ns && near(cancel.start_ns, span.end_ns, 50));
    assert_eq!((text(cancel, "server.address"), cancel.status_code), ("127.0.0.1", "unset"));
}

#[test]
fn a_query_that_is_given_up_before_it_is_accepted_has_its_span() {
    let span = query("locked");
    assert_eq!((text(span, "fraiseql.outcome"), span.status_code), ("dropped", "unset"));
    assert!((0.1..0.2).contains(&seconds(span)), "{} s", seconds(span));
    let ended = [("entity", "_REFUSED"), ("outcome", "dropped")];
    assert_eq!(run().received.value("fraiseql.stream.ended", &ended), 1.0);
    let active = run().received.metric("fraiseql.stream.active");
    assert!(active.point(&[("entity", "locked")]).is_none());
}

#[test]
fn the_first_row_is_an_event() {
    for entity in ["orders", "broken"] {
        let span = query(entity);
        let names: Vec<_> = span.events.iter().map(|event| event.name.as_str()).collect();
        assert_eq!(names, ["first row"], "{entity}");
        assert!((span.start_ns..=span.end_ns).contains(&span.events[0].time_ns));
    }
    assert!(query("silent").events.is_empty() && query("nowhere").events.is_empty());
}

// Words of the server that may quote a value stay out: those of class 22 do.
#[test]
fn a_failed_query_says_why() {
    for (entity, code, message) in
        [("broken", "22012", "22012 after 50 rows in "), ("nowhere", "42P01", "does not exist")]
    {
        let span = query(entity);
        assert_eq!(span.status_code, "error", "{entity}");
        assert!(span.status_message.contains(message), "{}", span.status_message);
        assert_eq!(text(span, "error.type"), code);
        assert_eq!(text(span, "db.response.status_code"), code);
        assert_eq!(text(span, "fraiseql.outcome"), "failed");
    }
    assert_eq!(integer(query("broken"), "fraiseql.rows"), 50);
}

#[test]
fn a_query_that_went_well_leaves_its_status_unset() {
    for entity in ["orders", "sales.orders", "by_socket", "told"] {
        let span = query(entity);
        assert_eq!((span.status_code, span.status_message.as_str()), ("unset", ""));
        assert!(!span.attributes.contains_key("error.type"));
    }
}

#[test]
fn spans_carry_the_scope_and_no_empty_attribute() {
    for span in &run().received.spans {
        assert_eq!(span.scope, "fraiseql_stream");
        for (name, value) in &span.attributes {
            assert!(*value != json!("") && !value.is_null(), "{name} of {}", span.name);
        }
    }
}
