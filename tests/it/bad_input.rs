//! Bad input: the error says what to change, and the connection stays usable.

use fraiseql_stream::{Connection, Error, ErrorKind};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;

use crate::server::{Database, Doc, SOON, all_of, ids, rows_of, table, table_script, within};

/// Returns the error of a stream that must not start, and fails unless the connection runs the next one.
macro_rules! refusal {
    ($db:expr, $query:expr) => {{
        let error = within(SOON, $query.stream()).await.map(drop).unwrap_err();
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
        assert_eq!(ids(&rows_of($db.query::<Doc>("good").stream().await.unwrap()).await), [0]);
        error
    }};
}

/// Creates a database with a table `good` of one row, and runs `script` in it.
fn database(script: &str) -> Database {
    Database::with(&format!("{} {script}", table_script("good", 1, 0)))
}

/// Returns the error's text, and fails unless it is one line without control characters.
fn line_of(error: &Error) -> String {
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    for shown in [error.to_string(), format!("{error:?}"), format!("{error:#?}")] {
        assert!(!shown.contains(breaks), "{shown:?}");
    }
    error.to_string()
}

fn text_of(error: &Error, kind: ErrorKind) -> String {
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

#[tokio::test]
async fn unknown_relation_is_a_query_error() {
    let database = database("");
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Value>("ordesr"));
    assert_eq!(error.sqlstate().unwrap().code(), "42P01");
    let text = text_of(&error, ErrorKind::Query);
    assert!(text.contains(r#"relation "ordesr" does not exist"#), "{text}");
    assert!(text.contains("case-sensitive") && text.contains("search_path"), "what to change: {text}");
    let error = refusal!(db, db.query::<Value>("sales.good"));
    assert!(text_of(&error, ErrorKind::Query).contains("sales.good"), "{error}");
}

#[tokio::test]
async fn relation_without_a_data_column_is_reported() {
    let database = database("CREATE TABLE t (doc jsonb)");
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Value>("t"));
    assert_eq!(error.sqlstate().unwrap().code(), "42703");
    let text = text_of(&error, ErrorKind::Query);
    assert!(text.contains(r#"column "data" does not exist"#), "{text}");
    assert!(text.contains("stream a view that has one"), "what to change: {text}");
}

#[tokio::test]
async fn column_of_another_type_is_rejected_with_its_name_and_type() {
    let database = database(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN positive AS int CHECK (VALUE > 0);
         CREATE TABLE texts AS SELECT '{}'::text AS data;
         CREATE TABLE ints AS SELECT 1 AS data;
         CREATE TABLE arrays AS SELECT ARRAY['{}'::jsonb] AS data;
         CREATE TABLE domains AS SELECT 1::positive AS data;
         CREATE TABLE composites AS SELECT good AS data FROM good;
         CREATE TABLE enums AS SELECT 'ok'::mood AS data;",
    );
    let mut db = database.connect().await;
    let cases = [
        ("texts", "text"),
        ("ints", "int4"),
        ("arrays", "_jsonb"),
        ("domains", "int4"),
        ("composites", "good"),
        ("enums", "mood"),
    ];
    for (entity, ty) in cases {
        let error = refusal!(db, db.query::<Value>(entity));
        let text = text_of(&error, ErrorKind::Statement);
        assert!(text.starts_with(&format!("{entity}: column data is of type ")), "{text}");
        assert!(text.contains(ty) && text.contains("json or jsonb"), "{text}");
        let cast = if ty == "text" { "data::jsonb" } else { "to_jsonb(data)" };
        assert!(text.contains(cast), "what to change: {text}");
    }
}

#[tokio::test]
async fn large_view_whose_data_is_an_enum_does_not_hang() {
    let database = database(
        "CREATE TYPE mood AS ENUM ('sad', 'ok');
         CREATE VIEW moods AS SELECT 'ok'::mood AS data FROM generate_series(1, 200000);",
    );
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Value>("moods"));
    assert!(text_of(&error, ErrorKind::Statement).contains("mood"), "{error}");
}

#[tokio::test]
async fn domain_over_jsonb_streams() {
    let database = database(
        "CREATE DOMAIN document AS jsonb CHECK (VALUE ? 'id');
         CREATE TABLE t AS SELECT '{\"id\": 5}'::document AS data;",
    );
    let mut db = database.connect().await;
    let stream = within(SOON, db.query::<Doc>("t").stream()).await.unwrap();
    assert_eq!(ids(&rows_of(stream).await), [5]);
}

#[tokio::test]
async fn too_few_and_too_many_values_are_reported_with_both_counts() {
    let database = database("");
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Value>("good").where_sql("id = $1 AND id < $2", &[&1_i32]));
    let text = text_of(&error, ErrorKind::Statement);
    assert!(text.contains("2 parameters") && text.contains("1 value;"), "{text}");
    let error = refusal!(db, db.query::<Value>("good").where_sql("id = 1", &[&1_i32]));
    let text = text_of(&error, ErrorKind::Statement);
    assert!(text.contains("0 parameters") && text.contains("1 value;"), "{text}");
}

#[tokio::test]
async fn value_of_the_wrong_type_is_reported_with_its_number_and_both_types() {
    let database = database("");
    let mut db = database.connect().await;
    let query = db.query::<Value>("good").where_sql("data->>'pad' = $1 AND id = $2", &[&"x", &"7"]);
    let error = refusal!(db, query);
    let text = text_of(&error, ErrorKind::Statement);
    assert!(text.contains("$2") && text.contains("int4") && text.contains("str"), "{text}");
    assert!(text.contains("$2::text::int4"), "what to change: {text}");
    // The suggested cast works.
    let query = db.query::<Doc>("good").where_sql("id = $1::text::int4", &[&"0"]);
    assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), [0]);
}

