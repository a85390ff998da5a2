//! Statements are prepared once and cached; the only visible effect is the time saved.

use fraiseql_stream::tokio_postgres::error::SqlState;
use fraiseql_stream::tokio_postgres::types::ToSql;
use fraiseql_stream::{Connection, Error, ErrorKind, Query};
use futures_util::StreamExt;
use serde_json::Value;

use crate::proxy::Proxy;
use crate::server::{
    Database, Doc, ENDLESS, SOON, connect, ids, read_all, rows_of, scalar, table, table_script, within,
};

/// Selects the statements of streams that are prepared on a connection, and how often each was run.
const PREPARED: &str = "SELECT coalesce(string_agg(statement || ': ' || generic_plans + custom_plans, '; ' ORDER BY statement), '')
    FROM pg_prepared_statements WHERE statement LIKE 'SELECT data FROM%'";

async fn prepared(db: &mut Connection) -> String {
    scalar(db, PREPARED).await
}

async fn run(db: &mut Connection, script: &str) {
    within(SOON, within(SOON, db.client()).await.unwrap().batch_execute(script)).await.unwrap();
}

/// Runs a query, which may fail before the stream starts or with its first item.
async fn outcome(query: Query<'_, Doc, &mut Connection>) -> Result<Vec<u64>, Error> {
    let mut stream = within(SOON, query.stream()).await?;
    match read_all(&mut stream).await {
        (rows, None) => Ok(ids(&rows)),
        (_, Some(error)) => Err(error),
    }
}

fn all<'a>(db: &'a mut Connection, entity: &str) -> Query<'a, Doc, &'a mut Connection> {
    db.query(entity).order_by("data::jsonb")
}

/// Returns the ids of an entity's rows up to `id`.
async fn up_to(db: &mut Connection, entity: &str, id: i32) -> Vec<u64> {
    let query = db.query(entity).where_sql("(data->>'id')::int <= $1", &[&id]).order_by("data->>'id'");
    outcome(query).await.unwrap_or_else(|error| panic!("{error}"))
}

fn sqlstate(error: &Error) -> (ErrorKind, &str) {
    (error.kind(), error.sqlstate().map_or("", SqlState::code))
}

#[tokio::test]
async fn repeated_query_takes_one_round_trip() {
    let (database, proxy) = (table(10, 0), Proxy::start().await);
    let mut db = connect(&proxy.url(&database)).await;
    proxy.take_messages();
    assert_eq!(up_to(&mut db, "t", 2).await, [0, 1, 2]);
    assert_eq!(proxy.take_messages(), "PDSBES", "prepared and run");
    for id in 0..8 {
        assert_eq!(up_to(&mut db, "t", id).await.len(), usize::try_from(id).unwrap() + 1);
        assert_eq!(proxy.take_messages(), "BES", "only run");
    }
    assert!(prepared(&mut db).await.ends_with(": 9"), "a single statement");
}

#[tokio::test]
async fn without_a_cache_each_query_is_prepared_and_closed() {
    let (database, proxy) = (table(10, 0), Proxy::start().await);
    let mut db = Connection::builder(proxy.url(&database)).statement_cache(0).connect().await.unwrap();
    proxy.take_messages();
    for _ in 0..3 {
        assert_eq!(up_to(&mut db, "t", 2).await, [0, 1, 2]);
    }
    within(SOON, db.client()).await.unwrap();
    // Whether the last statement is closed already depends on the runtime.
    let messages = proxy.take_messages();
    assert_eq!(messages.trim_end_matches("CS"), "PDSBESCSPDSBESCSPDSBES");
    assert_eq!(prepared(&mut db).await, "");
}

#[tokio::test]
async fn without_a_cache_no_statement_is_left_behind_however_the_stream_ends() {
    let broken =
        "CREATE VIEW broken AS SELECT to_jsonb(1 / (i - 5)) AS data FROM generate_series(1, 9) i;
         CREATE VIEW broken_in_plan AS SELECT to_jsonb(1 / 0) AS data; CREATE VIEW number AS SELECT 1 AS data;";
    let database = Database::with(&format!("{ENDLESS} {broken} {}", table_script("t", 10, 0)));
    let mut db = Connection::builder(&database.url).statement_cache(0).connect().await.unwrap();
    let entities = ["t", "endless", "broken", "broken_in_plan", "number", "nowhere"];
    for (entity, rows) in entities.iter().flat_map(|entity| [0, 1, 1_000].map(|rows| (entity, rows))) {
        if let Ok(stream) = db.query::<Value>(entity).stream().await {
            within(SOON, stream.take(rows).count()).await;
        }
        assert_eq!(prepared(&mut db).await, "", "{entity}");
    }
}

