//! Rows: all of them, in order, as any type, and byte for byte as Postgres sent them.

use std::task::Poll;

use fraiseql_stream::{Connection, ErrorKind, FromJson, JsonStream, RawJson};
use futures_util::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::server::{
    Database, Doc, ENDLESS, SILENT, SOON, assert_consecutive, backend_pid, ids, read_all, rows_of, scalar,
    table, table_script, within,
};

#[derive(Debug, Deserialize, PartialEq)]
struct Order {
    id: u32,
    lines: Vec<Line>,
    note: Option<String>,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Line {
    sku: String,
    price: f64,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Note {
    note: String,
}

/// A document with spaces, unsorted keys, an escape, a duplicate key and a four-byte character.
const DOCUMENT: &str =
    r#"{ "note":  "caf\u00e9 𝄞", "id" :7, "lines":[{"sku":"a", "price":1.50}],   "id": 7 }"#;

fn documents() -> Database {
    Database::with(&format!(
        "CREATE TABLE as_json (data json); INSERT INTO as_json VALUES ('{DOCUMENT}');
         CREATE TABLE as_jsonb (data jsonb); INSERT INTO as_jsonb VALUES ('{DOCUMENT}');"
    ))
}

#[tokio::test]
async fn json_and_jsonb_decode_into_the_type_of_the_caller() {
    let database = documents();
    let mut db = database.connect().await;
    for entity in ["as_json", "as_jsonb"] {
        let rows: Vec<Note> = rows_of(db.query(entity).stream().await.unwrap()).await;
        assert_eq!(rows, [Note { note: "café 𝄞".to_owned() }], "{entity}");
    }
    let rows: Vec<Order> = rows_of(db.query("as_jsonb").stream().await.unwrap()).await;
    let lines = vec![Line { sku: "a".to_owned(), price: 1.5 }];
    assert_eq!(rows, [Order { id: 7, lines, note: Some("café 𝄞".to_owned()) }]);
}

#[tokio::test]
async fn json_and_jsonb_decode_into_a_value() {
    let database = documents();
    let mut db = database.connect().await;
    for entity in ["as_json", "as_jsonb"] {
        let rows: Vec<Value> = rows_of(db.query(entity).stream().await.unwrap()).await;
        let expected = json!({"id": 7, "note": "café 𝄞", "lines": [{"sku": "a", "price": 1.5}]});
        assert_eq!(rows, [expected], "{entity}");
    }
}

#[tokio::test]
async fn raw_json_holds_the_bytes_that_postgres_sent() {
    let database = documents();
    let mut db = database.connect().await;
    let rows: Vec<RawJson> = rows_of(db.query("as_json").stream().await.unwrap()).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].as_bytes(), DOCUMENT.as_bytes());
    let sent: String = scalar(&mut db, "SELECT data::text FROM as_jsonb").await;
    let rows: Vec<RawJson> = rows_of(db.query("as_jsonb").stream().await.unwrap()).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].as_bytes(), sent.as_bytes());
}

#[tokio::test]
async fn raw_json_is_a_str_only_if_it_is_utf_8() {
    let database = documents();
    let mut db = database.connect().await;
    let rows: Vec<RawJson> = rows_of(db.query("as_json").stream().await.unwrap()).await;
    assert_eq!(rows[0].as_str(), Ok(DOCUMENT));
    database.psql("CREATE VIEW v AS SELECT to_json('café'::text) AS data");
    let script = "SET client_encoding = 'LATIN1'";
    within(SOON, db.client()).await.unwrap().batch_execute(script).await.unwrap();
    let rows: Vec<RawJson> = rows_of(db.query("v").stream().await.unwrap()).await;
    assert_eq!(rows[0].as_bytes(), b"\"caf\xe9\"");
    assert_eq!(rows[0].as_str().unwrap_err().valid_up_to(), 4);
}

#[tokio::test]
async fn hundred_thousand_rows_arrive_in_order_without_loss_or_duplicates() {
    let database = table(100_000, 20);
    let mut db = database.connect().await;
    let sent: i64 = scalar(&mut db, "SELECT sum(length(data::text)) FROM t").await;
    let mut stream = db.query::<Doc>("t").order_by("id").stream().await.unwrap();
    let (rows, error) = read_all(&mut stream).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(rows.len(), 100_000);
    assert_consecutive(&rows);
    let stats = stream.stats();
    assert_eq!((stats.rows, stats.filtered, stats.failed), (100_000, 0, 0));
    assert_eq!(stats.bytes, u64::try_from(sent).unwrap());
    assert_eq!((stats.buffered_rows, stats.buffered_bytes), (0, 0));
    assert!(stream.next().await.is_none(), "the stream stays ended");
}

