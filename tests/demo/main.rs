//! Runs the demo as a newcomer does: in release mode, as a process, with its own Postgres.

mod run;

use std::time::Duration;

use backends::{Collector, Metric, Postgres, wait_until};
use run::Demo;

const MINUTE: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn piped_run_prints_three_verdicts_and_the_recorded_histograms() {
    let mut demo = Demo::new().rows(20_000).start();
    let end = demo.end(MINUTE);

    assert_eq!(end.code, Some(0), "{end:#?}");
    assert_eq!(end.stderr, "");
    assert!(!end.stdout.contains('\x1b'), "{}", end.stdout);
    let verdicts = end.stdout.split_once("Which side set the pace").expect("the last table").1;
    let verdict = |entity| {
        let line = verdicts.lines().find(|line| line.split_whitespace().next() == Some(entity));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default()
    };
    // On a busy machine the runtime may be late, but the fast consumer is never what sets the pace.
    let of_a_fast_consumer = ["source-bound", "balanced", "mixed", "runtime-bound"];
    assert!(of_a_fast_consumer.contains(&verdict("orders")), "{}", end.stdout);
    assert_eq!(verdict("orders_slow_sink"), "consumer-bound", "{}", end.stdout);
    assert_eq!(verdict("orders_slow_view"), "source-bound", "{}", end.stdout);
    assert!(end.stdout.contains("fraiseql_channel_occupancy_rows"));
    let histogram = |line: &str| line.contains("orders_slow_sink") && line.contains("███");
    assert!(end.stdout.lines().any(histogram), "{}", end.stdout);
    assert!(end.stdout.contains("docker compose up -d"), "{}", end.stdout);
    assert!(end.stdout.lines().all(|line| line.chars().count() <= 80), "{}", end.stdout);
    assert_eq!(demo.leftovers(), Vec::<String>::new());
}

#[test]
fn ctrl_c_midway_exits_with_130_and_leaves_nothing_behind() {
    let mut demo = Demo::new().rows(100_000).start();
    demo.wait_for("orders_slow_sink");
    assert_ne!(demo.leftovers(), Vec::<String>::new(), "its server is running");
    demo.signal("INT");
    let end = demo.end(TIMEOUT);

    assert_eq!(end.code, Some(130), "{end:#?}");
    assert!(end.stderr.contains("stopped"), "{end:#?}");
    assert_eq!(demo.leftovers(), Vec::<String>::new());
}

#[test]
fn sigterm_while_orders_are_created_exits_with_143_and_leaves_nothing_behind() {
    let mut demo = Demo::new().rows(5_000_000).start();
    demo.wait_for("creating the orders");
    demo.signal("TERM");
    let end = demo.end(TIMEOUT);

    assert_eq!(end.code, Some(143), "{end:#?}");
    assert_eq!(demo.leftovers(), Vec::<String>::new());
}

#[test]
fn ctrl_c_while_the_server_starts_leaves_nothing_behind() {
    let mut demo = Demo::new().start();
    demo.wait_for("Which side is slow?");
    demo.signal("INT");
    let end = demo.end(TIMEOUT);

    assert_eq!(end.code, Some(130), "{end:#?}");
    assert_eq!(demo.leftovers(), Vec::<String>::new());
}

#[test]
fn closed_output_stops_the_demo_silently() {
    let mut demo = Demo::new().rows(50_000).start();
    demo.wait_for("orders_slow_sink");
    demo.stop_reading();
    let end = demo.end(TIMEOUT);

    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:#?}");
    assert_eq!(demo.leftovers(), Vec::<String>::new());
}

#[test]
fn users_server_keeps_no_query_or_table_and_its_password_is_not_shown() {
    let server = Postgres::start().unwrap();
    let mut demo = Demo::new().rows(20_000).env("DATABASE_URL", &server.url()).start();
    demo.wait_for("orders_slow_view");
    let active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%orders_slow_view%' AND state = 'active' AND pid <> pg_backend_pid()";
    let count = |sql| server.psql("postgres", sql).unwrap().trim().to_owned();
    assert_eq!(count(active), "1");
    demo.signal("INT");
    let end = demo.end(TIMEOUT);

    assert_eq!(end.code, Some(130), "{end:#?}");
    assert_eq!(count(active), "0");
    let tables = "SELECT count(*) FROM pg_class WHERE relname LIKE 'orders%'";
    assert!(wait_until(TIMEOUT, || count(tables) == "0"));
    assert!(end.stdout.contains("DATABASE_URL"), "{}", end.stdout);
    for output in [&end.stdout, &end.stderr] {
        assert!(!output.contains(server.password()), "{output}");
    }
}

