//! Arguments and environment: what is accepted, and how the rest is rejected.

use crate::support::{Database, ndjson, server, text};

#[test]
fn help_lists_every_option_and_the_environment() {
    let output = ndjson("", &["--help"]).output().unwrap();
    assert!(output.status.success());
    let help = text(&output.stdout);
    let names = [
        "<ENTITY>",
        "--where",
        "--param",
        "--order-by",
        "--limit",
        "--offset",
        "--chunk-size",
        "--max-memory",
        "--pause-ms",
        "--stats",
        "DATABASE_URL",
        "OTEL_",
        "129",
        "130",
        "143",
    ];
    for name in names {
        assert!(help.contains(name), "{name}: {help}");
    }
}

#[test]
fn invalid_arguments_exit_with_code_2_and_an_error() {
    let url = server().url();
    let invalid: [&[&str]; 11] = [
        &[],
        &["docs", "more"],
        &["docs", "--no-such-option"],
        &["docs", "--param", "1"],
        &["docs", "--limit", "-1"],
        &["docs", "--offset", "x"],
        &["docs", "--chunk-size", "0"],
        &["docs", "--max-memory", "0"],
        &["docs", "--pause-ms", "-1"],
        &["docs", "--pause-ms", "nan"],
        &["docs", "--where"],
    ];
    for args in invalid {
        let output = ndjson(&url, args).output().unwrap();
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {errors}");
        assert!(errors.starts_with("error: "), "{args:?}: {errors}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!errors.contains(server().password()), "{args:?}: {errors}");
    }
}

#[test]
fn missing_database_url_exits_with_code_2_and_one_line() {
    for set in [None, Some("")] {
        let mut command = ndjson("", &["docs"]);
        match set {
            Some(value) => command.env("DATABASE_URL", value),
            None => command.env_remove("DATABASE_URL"),
        };
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let line = text(&output.stderr);
        assert!(
            line.starts_with("ndjson: DATABASE_URL is not set") && line.matches('\n').count() == 1,
            "{line}"
        );
    }
}

#[test]
fn largest_chunk_size_and_max_memory_are_accepted() {
    let database = Database::new(
        "arguments_high",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 3) i",
    );
    let max = usize::MAX.to_string();
    let args = ["docs", "--chunk-size", &max, "--max-memory", &max];
    assert_eq!(database.lines(&args), "1\n2\n3\n");
}