#[tokio::test]
async fn values_of_several_types_bind_to_numbered_parameters() {
    let database = Database::with(
        "CREATE TABLE t AS SELECT i AS id, i % 2 = 0 AS even, i / 2.0::float8 AS half,
             jsonb_build_object('id', i, 'name', 'n' || i % 10) AS data
         FROM generate_series(0, 99) i",
    );
    let mut db = database.connect().await;
    let (name, low, high, ids_of) = ("n4", 10_i32, 90_i64, vec![14_i32, 24, 34, 35]);
    let query = db
        .query::<Doc>("t")
        .where_sql(
            "data->>'name' = $1 AND id > $2 AND id < $3::int8 AND even = $4 AND half < $5 AND id = ANY($6)",
            &[&name, &low, &high, &true, &17.5_f64, &ids_of],
        )
        .order_by("id");
    assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), [14, 24, 34]);
    let nothing: Option<i32> = None;
    let query = db.query::<Doc>("t").where_sql("id IS NOT DISTINCT FROM $1", &[&nothing]);
    assert!(rows_of(query.stream().await.unwrap()).await.is_empty());
    let contains = r#"{"name": "n7"}"#;
    let query = db.query::<Doc>("t").where_sql("data @> $1::text::jsonb AND id < 20", &[&contains]);
    assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), [7, 17]);
}

#[tokio::test]
async fn parameter_numbers_continue_in_the_second_condition() {
    let database = table(100, 0);
    let mut db = database.connect().await;
    let query = db
        .query::<Doc>("t")
        // The OR must not extend to the other condition.
        .where_sql("id < $1 OR id > $2", &[&10_i32, &90_i32])
        .where_sql("id % $3 = 0", &[&5_i32])
        .order_by("id");
    assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), [0, 5, 95]);
}

#[tokio::test]
async fn values_are_never_interpreted_as_sql() {
    let database = table(3, 0);
    let mut db = database.connect().await;
    let value = "x' OR true; DROP TABLE t; --";
    let query = db.query::<Doc>("t").where_sql("data->>'pad' = $1", &[&value]);
    assert!(rows_of(query.stream().await.unwrap()).await.is_empty());
    assert_eq!(rows_of(db.query::<Doc>("t").stream().await.unwrap()).await.len(), 3);
}

#[tokio::test]
async fn trailing_comment_in_a_clause_does_not_hide_the_rest_of_the_query() {
    let database = table(100, 0);
    let mut db = database.connect().await;
    let query = db
        .query::<Doc>("t")
        .where_sql("id >= $1 -- from here", &[&10_i32])
        .where_sql("id % 10 = 0 -- only tens", &[])
        .order_by("id DESC -- from above")
        .limit(3)
        .offset(1);
    assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), [80, 70, 60]);
}

#[tokio::test]
async fn rows_rejected_by_a_rust_predicate_count_as_filtered() {
    let database = table(1_000, 0);
    let mut db = database.connect().await;
    let mut stream = db
        .query::<Doc>("t")
        .order_by("id")
        .where_rust(|row| row.id % 2 == 0)
        .where_rust(|row| row.id % 5 == 0)
        .stream()
        .await
        .unwrap();
    let (rows, error) = read_all(&mut stream).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(ids(&rows), (0..1_000).step_by(10).collect::<Vec<_>>());
    let stats = stream.stats();
    assert_eq!((stats.rows, stats.filtered, stats.failed), (100, 900, 0));
}