#[tokio::test]
async fn least_recently_used_statement_is_evicted() {
    let tables = ["a", "b", "c"].map(|name| table_script(name, 3, 0)).concat();
    let database = Database::with(&tables);
    let mut db = Connection::builder(&database.url).statement_cache(2).connect().await.unwrap();
    for entity in ["a", "b", "a", "c"] {
        assert_eq!(rows_of(db.query::<Doc>(entity).stream().await.unwrap()).await.len(), 3);
    }
    assert_eq!(prepared(&mut db).await, "SELECT data FROM \"a\": 2; SELECT data FROM \"c\": 1");
    assert_eq!(rows_of(db.query::<Doc>("b").stream().await.unwrap()).await.len(), 3);
    assert_eq!(prepared(&mut db).await, "SELECT data FROM \"b\": 1; SELECT data FROM \"c\": 1");
}

#[tokio::test]
async fn statement_of_a_dropped_stream_is_reused() {
    let database = Database::with(ENDLESS);
    let mut db = database.connect().await;
    for rows in [0, 1, 1_000, 0, 20_000] {
        let mut stream = within(SOON, db.query::<Doc>("endless").stream()).await.unwrap();
        for id in 0..rows {
            assert_eq!(within(SOON, stream.next()).await.unwrap().unwrap().id, id);
        }
    }
    assert_eq!(prepared(&mut db).await, "SELECT data FROM \"endless\": 5");
}

#[tokio::test]
async fn values_may_change_between_runs_and_be_null() {
    let database = Database::with(
        "CREATE TABLE t AS SELECT i AS id, CASE WHEN i > 2 THEN 'n' || i END AS name, jsonb_build_object('id', i) AS data
             FROM generate_series(0, 4) i",
    );
    let mut db = database.connect().await;
    // Often enough for Postgres to switch to a generic plan.
    for _ in 0..10 {
        for (name, expected) in
            [(None, vec![0, 1, 2]), (Some("n3"), vec![3]), (Some("n4"), vec![4]), (Some(""), vec![])]
        {
            let query = db.query::<Doc>("t").where_sql("name IS NOT DISTINCT FROM $1", &[&name]);
            let rows = rows_of(query.order_by("id").stream().await.unwrap()).await;
            assert_eq!(ids(&rows), expected, "{name:?}");
        }
    }
    assert!(prepared(&mut db).await.ends_with(": 40"));
}

/// Tables and a view of two documents with the ids 1 and 2.
const DOCUMENTS: &str = r#"CREATE TABLE t (data json, line int);
    INSERT INTO t VALUES ('{"id": 1}', 1), ('{"id": 2}', 2);
    CREATE VIEW v AS SELECT data::jsonb AS data FROM t; CREATE TABLE plain AS TABLE t;"#;

#[tokio::test]
async fn schema_change_between_two_runs_goes_unnoticed() {
    let database = Database::with(DOCUMENTS);
    let mut db = database.connect().await;
    let changes = [
        ("plain", "ALTER TABLE plain ALTER data TYPE jsonb", vec![1, 2]),
        ("plain", "ALTER TABLE plain ALTER data TYPE json", vec![1, 2]),
        ("plain", "ALTER TABLE plain DROP line; ALTER TABLE plain ADD note text DEFAULT 'x'", vec![1, 2]),
        ("plain", "DROP TABLE plain; CREATE TABLE plain AS SELECT data FROM t WHERE line = 2", vec![2]),
        ("plain", "ALTER TABLE plain RENAME TO old; CREATE TABLE plain AS TABLE v", vec![1, 2]),
        ("v", "DROP VIEW v; CREATE VIEW v AS SELECT data FROM t WHERE line < 2", vec![1]),
        ("v", "DROP VIEW v; CREATE VIEW v AS SELECT data::jsonb AS data FROM t", vec![1, 2]),
        ("v", "CREATE OR REPLACE VIEW v AS SELECT data::jsonb AS data FROM t WHERE line = 2", vec![2]),
        ("v", "DROP VIEW v; CREATE TABLE v AS TABLE t", vec![1, 2]),
    ];
    for (entity, change, expected) in changes {
        up_to(&mut db, entity, 9).await;
        database.psql(change);
        for _ in 0..2 {
            assert_eq!(up_to(&mut db, entity, 9).await, expected, "{change}");
        }
    }
}

