//! No secret is in anything reported.

use backends::Collector;
use fraiseql_stream::{Connection, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::received::{Received, prometheus_lines};
use crate::scenario::{self, Outcome, Result, Scenario};
use crate::servers::{BROKEN, Database, SILENT, database, postgres, table};

const WRONG: &str = "wr0ng-secret";
const TOKEN: &str = "t0ken-secret";

/// Connects with a wrong password and the right one, and reports all text available in both cases.
#[test]
#[ignore = "a scenario"]
fn all_available_text() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut texts = Vec::new();
        let wrong = Connection::connect(&std::env::var("WRONG_URL")?).await;
        let error = wrong.err().ok_or("the wrong password was accepted")?;
        tracing::warn!("{error} {error:?}");
        texts.push(format!("{error} {error:?}"));

        let builder = Connection::builder(scenario::url()).query_text(true);
        texts.push(format!("{builder:?}"));
        let mut db = builder.connect().await?;
        texts.push(format!("{db:?}"));
        for entity in ["orders", "broken", "nowhere", "silent"] {
            let query = db.query::<RawJson>(entity);
            texts.push(format!("{query:?}"));
            let mut rows = match query.stream().await {
                Ok(rows) => rows,
                Err(error) => {
                    texts.push(format!("{error} {error:?}"));
                    continue;
                }
            };
            texts.push(format!("{rows:?} {:?}", rows.observer()));
            let wait = std::time::Duration::from_millis(200);
            while let Ok(Some(row)) = tokio::time::timeout(wait, rows.next()).await {
                texts.extend(row.err().map(|error| format!("{error} {error:?}")));
            }
            rows.close().await?;
        }
        let shutdown = telemetry.shutdown().await.err().map(|error| format!("{error} {error:?}"));
        texts.extend(shutdown);
        scenario::report(&json!(texts));
        Ok(())
    })
}

fn run(endpoint: &str, protocol: &str) -> Outcome {
    let Database { name, url } = database(&(table("orders", 500) + BROKEN + SILENT));
    let wrong = url.replace(postgres().password(), WRONG);
    let database = Database { name, url };
    Scenario::new("secrets::all_available_text", &database)
        .set("WRONG_URL", &wrong)
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        .set("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        .set("OTEL_EXPORTER_OTLP_HEADERS", &format!("authorization=Bearer%20{TOKEN}"))
        .run()
}

fn assert_no_secret(what: &str, text: &str) {
    for secret in [postgres().password(), WRONG, TOKEN] {
        let at = text.find(secret);
        let around = at.map(|at| text[at.saturating_sub(100)..at].to_owned());
        assert_eq!(around, None, "{what}");
    }
}

#[test]
fn no_password_is_in_telemetry_output_or_errors() {
    let collector = Collector::start().unwrap();
    let outcome = run(&collector.http_endpoint(), "http/protobuf");
    assert_no_secret("Prometheus", &prometheus_lines(&collector, "").join("\n"));
    let received = Received::by(&collector);
    assert_eq!(received.queries("orders").len() + received.queries("broken").len(), 2);
    // This includes attributes and resources.
    assert_no_secret("spans, metrics and logs", &received.text);
    assert!(received.text.contains("password authentication failed"));
    assert_no_secret("standard output", &outcome.stdout);
    assert_no_secret("standard error", &outcome.stderr);
    assert_eq!(outcome.failures.len(), 2, "{:#?}", outcome.failures);
    assert_no_secret("failures", &outcome.failures.concat());
    assert_eq!(outcome.reported.as_array().map(Vec::len), Some(12), "{:#}", outcome.reported);
    assert_no_secret("errors and debug output", &outcome.reported.to_string());
}

#[test]
fn no_secret_of_the_endpoint_is_in_a_warning() {
    for (protocol, endpoint) in [
        ("http/protobuf", format!("http://user:{TOKEN}@127.0.0.1:9")),
        ("grpc", format!("http://user:{TOKEN}@127.0.0.1:9")),
        ("http/protobuf", format!("127.0.0.1:9/{TOKEN}")),
    ] {
        let outcome = run(&endpoint, protocol);
        let about = |line: &&str| !line.contains("password authentication");
        let warnings = outcome.warnings().into_iter().filter(about).count();
        assert!((1..=2).contains(&warnings), "{}", outcome.stderr);
        assert_no_secret(protocol, &outcome.stderr);
        assert_no_secret(protocol, &outcome.reported.to_string());
        assert!(outcome.reported.as_array().is_some_and(|texts| texts.last().is_some_and(Value::is_string)));
    }
}
