//! The demo, run as a newcomer runs it: in release, in a process of its own, with its own Postgres.

mod run;

use std::time::Duration;

use backends::{Collector, Metric, Postgres, wait_until};
use run::Demo;

const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_piped_run_names_who_is_slow_three_times_and_draws_what_was_recorded() {
    let mut demo = Demo::new().rows(20_000).start();
    let end = demo.end(MINUTE);

    assert_eq!(end.code, Some(0), "{end:#?}");
    assert_eq!(end.stderr, "");
    assert!(!end.stdout.contains('\x1b'), "{}", end.stdout);
    let verdicts = end.stdout.split_once("Who set the pace").expect("the last table").1;
    let verdict = |entity| {
        let line = verdicts.lines().find(|line| line.split_whitespace().next() == Some(entity));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default()
    };
    assert!(["source-bound", "balanced"].contains(&verdict("orders")), "{}", end.stdout);
    assert_eq!(verdict("orders_slow_sink"), "consumer-bound", "{}", end.stdout);
    assert_eq!(verdict("orders_slow_view"), "source-bound", "{}", end.stdout);
    assert!(end.stdout.contains("fraiseql_channel_occupancy_rows"));
    let histogram = |line: &str| line.contains("orders_slow_sink") && line.contains("███");
    assert!(end.stdout.lines().any(histogram), "{}", end.stdout);
    assert!(end.stdout.contains("docker compose up -d"), "{}", end.stdout);
    assert!(end.stdout.lines().all(|line| line.chars().count() <= 80), "{}", end.stdout);
    assert_eq!(demo.left_behind(), Vec::<String>::new());
}

#[test]
fn ctrl_c_in_the_middle_ends_it_with_130_and_leaves_nothing_behind() {
    let mut demo = Demo::new().rows(100_000).start();
    demo.wait_for("orders_slow_sink");
    assert_ne!(demo.left_behind(), Vec::<String>::new(), "its server runs");
    demo.signal("INT");
    let end = demo.end(SOON);

    assert_eq!(end.code, Some(130), "{end:#?}");
    assert!(end.stderr.contains("stopped"), "{end:#?}");
    assert_eq!(demo.left_behind(), Vec::<String>::new());
}

#[test]
fn sigterm_while_the_orders_are_made_ends_it_with_143_and_leaves_nothing_behind() {
    let mut demo = Demo::new().rows(5_000_000).start();
    demo.wait_for("making the orders");
    demo.signal("TERM");
    let end = demo.end(SOON);

    assert_eq!(end.code, Some(143), "{end:#?}");
    assert_eq!(demo.left_behind(), Vec::<String>::new());
}

#[test]
fn ctrl_c_while_its_server_starts_leaves_nothing_behind() {
    let mut demo = Demo::new().start();
    demo.wait_for("Who is slow?");
    demo.signal("INT");
    let end = demo.end(SOON);

    assert_eq!(end.code, Some(130), "{end:#?}");
    assert_eq!(demo.left_behind(), Vec::<String>::new());
}

#[test]
fn a_reader_that_leaves_ends_it_quietly() {
    let mut demo = Demo::new().rows(50_000).start();
    demo.wait_for("orders_slow_sink");
    demo.stop_reading();
    let end = demo.end(SOON);

    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:#?}");
    assert_eq!(demo.left_behind(), Vec::<String>::new());
}

#[test]
fn a_server_of_yours_is_left_without_a_query_a_table_or_a_shown_password() {
    let server = Postgres::start().unwrap();
    let mut demo = Demo::new().rows(20_000).env("DATABASE_URL", &server.url()).start();
    demo.wait_for("orders_slow_view");
    let active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%orders_slow_view%' AND state = 'active' AND pid <> pg_backend_pid()";
    let count = |sql| server.psql("postgres", sql).unwrap().trim().to_owned();
    assert_eq!(count(active), "1");
    demo.signal("INT");
    let end = demo.end(SOON);

    assert_eq!(end.code, Some(130), "{end:#?}");
    assert_eq!(count(active), "0");
    let tables = "SELECT count(*) FROM pg_class WHERE relname LIKE 'orders%'";
    assert!(wait_until(SOON, || count(tables) == "0"));
    assert!(end.stdout.contains("DATABASE_URL"), "{}", end.stdout);
    for said in [&end.stdout, &end.stderr] {
        assert!(!said.contains(server.password()), "{said}");
    }
}

