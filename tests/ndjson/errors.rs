//! Failures: exit code 1 and one line on standard error, without the password.

use std::fs::File;
use std::process::Stdio;

use crate::support::{Database, Running, TIMEOUT, error_line, ndjson, next_line, server, stats, text};

#[test]
fn error_names_the_unknown_relation() {
    let database = Database::new("errors_relation", "CREATE TABLE docs (data text)");
    let line = database.failure(&["no_such"]);
    assert!(line.starts_with("ndjson: no_such: relation \"no_such\" does not exist (42P01); "), "{line}");
    let line = database.failure(&["docs"]);
    assert!(line.contains("type text, not json or jsonb"), "{line}");
    let line = database.failure(&["a\nb..c"]);
    assert!(line.contains("invalid entity"), "{line}");
}

#[test]
fn invalid_condition_or_parameter_shows_the_server_error() {
    let database = Database::new(
        "errors_condition",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 3) i",
    );
    let line = database.failure(&["docs", "--where", "nonsense("]);
    assert!(line.contains("42601"), "{line}");
    let line = database.failure(&["docs", "--where", "data::int = $1", "--param", "seven"]);
    assert!(line.contains("invalid input syntax for type integer: \"seven\" (22P02)"), "{line}");
    let line = database.failure(&["docs", "--where", "data::int = $1"]);
    assert!(line.contains("1 parameter, but"), "{line}");
}

#[test]
fn wrong_password_fails_and_is_not_shown() {
    let wrong = "not-the-password";
    let url = server().url().replace(server().password(), wrong);
    let line = error_line(&ndjson(&url, &["docs"]).output().unwrap());
    assert!(line.contains("28P01"), "{line}");
    assert!(!line.contains(wrong), "{line}");
}

#[test]
fn invalid_url_is_not_shown() {
    let password = server().password();
    for url in [
        format!("postgres://postgres:{password}@127.0.0.1:port/db"),
        format!("postgres:{password}@127.0.0.1"),
        format!("host=127.0.0.1 user=postgres pass word={password}"),
        format!("postgres://postgres:{password}@127.0.0.1:1/db"),
        format!("postgres://postgres:{password}@no-such-host.invalid/db"),
    ] {
        error_line(&ndjson(&url, &["docs"]).output().unwrap());
    }
}

#[test]
fn rows_before_an_error_are_written() {
    let database = Database::new(
        "errors_midway",
        "CREATE VIEW docs AS SELECT to_jsonb(1 / (1000 - i)) AS data FROM generate_series(1, 2000) i",
    );
    let output = database.ndjson(&["docs", "--stats"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout).lines().count(), 999);
    let errors = text(&output.stderr);
    let last = errors.lines().last().unwrap();
    assert!(last.starts_with("ndjson: docs: division by zero (22012) after 999 rows in "), "{errors}");
    let stats = stats(&errors);
    assert_eq!(stats.last().unwrap()["rows"], 999);
}

#[test]
fn terminated_backend_is_an_error() {
    let database = Database::new(
        "errors_backend",
        "CREATE VIEW docs AS SELECT to_jsonb(repeat('x', 20000)) AS data FROM generate_series(1, 2)
        UNION ALL SELECT to_jsonb(1) FROM pg_sleep(600)",
    );
    let mut command = database.ndjson(&["docs"]);
    let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut lines = running.stdout();
    next_line(&mut lines);
    database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fraiseql-stream' AND datname = current_database()");
    let line = next_line(&mut running.stderr());
    assert!(line.contains("57P01"), "{line}");
    assert_eq!(running.wait(TIMEOUT).code(), Some(1));
}

#[test]
fn full_disk_is_reported_at_once() {
    let database = Database::new(
        "errors_full",
        "CREATE VIEW docs AS SELECT to_jsonb(repeat('x', 20000)) AS data FROM generate_series(1, 2)
        UNION ALL SELECT to_jsonb(1) FROM pg_sleep(600)",
    );
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = database.ndjson(&["docs"]);
    let mut running = Running::start(command.stdout(full).stderr(Stdio::piped()));
    assert_eq!(
        next_line(&mut running.stderr()),
        "ndjson: cannot write to standard output: No space left on device (os error 28)"
    );
    assert_eq!(running.wait(TIMEOUT).code(), Some(1));
}