#[tokio::test]
async fn deallocated_statements_are_prepared_again() {
    let (database, proxy) = (Database::with(DOCUMENTS), Proxy::start().await);
    let mut db = connect(&proxy.url(&database)).await;
    for script in ["DISCARD ALL", "DEALLOCATE ALL", "DISCARD PLANS"] {
        assert_eq!(up_to(&mut db, "t", 9).await, [1, 2]);
        run(&mut db, script).await;
        assert_eq!(up_to(&mut db, "t", 1).await, [1], "{script}");
        // This is sent after everything for the old statement, and the next stream waits for it.
        run(&mut db, "SELECT 1").await;
        proxy.take_messages();
        for expected in ["SBES", "BES"] {
            assert_eq!(up_to(&mut db, "t", 2).await, [1, 2], "{script}");
            assert_eq!(proxy.take_messages(), expected, "cached again after {script}");
        }
    }
}

#[tokio::test]
async fn statement_deallocated_inside_a_transaction_is_reported_as_such() {
    let database = Database::with(DOCUMENTS);
    let mut db = database.connect().await;
    run(&mut db, "BEGIN").await;
    assert_eq!(up_to(&mut db, "t", 9).await, [1, 2]);
    run(&mut db, "DEALLOCATE ALL").await;
    let again = db.query("t").where_sql("(data->>'id')::int <= $1", &[&9]).order_by("data->>'id'");
    let error = outcome(again).await.unwrap_err();
    assert_eq!(sqlstate(&error), (ErrorKind::Query, "26000"));
    assert!(error.to_string().contains("do not run DEALLOCATE or DISCARD inside a transaction"), "{error}");
}

#[tokio::test]
async fn type_lookup_that_discard_has_broken_is_reported_with_the_advice_to_connect_again() {
    let script = "CREATE TYPE one AS ENUM ('a'); CREATE TYPE two AS ENUM ('b');
        CREATE TABLE enums AS SELECT 'a'::one AS one, 'b'::two AS two, '{\"id\": 1}'::jsonb AS data";
    let database = Database::with(script);
    let mut db = database.connect().await;
    assert_eq!(outcome(all(&mut db, "enums").where_sql("one = $1::text::one", &[&"a"])).await.unwrap(), [1]);
    let text = "one = $1 OR data IS NULL";
    let _ = outcome(all(&mut db, "enums").where_sql(text, &[&"a"])).await;
    run(&mut db, "DISCARD ALL").await;
    let error = outcome(all(&mut db, "enums").where_sql("two = $1", &[&"b"])).await.unwrap_err();
    assert_eq!(sqlstate(&error), (ErrorKind::Query, "26000"), "{error}");
    assert!(error.to_string().contains("connect again"), "{error}");
}

#[tokio::test]
async fn statement_follows_the_search_path() {
    let database = Database::with(
        r#"CREATE SCHEMA one; CREATE SCHEMA two; CREATE SCHEMA none;
           CREATE TABLE one.doc AS SELECT '{"id": 1}'::jsonb AS data;
           CREATE TABLE two.doc AS SELECT '{"id": 2}'::json AS data;"#,
    );
    let mut db = database.connect().await;
    for (path, expected) in [("one", 1), ("two", 2), ("two, one", 2), ("one, two", 1), ("none, one", 1)] {
        run(&mut db, &format!("SET search_path = {path}")).await;
        assert_eq!(up_to(&mut db, "doc", 9).await, [expected], "{path}");
    }
    assert_eq!(outcome(all(&mut db, "doc")).await.unwrap(), [1]);
    run(&mut db, "SET search_path = none").await;
    let error = outcome(all(&mut db, "doc")).await.unwrap_err();
    assert_eq!(sqlstate(&error), (ErrorKind::Query, "42P01"), "{error}");
}

#[tokio::test]
async fn dropped_relation_is_an_error_until_it_is_created_again() {
    let database = Database::with(DOCUMENTS);
    let mut db = database.connect().await;
    for _ in 0..2 {
        assert_eq!(outcome(all(&mut db, "plain")).await.unwrap(), [1, 2]);
        database.psql("DROP TABLE plain");
        for _ in 0..2 {
            let error = outcome(all(&mut db, "plain")).await.unwrap_err();
            assert_eq!(sqlstate(&error), (ErrorKind::Query, "42P01"));
            assert!(error.to_string().contains("an entity is the name of a table or view"), "{error}");
        }
        database.psql("CREATE TABLE plain AS TABLE t");
    }
}

