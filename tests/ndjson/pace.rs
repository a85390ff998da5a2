//! `--stats` and `--pause-ms`: which side is slow, and by how much.

use std::io::BufRead as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Database, Running, STOP_TIMEOUT, ndjson, next_line, stats, text};

/// Runs the program, which must succeed, and returns its final statistics.
fn last_stats(database: &Database, args: &[&str]) -> Value {
    let mut command = database.ndjson(args);
    let output = command.arg("--stats").stdout(Stdio::null()).output().expect("the program runs");
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let last = stats(&errors).pop().expect("there is a final line");
    assert_eq!(last["ended"], true, "{last}");
    last
}

fn seconds(stats: &Value) -> f64 {
    stats["elapsed_seconds"].as_f64().expect("the field is a number of seconds")
}

#[test]
fn pause_of_ten_milliseconds_per_row_is_consumer_bound() {
    let database = Database::new(
        "pace_consumer",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 200) i",
    );
    let stats = last_stats(&database, &["docs", "--pause-ms", "10"]);
    assert_eq!(stats["verdict"], "consumer_bound", "{stats}");
    assert_eq!((&stats["entity"], &stats["rows"]), (&"docs".into(), &200.into()));
    assert_eq!(stats["bytes"], 9 + 90 * 2 + 101 * 3);
    assert_eq!(stats["buffered_rows"], 0);
}

#[test]
fn slow_view_is_source_bound() {
    let database = Database::new(
        "pace_source",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 50) i WHERE pg_sleep(0.02) IS NOT NULL",
    );
    let stats = last_stats(&database, &["docs"]);
    assert_eq!(stats["verdict"], "source_bound", "{stats}");
    // The verdict is the same if the consumer is slow too, but less slow than the view.
    let stats = last_stats(&database, &["docs", "--pause-ms", "1"]);
    assert_eq!(stats["verdict"], "source_bound", "{stats}");
}

#[test]
fn pauses_have_the_requested_length_on_average() {
    let database = Database::new(
        "pace_pause",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 4000) i",
    );
    for (pause, rows) in [("0.5", "2000"), ("1.5", "700"), ("7", "150")] {
        let expected = pause.parse::<f64>().unwrap() / 1e3 * rows.parse::<f64>().unwrap();
        let ratio =
            || seconds(&last_stats(&database, &["docs", "--pause-ms", pause, "--limit", rows])) / expected;
        // The rows take time as well, sometimes a lot of it on a busy machine, so one good run of three is enough.
        let ratios = [ratio(), ratio(), ratio()];
        assert!(ratios.iter().any(|ratio| (0.85..1.15).contains(ratio)), "{pause}: {ratios:?}");
    }
}

#[test]
fn statistics_are_written_every_second_while_the_reader_stalls() {
    let database = Database::new(
        "pace_stalled",
        "CREATE VIEW docs AS SELECT to_jsonb(repeat('x', 1000)) AS data, generate_series(1, 1000000)",
    );
    let mut command = database.ndjson(&["docs", "--stats"]);
    let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let _stalled = running.stdout();
    let mut errors = running.stderr();
    let start = Instant::now();
    let lines: Vec<String> = (0..4).map(|_| next_line(&mut errors)).collect();
    let took = start.elapsed().as_secs_f64();
    assert!((3.5..4.9).contains(&took), "4 lines in {took} s");
    let stats = stats(&lines.join("\n"));
    let last = stats.last().unwrap();
    assert_eq!(last["verdict"], "consumer_bound", "{last}");
    assert_eq!((&last["ended"], &last["buffered_rows"]), (&false.into(), &256.into()));
    // A wait that has not ended yet is included.
    assert!(last["time_seconds"]["consumer"].as_f64() > Some(3.5), "{last}");
    assert!(last["producer_time_seconds"]["room"].as_f64() > Some(3.0), "{last}");
    running.signal("INT");
    assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(130));
}

#[test]
fn statistics_are_written_every_second_during_a_long_pause_and_while_the_server_is_silent() {
    let database = Database::new(
        "pace_silent",
        "CREATE VIEW quick AS SELECT to_jsonb(1) AS data FROM generate_series(1, 10);
        CREATE VIEW silent AS SELECT to_jsonb(1) AS data FROM pg_sleep(600);",
    );
    for (args, verdict) in [
        (&["silent", "--stats"][..], "source_bound"),
        (&["quick", "--stats", "--pause-ms", "600000"], "consumer_bound"),
    ] {
        let mut command = database.ndjson(args);
        let mut running = Running::start(command.stdout(Stdio::null()).stderr(Stdio::piped()));
        let mut errors = running.stderr();
        let lines = [next_line(&mut errors), next_line(&mut errors)];
        for stats in stats(&lines.join("\n")) {
            assert_eq!(stats["verdict"], verdict, "{stats}");
        }
        running.signal("INT");
        assert_eq!(errors.lines().count(), 1, "one final line");
    }
}

#[test]
fn statement_timeout_is_attributed_to_the_slow_consumer() {
    let database = Database::new(
        "pace_timeout",
        "CREATE VIEW docs AS SELECT to_jsonb(repeat('x', 1000)) AS data, generate_series(1, 100000)",
    );
    // Over the Unix socket, whose small buffer keeps few rows that are delivered before the error.
    let url = format!("{} options='-c statement_timeout=2000'", database.socket_url());
    let mut command = ndjson(&url, &["docs", "--pause-ms", "5", "--stats"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    let line = errors.lines().last().unwrap();
    assert!(line.contains("(57014) after ") && line.contains("consumer-bound"), "{line}");
    let stats = stats(&errors).pop().unwrap();
    assert_eq!(stats["verdict"], "consumer_bound", "{stats}");
    let rows = stats["rows"].as_u64().unwrap();
    assert_eq!(text(&output.stdout).lines().count() as u64, rows);
    assert!(Duration::from_secs_f64(seconds(&stats)) < Duration::from_secs(20), "{stats}");
}
