//! Spans of poll batches: long spans mean that Postgres is slow, gaps between them that the consumer is.

use std::task::Poll;
use std::time::Duration;

use backends::{Collector, Span};
use fraiseql_stream::{Connection, PollSpans, RawJson, otlp};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::received::{Received, integer, number, seconds};
use crate::scenario::{self, Result, Scenario, figures};
use crate::servers::{Database, database, slow_view, table};

/// The time that a slow consumer needs for a chunk.
const SLEEP: Duration = Duration::from_millis(50);

/// Reads `rows` chunk by chunk.
#[test]
#[ignore = "a scenario"]
fn by_the_chunk() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let spans = match std::env::var("SPANS").as_deref() {
            Ok("every") => PollSpans::Every,
            Ok("off") => PollSpans::Off,
            _ => PollSpans::default(),
        };
        let is_slow = std::env::var_os("SLOW_CONSUMER").is_some();
        let mut db = Connection::builder(scenario::url()).poll_spans(spans).connect().await?;
        let mut query = db.query::<RawJson>("rows");
        if let Ok(chunk) = std::env::var("CHUNK") {
            query = query.chunk_size(chunk.parse()?);
        }
        let mut rows = query.stream().await?;
        let mut batches = 0;
        while rows.next_chunk().await?.is_some() {
            batches += 1;
            if is_slow {
                tokio::time::sleep(SLEEP).await;
            }
        }
        let mut report = figures(&rows.stats());
        report["batches"] = json!(batches);
        scenario::report(&report);
        Ok(telemetry.shutdown().await?)
    })
}

/// Polls for rows now and then instead of waiting for them, as a loop with other work does.
#[test]
#[ignore = "a scenario"]
fn by_looking() -> Result {
    scenario::run_scenario(async {
        let telemetry = otlp::init()?;
        let mut db = Connection::connect(&scenario::url()).await?;
        let mut rows = db.query::<RawJson>("rows").stream().await?;
        loop {
            // Takes what is ready, then does other work.
            while let Poll::Ready(Some(_)) = rows.next_ready() {}
            tokio::time::sleep(SLEEP).await;
            if rows.next().await.is_none() {
                break;
            }
        }
        Ok(telemetry.shutdown().await?)
    })
}

struct Batches {
    reported: Value,
    query: Span,
    /// The spans of its poll batches, in the order of their start.
    spans: Vec<Span>,
}

impl Batches {
    fn sum(&self, attribute: &str) -> i64 {
        self.spans.iter().map(|span| integer(span, attribute)).sum()
    }

    /// Returns the time covered by the spans, in seconds.
    fn covered(&self) -> f64 {
        self.spans.iter().map(seconds).sum()
    }

    fn longest(&self) -> f64 {
        self.spans.iter().map(seconds).fold(0.0, f64::max)
    }

    /// Returns the times between the spans, in seconds.
    fn gaps(&self) -> Vec<f64> {
        let gap = |pair: &[Span]| pair[1].start_ns.saturating_sub(pair[0].end_ns);
        self.spans.windows(2).map(|pair| Duration::from_nanos(gap(pair)).as_secs_f64()).collect()
    }
}

fn play(scenario: &str, database: &Database, set: &[(&str, &str)]) -> Batches {
    let collector = Collector::start().expect("a collector");
    let mut scenario = Scenario::new(scenario, database).to(&collector, "http/protobuf");
    for (variable, value) in set {
        scenario = scenario.set(variable, value);
    }
    let outcome = scenario.run();
    assert_eq!(outcome.stderr, "");
    let received = Received::by(&collector);
    let query = received.query("rows").clone();
    let spans = received.below(&query, "poll_batch").into_iter().cloned().collect();
    Batches { reported: outcome.reported, query, spans }
}

fn read(database: &Database, set: &[(&str, &str)]) -> Batches {
    play("batches::by_the_chunk", database, set)
}

#[test]
fn half_a_million_rows_stay_within_the_budget_with_complete_sums() {
    let batches = read(&database(&table("rows", 500_000)), &[]);
    // Far below the 2,048 spans that the queue holds.
    assert!(batches.spans.len() < 400, "{} spans", batches.spans.len());
    assert!(batches.spans.len() >= 64, "{} spans", batches.spans.len());
    assert_eq!(batches.sum("fraiseql.rows"), 500_000);
    assert_eq!(Some(batches.sum("fraiseql.bytes")), batches.reported["bytes"].as_i64());
    assert_eq!(Some(batches.sum("fraiseql.batches")), batches.reported["batches"].as_i64());
    let trace = &batches.query.trace_id;
    assert!(batches.spans.iter().all(|span| span.trace_id == *trace && span.kind == "internal"));
}

