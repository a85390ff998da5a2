//! Telemetry is exported if an `OTEL_*` variable is set, and only then.

use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use backends::{Collector, wait_until};

use crate::support::{Database, Running, TIMEOUT, next_line, text};

const VIEW: &str = "
    CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 300) i;
    CREATE VIEW one AS SELECT to_jsonb(repeat('x', 20000)) AS data FROM generate_series(1, 2)
        UNION ALL SELECT to_jsonb(1) FROM pg_sleep(600);";

#[test]
fn metrics_and_spans_are_exported_even_after_a_signal() {
    let collector = Collector::start().unwrap();
    let database = Database::new("telemetry_sent", VIEW);
    let endpoint = collector.http_endpoint();
    let mut command = database.ndjson(&["docs"]);
    let output = command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));

    let mut command = database.ndjson(&["one"]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let mut lines = running.stdout();
    next_line(&mut lines);
    running.signal("INT");
    assert_eq!(running.wait(TIMEOUT).code(), Some(130));

    // The collector writes what it receives with a short delay.
    assert!(wait_until(TIMEOUT, || rows(&collector) >= 301.0), "{}", rows(&collector));
    for name in ["SELECT docs", "SELECT one", "cancel"] {
        let arrived = || collector.spans().iter().any(|span| span.name == name);
        assert!(wait_until(TIMEOUT, arrived), "{name}: {:?}", collector.spans());
    }
}

/// Returns the number of rows of all runs.
fn rows(collector: &Collector) -> f64 {
    let metrics = collector.metrics().into_iter();
    metrics
        .filter(|metric| metric.name == "fraiseql.stream.rows")
        .flat_map(|metric| metric.points)
        .filter_map(|point| point.value)
        .sum()
}

#[test]
fn nothing_is_set_up_without_an_otel_variable() {
    let database = Database::new("telemetry_unset", VIEW);
    let mut command = database.ndjson(&["one"]);
    // An empty variable counts as unset.
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", "");
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let mut lines = running.stdout();
    next_line(&mut lines);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", running.pid())).unwrap();
    let mut threads: Vec<String> =
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap()).collect();
    threads.sort();
    assert_eq!(threads, ["ndjson\n", "writer\n", "writer\n"]);
}

#[test]
fn unreachable_collector_costs_one_line_and_no_row() {
    let database = Database::new("telemetry_unreachable", VIEW);
    let refused = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    for address in [refused, silent.local_addr().unwrap()] {
        let mut command = database.ndjson(&["docs"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"));
        let start = Instant::now();
        let output = command.output().unwrap();
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{errors}");
        assert_eq!(text(&output.stdout).lines().count(), 300);
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}