#[tokio::test]
async fn postgres_applies_order_limit_and_offset() {
    let database = table(1_000, 0);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("t").order_by("id % 10").order_by("id DESC").limit(3).offset(1);
    let mut stream = query.stream().await.unwrap();
    let (rows, _) = read_all(&mut stream).await;
    assert_eq!(ids(&rows), [980, 970, 960]);
    let sent: usize = [980, 970, 960].iter().map(|id| format!(r#"{{"id": {id}, "pad": ""}}"#).len()).sum();
    assert_eq!(stream.stats().bytes, sent as u64, "Postgres sends no other rows");
    drop(stream);
    assert!(rows_of(db.query::<Doc>("t").limit(0).stream().await.unwrap()).await.is_empty());
}

#[tokio::test]
async fn chunk_size_does_not_change_the_rows() {
    let database = table(5_000, 10);
    let mut db = database.connect().await;
    for size in [1, 2, 63, 1_000, usize::MAX] {
        let query = db.query::<Doc>("t").order_by("id").chunk_size(size);
        let rows = rows_of(query.stream().await.unwrap()).await;
        assert_eq!(rows.len(), 5_000, "chunk_size {size}");
        assert_consecutive(&rows);
    }
}

#[tokio::test]
async fn next_chunk_returns_the_rows_in_chunks_and_none_at_the_end() {
    let database = table(1_000, 10);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("t").order_by("id").chunk_size(30);
    let mut stream = query.stream().await.unwrap();
    let (mut rows, mut largest) = (Vec::new(), 0);
    while let Some(chunk) = within(SOON, stream.next_chunk()).await.unwrap() {
        largest = largest.max(chunk.len());
        rows.extend(chunk);
    }
    assert_eq!(rows.len(), 1_000);
    assert_consecutive(&rows);
    assert!((2..=30).contains(&largest), "{largest}");
    assert!(stream.next_chunk().await.unwrap().is_none());
}

#[tokio::test]
async fn next_chunk_after_next_returns_the_rest_of_the_chunk() {
    let database = table(100, 10);
    let mut db = database.connect().await;
    let query = db.query::<Doc>("t").order_by("id").chunk_size(10);
    let mut stream = query.stream().await.unwrap();
    let mut rows = vec![stream.next().await.unwrap().unwrap()];
    while let Some(chunk) = within(SOON, stream.next_chunk()).await.unwrap() {
        rows.extend(chunk);
    }
    assert_eq!(rows.len(), 100);
    assert_consecutive(&rows);
}

#[tokio::test]
async fn next_ready_returns_available_rows_without_waiting() {
    let database = Database::with(&format!("{SILENT} {}", table_script("t", 10, 0)));
    let mut db = database.connect().await;
    let mut stream = db.query::<Value>("silent").stream().await.unwrap();
    let before = stream.stats().time;
    for _ in 0..100 {
        assert!(stream.next_ready().is_pending());
        tokio::task::yield_now().await;
    }
    let time = stream.stats().time;
    let waits = [(time.source_wait, before.source_wait), (time.scheduled, before.scheduled)];
    assert!(
        waits.iter().all(|(now, before)| now == before),
        "next_ready does not wait: {before:?}, {time:?}"
    );
    within(SOON, stream.close()).await.unwrap();

    let mut stream = db.query::<Doc>("t").order_by("id").stream().await.unwrap();
    let mut rows = vec![stream.next().await.unwrap().unwrap()];
    while rows.len() < 10 {
        match stream.next_ready() {
            Poll::Ready(row) => rows.push(row.unwrap().unwrap()),
            Poll::Pending => tokio::task::yield_now().await,
        }
    }
    assert_consecutive(&rows);
    assert!(within(SOON, stream.next()).await.is_none());
    assert!(matches!(stream.next_ready(), Poll::Ready(None)), "it has ended");
}

#[tokio::test]
async fn dropping_a_pending_next_loses_no_row() {
    let database = Database::with(&crate::server::trickle("slow", 100, 0.003));
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("slow").stream().await.unwrap();
    let (mut rows, mut timeouts) = (Vec::new(), 0);
    loop {
        let limit = std::time::Duration::from_millis(1);
        match tokio::time::timeout(limit, stream.next()).await {
            Ok(Some(row)) => rows.push(row.unwrap()),
            Ok(None) => break,
            Err(_) => timeouts += 1,
        }
        assert!(timeouts < 100_000);
    }
    assert_eq!(rows.len(), 100);
    assert_consecutive(&rows);
    assert!(timeouts > 0);
}

#[tokio::test]
async fn owned_stream_can_move_into_a_task() {
    fn assert_static<T: Send + 'static>(_: &T) {}
    let database = table(1_000, 0);
    let db = database.connect().await;
    let entity = "t".to_owned();
    let floor = 500_i32;
    let query = db.into_query::<Doc>(&entity).where_sql("id >= $1", &[&floor]).order_by("id");
    let mut stream = query.stream().await.unwrap();
    assert_static(&stream);
    let task = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(row) = stream.try_next().await.unwrap() {
            seen.push(row.id);
        }
        seen
    });
    assert_eq!(within(SOON, task).await.unwrap(), (500..1_000).collect::<Vec<_>>());
}