#[test]
fn every_poll_batch_has_a_span_on_request() {
    let batches = read(&database(&table("rows", 20_000)), &[("SPANS", "every"), ("CHUNK", "64")]);
    let taken: Vec<_> = batches.spans.iter().filter(|span| integer(span, "fraiseql.batches") > 0).collect();
    assert!(taken.iter().all(|span| integer(span, "fraiseql.batches") == 1));
    assert_eq!(Some(taken.len() as u64), batches.reported["batches"].as_u64());
    // The last poll finds the end of the stream.
    assert!(batches.spans.len() <= taken.len() + 1);
    assert_eq!(batches.sum("fraiseql.rows"), 20_000);
    for span in taken {
        let [rows, before, after] =
            ["fraiseql.rows", "fraiseql.occupancy.before", "fraiseql.occupancy.after"]
                .map(|name| integer(span, name));
        // A poll that had to wait found the channel empty.
        assert!(before == 0 || before - rows == after, "{before} - {rows}, {after}");
        assert!((1..=64).contains(&rows) && (0..=256).contains(&before) && (0..256).contains(&after));
    }
    let decoding: f64 = batches.spans.iter().map(|span| number(span, "fraiseql.time.decode")).sum();
    let reported = batches.reported["time"]["decode"].as_f64().unwrap();
    assert!((decoding - reported).abs() < 1e-6 + reported * 0.01, "{decoding} of {reported}");
}

#[test]
fn query_span_remains_if_poll_batches_have_none() {
    let batches = read(&database(&table("rows", 2_000)), &[("SPANS", "off")]);
    assert!(batches.spans.is_empty());
    assert_eq!(integer(&batches.query, "fraiseql.rows"), 2_000);
}

#[test]
fn slow_consumer_shows_in_the_gaps_between_spans() {
    let batches = read(&database(&table("rows", 1_280)), &[("SLOW_CONSUMER", ""), ("CHUNK", "64")]);
    assert_eq!(batches.sum("fraiseql.rows"), 1_280);
    let whole = seconds(&batches.query);
    let gaps = batches.gaps();
    let (between, covered) = (gaps.iter().sum::<f64>(), batches.covered());
    assert!(gaps.len() >= 19, "{} spans for 20 chunks", batches.spans.len());
    assert!(between > 0.85 * whole, "gaps of {between} s in {whole} s: {gaps:?}");
    assert!(covered < 0.15 * whole, "spans of {covered} s in {whole} s");
    assert!(batches.longest() < SLEEP.as_secs_f64(), "a span of {} s", batches.longest());
}

#[test]
fn slow_source_shows_in_long_spans() {
    let batches = read(&database(&slow_view("rows", 20, 0.05)), &[]);
    assert_eq!(batches.sum("fraiseql.rows"), 20);
    let whole = seconds(&batches.query);
    let (between, covered) = (batches.gaps().iter().sum::<f64>(), batches.covered());
    assert!(batches.spans.len() >= 15, "{} spans for 20 rows", batches.spans.len());
    assert!(covered > 0.85 * whole, "spans of {covered} s in {whole} s");
    assert!(between < 0.1 * whole, "gaps of {between} s in {whole} s");
    let waited: f64 = batches.spans.iter().map(|span| number(span, "fraiseql.time.wait")).sum();
    assert!(waited > 0.85 * whole, "waits of {waited} s in {whole} s");
}

/// Each row arrives while the consumer does other work, so the consumer never waits for one.
#[test]
fn polling_for_ready_rows_is_not_waiting() {
    let batches = play("batches::by_looking", &database(&slow_view("rows", 20, 0.03)), &[]);
    let whole = seconds(&batches.query);
    let waited: f64 = batches.spans.iter().map(|span| number(span, "fraiseql.time.wait")).sum();
    assert!(waited < 0.3 * whole, "waits of {waited} s in {whole} s");
    assert!(batches.covered() < 0.3 * whole, "spans of {} s in {whole} s", batches.covered());
    assert!(batches.longest() < SLEEP.as_secs_f64(), "a span of {} s", batches.longest());
}