#[test]
fn without_a_postgres_to_start_it_says_so() {
    let mut demo = Demo::new().env("PG_BIN", "/nowhere").start();
    let end = demo.end(SOON);

    assert_eq!(end.code, Some(1), "{end:#?}");
    assert!(end.stderr.starts_with("demo: PG_BIN=\"/nowhere\" is unusable: "), "{end:#?}");
    assert_eq!(demo.left_behind(), Vec::<String>::new());
}

#[test]
fn a_server_that_is_not_there_is_an_error_that_shows_no_password() {
    let url = "postgres://ann:geheim@127.0.0.1:1/shop";
    let end = Demo::new().env("DATABASE_URL", url).start().end(SOON);

    assert_eq!(end.code, Some(1), "{end:#?}");
    assert!(end.stderr.starts_with("demo: "), "{end:#?}");
    assert!(!end.stdout.contains("geheim") && !end.stderr.contains("geheim"), "{end:#?}");
}

#[test]
fn with_a_collector_all_three_streams_are_in_it_and_the_histogram_is_drawn_all_the_same() {
    let collector = Collector::start().unwrap();
    let endpoint = collector.http_endpoint();
    let mut demo = Demo::new().rows(5_000).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).start();
    let end = demo.end(MINUTE);

    assert_eq!(end.code, Some(0), "{end:#?}");
    assert!(end.stdout.contains(&endpoint), "{}", end.stdout);
    assert!(end.stdout.contains("███"), "{}", end.stdout);
    assert!(wait_until(SOON, || collector.metric("fraiseql.stream.rows").is_some()));
    for entity in ["orders", "orders_slow_sink", "orders_slow_view"] {
        let rows = collector.metric("fraiseql.stream.rows").unwrap();
        let yielded = rows.point(&[("entity", entity), ("outcome", "yielded")]).unwrap();
        assert_eq!(yielded.value, Some(5_000.0), "{entity}");
        let occupancy = collector.metric("fraiseql_channel_occupancy_rows").unwrap();
        let chunks = collector.metric("fraiseql.chunk.size").unwrap();
        let count = |metric: &Metric| metric.point(&[("entity", entity)]).unwrap().count;
        assert!(count(&occupancy) > 0, "{entity}");
        assert_eq!(count(&occupancy), count(&chunks), "both once per poll batch: {entity}");
        let name = format!("SELECT {entity}");
        let spans = || collector.spans().iter().any(|span| span.name == name);
        assert!(wait_until(SOON, spans), "{name}");
    }
}

#[test]
fn a_collector_that_is_away_costs_the_telemetry_and_nothing_else() {
    let mut demo = Demo::new().rows(1_000).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1").start();
    let end = demo.end(MINUTE);

    assert_eq!(end.code, Some(0), "{end:#?}");
    assert!(end.stdout.contains("Who set the pace"), "{end:#?}");
    assert!(end.stdout.contains("Not all telemetry arrived at http://127.0.0.1:1."), "{end:#?}");
    assert!(end.stderr.contains("http://127.0.0.1:1"), "{end:#?}");
    assert_eq!(end.stderr.lines().count(), 1, "{end:#?}");
}

#[test]
fn help_tells_the_options_and_the_environment() {
    let end = Demo::new().arg("--help").start().end(SOON);

    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""));
    for word in ["--rows", "DATABASE_URL", "OTEL_", "NO_COLOR"] {
        assert!(end.stdout.contains(word), "{}", end.stdout);
    }
}

#[test]
fn a_wrong_argument_is_refused_with_code_2() {
    for wrong in ["--rows=0", "--rows=many", "--colour"] {
        let end = Demo::new().arg(wrong).start().end(SOON);
        assert_eq!(end.code, Some(2), "{end:#?}");
    }
}