#[tokio::test]
async fn value_that_postgres_cannot_parse_is_an_error_with_its_sqlstate() {
    let database = database("");
    let mut db = database.connect().await;
    let query = db.query::<Doc>("good").where_sql("id = $1::text::int4", &[&"seven"]);
    // The types match, so Postgres parses the value only when the query runs: the error is the stream's first item.
    let mut stream = query.stream().await.unwrap();
    let error = within(SOON, stream.next()).await.unwrap().unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "22P02");
    assert!(text_of(&error, ErrorKind::Query).contains("seven"), "{error}");
    assert!(within(SOON, stream.next()).await.is_none());
}

#[tokio::test]
async fn invalid_sql_in_a_clause_is_a_query_error() {
    let database = database("");
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Value>("good").where_sql("id = = 1", &[]));
    assert_eq!(error.sqlstate().unwrap().code(), "42601");
    let error = refusal!(db, db.query::<Value>("good").where_sql("true; DROP TABLE good", &[]));
    assert_eq!(error.sqlstate().unwrap().code(), "42601");
    let error = refusal!(db, db.query::<Value>("good").order_by("no_such_column"));
    assert!(text_of(&error, ErrorKind::Query).contains("no_such_column"), "{error}");
}

#[tokio::test]
async fn entity_name_with_line_breaks_is_escaped_once() {
    let database = database("CREATE TABLE \"two\nlines\" (doc jsonb)");
    let mut db = database.connect().await;
    let text = line_of(&refusal!(db, db.query::<Value>("two\nlines")));
    assert!(text.starts_with(r#"two\nlines: column "data" does not exist"#), "{text}");
    let text = line_of(&refusal!(db, db.query::<Value>("no\r\n\u{85}\u{2028}\u{2029}\u{1b}[31m such")));
    assert!(text.starts_with(r"no\r\n\u{85}\u{2028}\u{2029}\u{1b}[31m such: relation"), "{text}");
    // This message quotes the name, which escapes it already.
    let text = line_of(&refusal!(db, db.query::<Value>("a\n..\u{1b}b")));
    assert!(text.starts_with(r#"a\n..\u{1b}b: invalid entity "a\n..\u{1b}b": "#), "{text}");
}

#[tokio::test]
async fn server_message_with_line_breaks_is_escaped() {
    let database = database(
        r"CREATE FUNCTION fail() RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
              RAISE EXCEPTION E'one\ntwo \x1b[31m' USING DETAIL = E'three\r\nfour', HINT = E'five\tsix \u2028';
          END $$; CREATE VIEW v AS SELECT fail() AS data;",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Value>("v").stream().await.unwrap();
    let text = line_of(&within(SOON, stream.next()).await.unwrap().unwrap_err());
    let (what, more) = text.split_once(" after 0 rows in ").unwrap();
    assert_eq!(what, r"v: one\ntwo \u{1b}[31m (P0001)");
    assert!(more.contains(r"; detail: three\r\nfour; hint: five\tsix \u{2028}"), "{text}");
}

/// A type that rejects every document with a message of two lines.
#[derive(Debug)]
struct Never;

impl<'de> Deserialize<'de> for Never {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("first\nsecond\u{7}"))
    }
}

#[tokio::test]
async fn deserialize_message_with_line_breaks_is_escaped() {
    let database = database("");
    let mut db = database.connect().await;
    let mut stream = db.query::<Never>("good").stream().await.unwrap();
    let text = line_of(&within(SOON, stream.next()).await.unwrap().unwrap_err());
    assert!(text.starts_with(r"good: row 0: first\nsecond\u{7}"), "{text}");
}

#[derive(Debug, Deserialize)]
struct Strict {
    id: u8,
    #[expect(dead_code, reason = "only needs to be required")]
    name: String,
}

#[tokio::test]
async fn decode_error_contains_the_row_number_and_what_was_expected() {
    let database = database(
        r#"CREATE TABLE t (data json);
           INSERT INTO t VALUES ('{"id": 1, "name": "a"}'), ('{"id": 2}'), ('{"id": 300, "name": "b"}'),
                                ('{"id": "4", "name": "c"}'), ('[]'), ('{"id": 6, "name": "d"}')"#,
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Strict>("t").stream().await.unwrap();
    let mut outcomes = Vec::new();
    while let Some(row) = within(SOON, stream.next()).await {
        outcomes.push(row.map(|row| row.id).map_err(|error| (error.kind(), error.to_string())));
    }
    let expected = [
        Ok(1),
        Err((1, "missing field `name`")),
        Err((2, "expected u8")),
        Err((3, "expected u8")),
        Err((4, "expected struct Strict")),
        Ok(6),
    ];
    assert_eq!(outcomes.len(), expected.len());
    for (outcome, expected) in outcomes.into_iter().zip(expected) {
        match (outcome, expected) {
            (Ok(id), Ok(expected)) => assert_eq!(id, expected),
            (Err((kind, text)), Err((row, why))) => {
                assert_eq!(kind, ErrorKind::Decode { row });
                assert!(text.starts_with(&format!("t: row {row}: ")) && text.contains(why), "{text}");
            }
            (outcome, expected) => panic!("{outcome:?} is not {expected:?}"),
        }
    }
}

#[tokio::test]
async fn chunk_size_and_max_memory_of_zero_are_rejected() {
    let database = database("");
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Value>("good").chunk_size(0));
    assert!(text_of(&error, ErrorKind::Config).contains("invalid chunk_size 0"), "{error}");
    let error = refusal!(db, db.query::<Value>("good").max_memory(0));
    assert!(text_of(&error, ErrorKind::Config).contains("invalid max_memory 0"), "{error}");
}

#[tokio::test]
async fn invalid_entity_names_are_rejected() {
    let database = database("");
    let mut db = database.connect().await;
    for entity in ["", ".", "a..b", "\"a", "a\0b"] {
        let error = refusal!(db, db.query::<Value>(entity));
        let text = text_of(&error, ErrorKind::Config);
        assert!(text.contains("invalid entity") && text.contains("schema.name"), "{text}");
    }
}

#[tokio::test]
async fn limit_above_bigint_is_an_error() {
    let database = table(3, 0);
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("t").limit(u64::MAX).stream().await.unwrap();
    let error = within(SOON, stream.next()).await.unwrap().unwrap_err();
    assert!(text_of(&error, ErrorKind::Query).contains("bigint out of range"), "{error}");
}

#[tokio::test]
async fn invalid_connection_string_is_rejected_without_showing_it() {
    for connection in [
        "",
        "garbage s3cr3t",
        "postgres://",
        "postgres://me:s3cr3t@host:port/shop",
        "postgres://me:s3cr3t@host/shop?connect_timeout=s3cr3t",
        "http://me:s3cr3t@host/shop",
        "host=h user=me password=s3cr3t extra s3cr3t",
        "host=h user=me passwort=s3cr3t",
        "host=a,b hostaddr=127.0.0.1 user=me password=s3cr3t",
        "host=a,b,c port=1,2 user=me password=s3cr3t",
        "user=me password=s3cr3t",
    ] {
        let error = within(SOON, Connection::connect(connection)).await.unwrap_err();
        let text = text_of(&error, ErrorKind::Config);
        assert!(text.starts_with("invalid con"), "{connection:?}: {text}");
        assert!(!all_of(&error).contains("s3cr3t"), "{connection:?}: {}", all_of(&error));
    }
}

#[tokio::test]
async fn nul_byte_in_a_condition_is_rejected_and_the_connection_is_kept() {
    let database = database("");
    let mut db = database.connect().await;
    let error = refusal!(db, db.query::<Doc>("good").where_sql("data->>'id' = 'a\0b'", &[]));
    assert!(text_of(&error, ErrorKind::Config).contains("NUL byte"), "{error}");
}
