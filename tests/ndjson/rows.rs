//! Rows: the bytes as Postgres sends them, one document per line.

use std::fmt::Write as _;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::support::{Database, Running, TIMEOUT};

#[test]
fn json_is_written_as_stored_except_for_line_breaks_between_tokens() {
    let database = Database::new(
        "rows_json",
        r#"CREATE TABLE docs (id int, data json);
        INSERT INTO docs VALUES
            (1, '{"b":1,   "a":2, "b":3}'),
            (2, E'{\n  "a": [1,\r\n\t2]\n}\n'),
            (3, '"line\nbreak, \u00e9, é, 🦀, \\"'),
            (4, NULL),
            (5, 'null'),
            (6, ' 1.50e+01 '),
            (7, '""');"#,
    );
    assert_eq!(
        database.lines(&["docs", "--order-by", "id"]),
        concat!(
            "{\"b\":1,   \"a\":2, \"b\":3}\n",
            "{   \"a\": [1,  \t2] } \n",
            "\"line\\nbreak, \\u00e9, é, 🦀, \\\\\"\n",
            "null\n",
            "null\n",
            " 1.50e+01 \n",
            "\"\"\n",
        )
    );
}

#[test]
fn jsonb_is_written_as_postgres_prints_it() {
    let database = Database::new(
        "rows_jsonb",
        r#"CREATE TABLE docs (id int, data jsonb);
        INSERT INTO docs VALUES
            (1, '{"b":1,   "a":2, "b":3}'),
            (2, E'{"text": "line\\nbreak \\u000b é 🦀",\n"number": 1.50}'),
            (3, NULL),
            (4, 'null'),
            (5, to_jsonb(repeat('long', 100000)));"#,
    );
    let lines = database.lines(&["docs", "--order-by", "id"]);
    let expected = database.sql("SELECT coalesce(data::text, 'null') FROM docs ORDER BY id");
    assert_eq!(lines, expected);
    assert!(lines.starts_with(concat!(
        "{\"a\": 2, \"b\": 3}\n",
        "{\"text\": \"line\\nbreak \\u000b é 🦀\", \"number\": 1.50}\n",
        "null\nnull\n\"longlong"
    )));
}

#[test]
fn every_row_is_written_once_and_in_order() {
    let database = Database::new(
        "rows_many",
        "CREATE VIEW docs AS SELECT jsonb_build_object('id', i) AS data FROM generate_series(1, 200000) i",
    );
    let expected = (1..=200_000).fold(String::new(), |mut text, id| {
        writeln!(text, "{{\"id\": {id}}}").unwrap();
        text
    });
    for chunk_size in ["1", "64", "1000"] {
        let lines = database.lines(&["docs", "--chunk-size", chunk_size]);
        assert!(lines == expected, "chunks of {chunk_size}");
    }
    assert!(database.lines(&["docs", "--max-memory", "1"]) == expected);
}

#[test]
fn order_limit_and_offset_select_the_rows() {
    let database = Database::new(
        "rows_selected",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 100) i",
    );
    assert_eq!(
        database.lines(&["docs", "--order-by", "data::int DESC", "--offset", "2", "--limit", "3"]),
        "98\n97\n96\n"
    );
    assert_eq!(database.lines(&["docs", "--order-by", "-data::int", "--limit", "1"]), "100\n");
    assert_eq!(database.lines(&["docs", "--limit", "0"]), "");
    assert_eq!(database.lines(&["docs", "--where", "data::int % 50 = 0 -- halves"]), "50\n100\n");
}

#[test]
fn parameters_have_the_type_that_the_condition_implies() {
    let database = Database::new(
        "rows_parameters",
        "CREATE TYPE mood AS ENUM ('good', 'bad');
        CREATE TABLE docs (data jsonb, i int, n numeric, t text, b boolean, at timestamptz, u uuid, tags text[], m mood);
        INSERT INTO docs VALUES ('\"it\"', -5, 1.50, '', true, '2024-02-29 12:00Z', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{a,b}', 'good');",
    );
    let matching = [
        ("i = $1", vec!["-5"]),
        ("n = $1", vec!["1.5"]),
        ("t = $1", vec![""]),
        ("b = $1", vec!["true"]),
        ("at = $1", vec!["2024-02-29 13:00:00+01"]),
        ("u = $1", vec!["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"]),
        ("tags = $1", vec!["{a,b}"]),
        ("m = $1", vec!["good"]),
        ("data = $1", vec!["\"it\""]),
        ("i = coalesce(nullif($1, '')::int, -5)", vec![""]),
        ("nullif($1, '') IS NULL", vec![""]),
        ("$1 || $2 = 'a--where'", vec!["a", "--where"]),
        ("t <> $1", vec!["é 🦀 ' \" \\ $1"]),
    ];
    for (condition, params) in matching {
        let mut args = vec!["docs", "--where", condition];
        for param in &params {
            args.extend(["--param", param]);
        }
        assert_eq!(database.lines(&args), "\"it\"\n", "{condition} {params:?}");
        let negated = format!("NOT coalesce({condition}, false)");
        args[2] = &negated;
        assert_eq!(database.lines(&args), "", "{negated} {params:?}");
    }
}

#[test]
fn row_is_written_before_the_next_one_arrives() {
    // The server holds rows back until it has 8 KB, so these rows are larger.
    let database = Database::new(
        "rows_prompt",
        "CREATE VIEW docs AS SELECT to_jsonb(repeat('x', 20000)) AS data FROM generate_series(1, 2)
        UNION ALL SELECT to_jsonb(1) FROM pg_sleep(600)",
    );
    let mut command = database.ndjson(&["docs"]);
    let mut running = Running::start(command.stdout(std::process::Stdio::piped()));
    let line = crate::support::next_line(&mut running.stdout());
    assert_eq!(line.len(), 20_002);
}

#[test]
fn non_blocking_output_receives_every_byte() {
    let database = Database::new(
        "rows_nonblocking",
        "CREATE VIEW docs AS SELECT to_jsonb(i) AS data FROM generate_series(1, 200000) i",
    );
    let (mut reader, writer) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    let mut running = Running::start(database.ndjson(&["docs"]).stdout(OwnedFd::from(writer)));
    std::thread::sleep(Duration::from_millis(300));
    let mut lines = String::new();
    reader.read_to_string(&mut lines).unwrap();
    assert_eq!(lines.lines().count(), 200_000);
    assert!(lines.ends_with("\n199999\n200000\n"));
    assert!(running.wait(TIMEOUT).success());
}
