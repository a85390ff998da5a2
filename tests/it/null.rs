//! SQL NULL in `data`.

use fraiseql_stream::{ErrorKind, RawJson};
use futures_util::StreamExt;
use serde_json::Value;

use crate::server::{Database, Doc, SOON, rows_of, within};

/// Three rows, the middle one NULL.
fn database() -> Database {
    Database::with(
        r#"CREATE TABLE t (id int, data jsonb); INSERT INTO t VALUES (0, '{"id": 0}'), (1, NULL), (2, '{"id": 2}');
           CREATE TABLE j (id int, data json); INSERT INTO j VALUES (0, NULL), (1, 'null')"#,
    )
}

#[tokio::test]
async fn null_decodes_into_none() {
    let database = database();
    let mut db = database.connect().await;
    let rows: Vec<Option<Doc>> = rows_of(db.query("t").order_by("id").stream().await.unwrap()).await;
    assert_eq!(rows, [Some(Doc { id: 0 }), None, Some(Doc { id: 2 })]);
}

#[tokio::test]
async fn null_decodes_into_json_null_as_a_value_and_as_raw_json() {
    let database = database();
    let mut db = database.connect().await;
    for entity in ["t", "j"] {
        let values: Vec<Value> = rows_of(db.query(entity).order_by("id").stream().await.unwrap()).await;
        let raw: Vec<RawJson> = rows_of(db.query(entity).order_by("id").stream().await.unwrap()).await;
        let null = usize::from(entity == "t");
        assert_eq!(values[null], Value::Null, "{entity}");
        assert_eq!(raw[null].as_bytes(), b"null", "{entity}");
    }
    // A JSON null looks the same.
    let raw: Vec<RawJson> = rows_of(db.query("j").order_by("id").stream().await.unwrap()).await;
    assert_eq!(raw[1].as_bytes(), b"null");
}

#[tokio::test]
async fn null_is_a_decode_error_for_other_types_and_the_stream_continues() {
    let database = database();
    let mut db = database.connect().await;
    let mut stream = db.query::<Doc>("t").order_by("id").stream().await.unwrap();
    assert_eq!(within(SOON, stream.next()).await.unwrap().unwrap(), Doc { id: 0 });
    let error = within(SOON, stream.next()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode { row: 1 });
    let text = error.to_string();
    assert!(text.starts_with("t: row 1: ") && text.contains("Option<T>"), "{text}");
    assert_eq!(within(SOON, stream.next()).await.unwrap().unwrap(), Doc { id: 2 });
    assert!(within(SOON, stream.next()).await.is_none());
    let stats = stream.stats();
    assert_eq!((stats.rows, stats.failed), (2, 1));
}
