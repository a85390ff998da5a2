//! The service whose telemetry the tests watch: an ignored test of this binary that runs in a process of its own, since
//! `otlp::init()` sets globals.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fraiseql_stream::{Connection, Observer, RawJson, otlp};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::json;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The variable with the URL of the database.
pub(crate) const DATABASE: &str = "OPERATOR_DATABASE_URL";
/// The variable with the streams to run: `all`, or those of one entity.
pub(crate) const STREAMS: &str = "OPERATOR_STREAMS";

/// The relations that the service streams.
pub(crate) const SCHEMA: &str = r#"
CREATE VIEW endless AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 100)) AS data
  FROM generate_series(1, 1000) i, generate_series(1, 1000000) j;
-- Ends after a second or two, since it leaves little of the processors to the others.
CREATE VIEW fast AS SELECT data FROM endless LIMIT 500000;
CREATE VIEW slow_sink AS SELECT data FROM endless;
CREATE VIEW starved AS SELECT data FROM endless;
CREATE VIEW held AS SELECT data FROM endless;
CREATE VIEW slow_view AS SELECT jsonb_build_object('id', i, 'pad', repeat('x', 9000), 'slept', pg_sleep(0.02)::text) AS data
  FROM generate_series(1, 1000000) i;
CREATE VIEW large AS SELECT ('{"pad":"' || repeat('x', 100000) || '"}')::json AS data FROM generate_series(1, 100000) i;
CREATE VIEW broken AS SELECT jsonb_build_object('id', 1 / (51 - i)) AS data FROM generate_series(1, 100) i;
CREATE VIEW odd AS SELECT CASE WHEN i % 10 = 0 THEN '"no document"' ELSE jsonb_build_object('id', i) END AS data
  FROM generate_series(1, 100) i;
-- Recorded as _OTHER, like an entity beyond the first thousand.
CREATE VIEW "_REFUSED" AS SELECT jsonb_build_object('id', 1) AS data;
"#;

#[derive(Deserialize)]
struct Document {
    #[expect(dead_code, reason = "only its presence matters")]
    id: i64,
}

/// The streams by entity.
type Observers = Arc<Mutex<BTreeMap<String, Observer>>>;

/// Runs the streams until standard input ends. For each line, it prints the library's own verdicts.
#[test]
#[ignore = "a service that the other tests run"]
fn service() -> Result {
    let Ok(url) = std::env::var(DATABASE) else { return Ok(()) };
    let which = std::env::var(STREAMS)?;
    let telemetry = otlp::init()?;
    let observers = Observers::default();
    for (entity, memory, run) in STEADY {
        if which == "all" || which == entity {
            let steady = steady(url.clone(), (entity, memory), Arc::clone(&observers), run);
            std::thread::spawn(|| runtime().block_on(async { tokio::spawn(steady).await }));
        }
    }
    if which == "all" {
        std::thread::spawn(|| runtime().block_on(failing(url)));
    }
    for line in std::io::stdin().lines() {
        line?;
        let observers = observers.lock().map_err(|error| error.to_string())?;
        let verdict = |observer: &Observer| observer.stats().verdict().as_str();
        let verdicts: BTreeMap<_, _> =
            observers.iter().map(|(entity, observer)| (entity, verdict(observer))).collect();
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "\n{}", json!({ "verdicts": verdicts }))?;
        stdout.flush()?;
    }
    runtime().block_on(telemetry.shutdown())?;
    // Most streams have no end.
    std::process::exit(0)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// What a consumer does after each row.
#[derive(Clone, Copy)]
enum Consumer {
    Reads,
    Sleeps(Duration),
    /// Shares its thread with a task that blocks it.
    IsStarved,
    Holds,
}

const MIB: usize = 1 << 20;

const STEADY: [(&str, usize, Consumer); 6] = [
    ("fast", 16 * MIB, Consumer::Reads),
    ("slow_sink", 16 * MIB, Consumer::Sleeps(Duration::from_millis(1))),
    ("slow_view", 16 * MIB, Consumer::Reads),
    ("starved", 16 * MIB, Consumer::IsStarved),
    ("large", MIB, Consumer::Sleeps(Duration::from_millis(20))),
    ("held", 16 * MIB, Consumer::Holds),
];

async fn steady(
    url: String,
    (entity, memory): (&str, usize),
    observers: Observers,
    consumer: Consumer,
) -> Result {
    let db = Connection::connect(&url).await?;
    let mut rows = db
        .into_query::<RawJson>(entity)
        .max_memory(memory)
        .stream()
        .await
        .map_err(|error| error.to_string())?;
    observers.lock().map_err(|error| error.to_string())?.insert(entity.to_owned(), rows.observer());
    if let Consumer::IsStarved = consumer {
        tokio::spawn(async {
            loop {
                // Blocks on purpose: this is the mistake that the verdict must report.
                std::thread::sleep(Duration::from_millis(30));
                tokio::task::yield_now().await;
            }
        });
    }
    while let Some(row) = rows.next().await {
        row?;
        match consumer {
            Consumer::Reads | Consumer::IsStarved => {}
            Consumer::Sleeps(time) => tokio::time::sleep(time).await,
            Consumer::Holds => std::future::pending().await,
        }
    }
    Ok(())
}

/// Runs short streams that fail in each way, again and again.
async fn failing(url: String) -> Result {
    let mut db = Connection::connect(&url).await?;
    loop {
        for entity in ["broken", "odd", "nowhere", "_REFUSED"] {
            let Ok(mut rows) = db.query::<Document>(entity).stream().await else { continue };
            while rows.next().await.is_some() {}
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