#[test]
fn unusable_pg_bin_is_reported() {
    let mut demo = Demo::new().env("PG_BIN", "/nowhere").start();
    let end = demo.end(TIMEOUT);

    assert_eq!(end.code, Some(1), "{end:#?}");
    assert!(end.stderr.starts_with("demo: PG_BIN=\"/nowhere\" is unusable: "), "{end:#?}");
    assert_eq!(demo.leftovers(), Vec::<String>::new());
}

#[test]
fn unreachable_server_is_an_error_without_the_password() {
    let url = "postgres://ann:secret@127.0.0.1:1/shop";
    let end = Demo::new().env("DATABASE_URL", url).start().end(TIMEOUT);

    assert_eq!(end.code, Some(1), "{end:#?}");
    assert!(end.stderr.starts_with("demo: "), "{end:#?}");
    assert!(!end.stdout.contains("secret") && !end.stderr.contains("secret"), "{end:#?}");
}

#[test]
fn collector_receives_all_three_streams_and_the_histograms_are_still_printed() {
    let collector = Collector::start().unwrap();
    let endpoint = collector.http_endpoint();
    let mut demo = Demo::new().rows(5_000).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).start();
    let end = demo.end(MINUTE);

    assert_eq!(end.code, Some(0), "{end:#?}");
    assert!(end.stdout.contains(&endpoint), "{}", end.stdout);
    assert!(end.stdout.contains("███"), "{}", end.stdout);
    assert!(wait_until(TIMEOUT, || collector.metric("fraiseql.stream.rows").is_some()));
    for entity in ["orders", "orders_slow_sink", "orders_slow_view"] {
        let rows = collector.metric("fraiseql.stream.rows").unwrap();
        let yielded = rows.point(&[("entity", entity), ("outcome", "yielded")]).unwrap();
        assert_eq!(yielded.value, Some(5_000.0), "{entity}");
        let occupancy = collector.metric("fraiseql_channel_occupancy_rows").unwrap();
        let chunks = collector.metric("fraiseql.chunk.size").unwrap();
        let count = |metric: &Metric| metric.point(&[("entity", entity)]).unwrap().count;
        assert!(count(&occupancy) > 0, "{entity}");
        assert_eq!(count(&occupancy), count(&chunks), "each is recorded once per poll batch: {entity}");
        let name = format!("SELECT {entity}");
        let spans = || collector.spans().iter().any(|span| span.name == name);
        assert!(wait_until(TIMEOUT, spans), "{name}");
    }
}

#[test]
fn unreachable_collector_costs_one_line_and_nothing_else() {
    let mut demo = Demo::new().rows(1_000).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1").start();
    let end = demo.end(MINUTE);

    assert_eq!(end.code, Some(0), "{end:#?}");
    assert!(end.stdout.contains("Which side set the pace"), "{end:#?}");
    assert!(end.stdout.contains("Some telemetry did not reach http://127.0.0.1:1."), "{end:#?}");
    assert!(end.stderr.contains("http://127.0.0.1:1"), "{end:#?}");
    assert_eq!(end.stderr.lines().count(), 1, "{end:#?}");
}

#[test]
fn help_lists_the_options_and_the_environment() {
    let end = Demo::new().arg("--help").start().end(TIMEOUT);

    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""));
    for word in ["--rows", "DATABASE_URL", "OTEL_", "NO_COLOR"] {
        assert!(end.stdout.contains(word), "{}", end.stdout);
    }
}

#[test]
fn invalid_argument_exits_with_code_2() {
    for arg in ["--rows=0", "--rows=many", "--colour"] {
        let end = Demo::new().arg(arg).start().end(TIMEOUT);
        assert_eq!(end.code, Some(2), "{end:#?}");
    }
}