/// Requires of its rows only what spawning a task requires.
fn spawn_count<T: FromJson + Send + 'static>(mut rows: JsonStream<T>) -> JoinHandle<u64> {
    tokio::spawn(async move {
        while rows.next().await.is_some() {}
        rows.stats().rows
    })
}

async fn count<T: FromJson + Send>(db: &mut Connection, entity: &str) -> u64 {
    let mut rows = db.query::<T>(entity).stream().await.unwrap();
    while rows.next().await.is_some() {}
    rows.stats().rows
}

#[tokio::test]
async fn stream_can_move_into_a_task_in_generic_code() {
    let database = table(1_000, 0);
    let mut db = database.connect().await;
    let counted = tokio::spawn(async move {
        let counts = (count::<Doc>(&mut db, "t").await, count::<RawJson>(&mut db, "t").await);
        (counts, spawn_count(db.into_query::<Value>("t").stream().await.unwrap()).await.unwrap())
    });
    assert_eq!(within(SOON, counted).await.unwrap(), ((1_000, 1_000), 1_000));
}

#[tokio::test]
async fn query_can_start_its_stream_in_a_task() {
    let database = table(10, 0);
    let db = database.connect().await;
    let task = tokio::spawn(async move {
        let stream = db.into_query::<Doc>("t").stream().await.unwrap();
        rows_of(stream).await.len()
    });
    assert_eq!(within(SOON, task).await.unwrap(), 10);
}

#[tokio::test]
async fn close_returns_a_clean_connection() {
    let database = Database::with(&format!("{ENDLESS} {SILENT} {}", table_script("t", 3, 0)));
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    for entity in ["endless", "silent", "t"] {
        let mut stream = db.into_query::<Value>(entity).stream().await.unwrap();
        if entity != "silent" {
            stream.next().await.unwrap().unwrap();
        }
        db = within(SOON, stream.close()).await.unwrap();
        assert_eq!(backend_pid(&mut db).await, pid, "the session is the same after {entity}");
    }
    let mut stream = db.query::<Doc>("t").stream().await.unwrap();
    assert_eq!(read_all(&mut stream).await.0.len(), 3);
    let borrowed = within(SOON, stream.close()).await.unwrap();
    assert_eq!(rows_of(borrowed.query::<Doc>("t").stream().await.unwrap()).await.len(), 3);
}

#[tokio::test]
async fn connection_runs_many_streams_one_after_another() {
    let database = table(500, 0);
    run_many_streams(database.connect().await, 100).await;
    let uncached = Connection::builder(&database.url).statement_cache(0).connect().await.unwrap();
    run_many_streams(uncached, 0).await;
    let few = Connection::builder(&database.url).statement_cache(7).connect().await.unwrap();
    run_many_streams(few, 7).await;
}

/// Runs a hundred queries with different SQL, after which `prepared` statements are left on the server.
async fn run_many_streams(mut db: Connection, prepared: i64) {
    for turn in 0..100_u32 {
        let (low, rows) = (i32::try_from(turn).unwrap(), u64::from(turn) + 1);
        let query = db.query::<Doc>("t").where_sql("id >= $1", &[&low]).order_by("id").limit(rows);
        let expected: Vec<_> = (u64::from(turn)..u64::from(turn) + rows).collect();
        assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), expected);
    }
    // All but the one that counts them.
    let count = "SELECT count(*) - 1 FROM pg_prepared_statements";
    assert_eq!(scalar::<i64>(&mut db, count).await, prepared);
}

#[tokio::test]
async fn client_waits_for_the_clean_up_of_a_dropped_stream() {
    let database = Database::with(&format!("{ENDLESS} {SILENT}"));
    let mut db = database.connect().await;
    for entity in ["endless", "silent"] {
        let stream = db.query::<Value>(entity).stream().await.unwrap();
        drop(stream);
        assert_eq!(scalar::<i32>(&mut db, "SELECT 41 + 1").await, 42, "after {entity}");
    }
}

#[tokio::test]
async fn stream_runs_in_the_transaction_of_the_client() {
    let database = table(3, 0);
    let mut db = database.connect().await;
    let client = db.client().await.unwrap();
    client.batch_execute("BEGIN; DELETE FROM t WHERE id = 1").await.unwrap();
    assert_eq!(ids(&rows_of(db.query("t").order_by("id").stream().await.unwrap()).await), [0, 2]);
    db.client().await.unwrap().batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(ids(&rows_of(db.query("t").order_by("id").stream().await.unwrap()).await), [0, 1, 2]);
}