#[tokio::test]
async fn column_that_is_no_longer_json_is_rejected_as_in_a_new_query() {
    let database = Database::with(DOCUMENTS);
    let (mut db, mut other) = (database.connect().await, database.connect().await);
    assert_eq!(outcome(all(&mut db, "plain")).await.unwrap(), [1, 2]);
    database.psql("ALTER TABLE plain ALTER data TYPE text");
    for _ in 0..3 {
        let error = outcome(all(&mut db, "plain")).await.unwrap_err();
        let expected = outcome(all(&mut other, "plain")).await.unwrap_err();
        assert_eq!((error.kind(), expected.kind()), (ErrorKind::Statement, ErrorKind::Statement));
        // The first one also reports how far its stream got.
        let (error, expected) = (error.to_string(), expected.to_string());
        assert!(expected.split("; ").all(|part| error.contains(part)), "{error}, not {expected}");
    }
    database.psql("ALTER TABLE plain ALTER data TYPE json USING data::json");
    assert_eq!(outcome(all(&mut db, "plain")).await.unwrap(), [1, 2]);
}

fn with_line<'a>(db: &'a mut Connection, line: &'a (dyn ToSql + Sync)) -> Query<'a, Doc, &'a mut Connection> {
    all(db, "plain").where_sql("line = $1", &[line])
}

#[tokio::test]
async fn parameter_whose_type_has_changed_accepts_values_of_the_new_type() {
    let database = Database::with(DOCUMENTS);
    let mut db = database.connect().await;
    assert_eq!(outcome(with_line(&mut db, &2_i32)).await.unwrap(), [2]);
    database.psql("ALTER TABLE plain ALTER line TYPE text");
    for _ in 0..2 {
        assert_eq!(outcome(with_line(&mut db, &"2")).await.unwrap(), [2]);
    }
    // As in a new query.
    let error = outcome(with_line(&mut db, &2_i32)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Statement);
    assert!(error.to_string().contains("parameter $1 does not accept the value"), "{error}");
    database.psql("ALTER TABLE plain ALTER line TYPE int USING line::int");
    for _ in 0..2 {
        assert_eq!(outcome(with_line(&mut db, &2_i32)).await.unwrap(), [2]);
    }
}

#[tokio::test]
async fn schema_change_that_breaks_a_transaction_is_a_clear_error() {
    let database = Database::with(DOCUMENTS);
    let mut db = database.connect().await;
    for data in ["jsonb", "json"] {
        assert_eq!(outcome(all(&mut db, "plain")).await.unwrap(), [1, 2]);
        run(&mut db, "BEGIN; UPDATE t SET line = line + 1").await;
        database.psql(&format!("ALTER TABLE plain ALTER data TYPE {data}"));
        let error = outcome(all(&mut db, "plain")).await.unwrap_err();
        assert_eq!(sqlstate(&error), (ErrorKind::Query, "0A000"));
        let text = error.to_string();
        assert!(
            text.contains("the schema changed after the statement was prepared; run the transaction again"),
            "{text}"
        );
        // The change was reported once and is not reported again.
        let error = outcome(all(&mut db, "plain")).await.unwrap_err();
        assert_eq!(sqlstate(&error), (ErrorKind::Query, "25P02"));
        run(&mut db, "ROLLBACK; BEGIN; UPDATE t SET line = line + 1").await;
        assert_eq!(outcome(all(&mut db, "plain")).await.unwrap(), [1, 2]);
        run(&mut db, "COMMIT").await;
    }
    assert_eq!(scalar::<i64>(&mut db, "SELECT sum(line) FROM t").await, 1 + 2 + 2 * 2);
}

#[tokio::test]
async fn schema_change_that_does_not_break_a_transaction_goes_unnoticed() {
    let database = Database::with(DOCUMENTS);
    let mut db = database.connect().await;
    for (entity, change) in [
        ("plain", "ALTER TABLE plain ADD note text"),
        ("v", "DROP VIEW v; CREATE VIEW v AS SELECT data::jsonb AS data FROM plain"),
    ] {
        assert_eq!(outcome(all(&mut db, entity)).await.unwrap(), [1, 2]);
        run(&mut db, "BEGIN; UPDATE t SET line = line + 1").await;
        database.psql(change);
        assert_eq!(outcome(all(&mut db, entity)).await.unwrap(), [1, 2], "{change}");
        run(&mut db, "COMMIT").await;
    }
    assert_eq!(scalar::<i64>(&mut db, "SELECT sum(line) FROM t").await, 1 + 2 + 2 * 2);
}
