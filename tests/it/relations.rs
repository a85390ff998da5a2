//! An entity is the name of a relation and never SQL.

use fraiseql_stream::ErrorKind;
use serde_json::Value;

use crate::server::{Database, Doc, ids, rows_of, scalar, table_script};

#[tokio::test]
async fn views_and_partitions_stream_like_tables() {
    let database = Database::with(&format!(
        "{} CREATE VIEW v AS SELECT data FROM t WHERE id > 7;
            CREATE MATERIALIZED VIEW m AS SELECT data FROM t WHERE id < 2;
            CREATE TABLE whole (data jsonb) PARTITION BY LIST ((data->>'id'));
            CREATE TABLE part PARTITION OF whole DEFAULT;
            INSERT INTO whole SELECT data FROM t WHERE id = 5;",
        table_script("t", 10, 0)
    ));
    let mut db = database.connect().await;
    let cases = [("v", vec![8, 9]), ("m", vec![0, 1]), ("whole", vec![5]), ("part", vec![5])];
    for (entity, expected) in cases {
        let rows = rows_of(db.query::<Doc>(entity).stream().await.unwrap()).await;
        assert_eq!(ids(&rows), expected, "{entity}");
    }
}

#[tokio::test]
async fn entity_name_may_contain_a_schema_upper_case_dots_and_quotes() {
    let database = Database::with(
        r#"CREATE SCHEMA sales; CREATE SCHEMA "My Schema";
           CREATE TABLE sales.orders AS SELECT '{"id": 1}'::jsonb AS data;
           CREATE TABLE "My Schema"."Orders" AS SELECT '{"id": 2}'::jsonb AS data;
           CREATE TABLE "Orders" AS SELECT '{"id": 3}'::jsonb AS data;
           CREATE TABLE orders AS SELECT '{"id": 4}'::jsonb AS data;
           CREATE TABLE "a.dot" AS SELECT '{"id": 5}'::jsonb AS data;
           CREATE TABLE "a""quote" AS SELECT '{"id": 6}'::jsonb AS data;
           CREATE TABLE "select" AS SELECT '{"id": 7}'::jsonb AS data;"#,
    );
    let mut db = database.connect().await;
    let cases = [
        ("sales.orders", 1),
        ("My Schema.Orders", 2),
        (r#""My Schema"."Orders""#, 2),
        ("Orders", 3),
        ("orders", 4),
        (r#""a.dot""#, 5),
        (r#"a"quote"#, 6),
        (r#"public."a""quote""#, 6),
        ("select", 7),
    ];
    for (entity, id) in cases {
        let rows = rows_of(db.query::<Doc>(entity).stream().await.unwrap()).await;
        assert_eq!(ids(&rows), [id], "{entity}");
    }
}

#[tokio::test]
async fn sql_in_place_of_a_name_is_a_relation_that_does_not_exist() {
    let database =
        Database::with("CREATE TABLE x AS SELECT '{}'::jsonb AS data; CREATE TABLE users (data jsonb)");
    let mut db = database.connect().await;
    for entity in [
        "users; drop table x",
        "users\"; drop table x; --",
        "users --",
        "(select '1'::jsonb as data) y",
        "users where true",
    ] {
        let error = db.query::<Value>(entity).stream().await.unwrap_err();
        let text = error.to_string();
        match error.kind() {
            ErrorKind::Query => assert_eq!(error.sqlstate().unwrap().code(), "42P01", "{text}"),
            kind => panic!("{entity}: {kind:?} {text}"),
        }
        assert!(text.contains("does not exist"), "{text}");
    }
    assert_eq!(scalar::<i64>(&mut db, "SELECT count(*) FROM x").await, 1, "x survives");
}