#[tokio::test]
async fn stream_of_an_empty_table_ends_without_an_error() {
    let database = Database::with("CREATE TABLE t (data jsonb)");
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("t").stream().await.unwrap();
    assert!(within(SOON, stream.next()).await.is_none());
    assert!(stream.observer().is_ended());
    let stats = stream.stats();
    assert_eq!((stats.rows, stats.bytes, stats.buffered_rows), (0, 0, 0));
}

#[tokio::test]
async fn row_that_does_not_decode_is_an_error_with_its_number_and_the_stream_continues() {
    let database = Database::with(
        "CREATE TABLE t AS SELECT i AS id, jsonb_build_object('id', CASE WHEN i % 100 = 7
             THEN to_jsonb('x'::text) ELSE to_jsonb(i) END) AS data FROM generate_series(0, 299) i",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("t").order_by("id").stream().await.unwrap();
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    while let Some(row) = within(SOON, stream.next()).await {
        match row {
            Ok(row) => good.push(row.id),
            Err(error) => bad.push(error),
        }
    }
    assert_eq!(good, (0..300).filter(|id| id % 100 != 7).collect::<Vec<_>>());
    let rows: Vec<_> = bad.iter().map(fraiseql_stream::Error::kind).collect();
    assert_eq!(rows, [7, 107, 207].map(|row| ErrorKind::Decode { row }));
    let text = bad[1].to_string();
    assert!(text.starts_with("t: row 107: ") && text.contains("expected u64"), "{text}");
    assert!(bad[1].stats().is_none(), "the error did not end the stream");
    let stats = stream.stats();
    assert_eq!((stats.rows, stats.failed), (297, 3));
}

#[tokio::test]
async fn next_chunk_returns_the_rows_before_an_error_and_then_the_error() {
    // Every fifth row does not decode, so that errors occur within chunks; the query fails at row 103.
    let database = Database::with(
        "CREATE VIEW v AS SELECT CASE WHEN i % 5 = 4 THEN '{}' ELSE jsonb_build_object('id', i, 'x', 1 / (i - 103)) END AS data FROM generate_series(0, 200) i",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("v").stream().await.unwrap();
    let (mut rows, mut errors) = (Vec::new(), Vec::new());
    loop {
        match within(SOON, stream.next_chunk()).await {
            Ok(Some(chunk)) => rows.extend(chunk),
            Ok(None) => break,
            // All rows before it were returned, and none after it.
            Err(error) => errors.push((error.kind(), (rows.len() + errors.len()) as u64)),
        }
    }
    assert_eq!(ids(&rows), (0..103).filter(|id| id % 5 != 4).collect::<Vec<_>>());
    let (last, decode) = errors.split_last().unwrap();
    assert_eq!(last.0, ErrorKind::Query, "the division by zero");
    assert_eq!(decode.len(), 20);
    assert!(decode.iter().all(|(kind, row)| *kind == ErrorKind::Decode { row: *row }), "{decode:?}");
    assert_eq!(stream.stats().rows, rows.len() as u64);
}

#[tokio::test]
async fn error_held_back_by_next_chunk_is_the_next_item_of_the_stream() {
    let database = Database::with(
        "CREATE VIEW v AS SELECT CASE WHEN i = 3 THEN '{}' ELSE jsonb_build_object('id', i) END AS data FROM generate_series(0, 9) i",
    );
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("v").stream().await.unwrap();
    let first = within(SOON, stream.next_chunk()).await.unwrap().unwrap();
    assert_eq!(ids(&first), [0, 1, 2]);
    let error = within(SOON, stream.next()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode { row: 3 });
    assert_eq!(ids(&rows_of(stream).await), [4, 5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn json_value_is_a_parameter_in_a_transaction_and_twice_in_one_query() {
    let database = table(10, 0);
    let mut db = database.connect().await;
    db.client().await.unwrap().batch_execute("BEGIN").await.unwrap();
    let (wanted, other) = (json!({"id": 7}), json!({"id": 3}));
    for _ in 0..2 {
        let query =
            db.query::<Doc>("t").where_sql("data @> $1 OR data @> $2", &[&wanted, &other]).order_by("id");
        assert_eq!(ids(&rows_of(query.stream().await.unwrap()).await), [3, 7]);
    }
    db.client().await.unwrap().batch_execute("COMMIT").await.unwrap();
}
