//! What callers can rely on for every error: its kind, its text, and the error underneath.

use std::error::Error as StdError;
use std::pin::pin;

use fraiseql_stream::{Connection, Error, ErrorKind, tokio_postgres};
use futures_util::StreamExt;
use serde_json::Value;

use crate::proxy::Proxy;
use crate::server::{Database, Doc, ENDLESS, SOON, backend_pid, table, table_script, within};

macro_rules! error_of {
    ($query:expr) => {
        within(SOON, $query.stream()).await.map(drop).unwrap_err()
    };
}

#[tokio::test]
async fn config_error_means_that_nothing_was_sent() {
    let (database, proxy) = (table(1, 0), Proxy::start().await);
    let mut db = Connection::connect(&proxy.url(&database)).await.unwrap();
    proxy.take_messages();
    let errors = [
        error_of!(db.query::<Doc>("t.")),
        error_of!(db.query::<Doc>("t").where_sql("id = 1\0", &[])),
        error_of!(db.query::<Doc>("t").chunk_size(0)),
        error_of!(db.query::<Doc>("t").max_memory(0)),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
    assert_eq!(proxy.take_messages(), "");
}

#[tokio::test]
async fn statement_error_means_that_the_statement_was_prepared_but_not_run() {
    let script = format!("{} CREATE TABLE texts AS SELECT '{{}}'::text AS data", table_script("t", 1, 0));
    let (database, proxy) = (Database::with(&script), Proxy::start().await);
    let mut db = Connection::connect(&proxy.url(&database)).await.unwrap();
    proxy.take_messages();
    let errors = [
        error_of!(db.query::<Doc>("texts")),
        error_of!(db.query::<Doc>("t").where_sql("id = $1", &[])),
        error_of!(db.query::<Doc>("t").where_sql("id = $1", &[&"1"])),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Statement, "{error}");
    }
    let messages = proxy.take_messages();
    assert!(messages.contains('P') && !messages.contains('B'), "{messages}");
}

/// Fails unless the error's text contains the text of the underlying error, and `source` does not repeat it.
fn assert_complete(error: &Error, kind: ErrorKind) {
    assert_eq!(error.kind(), kind, "{error}");
    assert!(StdError::source(error).is_none(), "{error}");
    let cause = error.get_ref().unwrap();
    let text = match cause.downcast_ref::<tokio_postgres::Error>() {
        Some(client) => client.as_db_error().map_or_else(
            || client.source().map_or_else(|| client.to_string(), ToString::to_string),
            |db| db.message().to_owned(),
        ),
        None => cause.to_string(),
    };
    assert!(error.to_string().contains(&text), "{error} lacks {text}");
    assert!(format!("{error:?}").ends_with(&error.to_string()), "{error:?}");
}

#[tokio::test]
async fn error_text_contains_its_cause_and_source_does_not_repeat_it() {
    let refused = Connection::connect("postgres://app@127.0.0.1:1/shop").await.unwrap_err();
    assert_complete(&refused, ErrorKind::Connect);

    let database = Database::with(&format!("{ENDLESS} CREATE TABLE t AS SELECT '\"x\"'::jsonb AS data"));
    let mut db = database.connect().await;
    let unknown = error_of!(db.query::<Value>("nowhere"));
    assert_complete(&unknown, ErrorKind::Query);
    assert_eq!(unknown.as_db_error().unwrap().message(), r#"relation "nowhere" does not exist"#);

    let mut stream = db.query::<Doc>("t").stream().await.unwrap();
    let decode = within(SOON, stream.next()).await.unwrap().unwrap_err();
    assert_complete(&decode, ErrorKind::Decode { row: 0 });
    assert!(decode.get_ref().unwrap().is::<serde_json::Error>());
    drop(stream);

    let pid = backend_pid(&mut db).await;
    let stream = db.query::<Value>("endless").stream().await.unwrap();
    database.admin().await.run("pg_terminate_backend", pid).await;
    let errors = stream.filter_map(async |row| row.err());
    let lost = within(SOON, pin!(errors).next()).await.unwrap();
    assert_complete(&lost, ErrorKind::Disconnected);
}

#[tokio::test]
async fn error_of_an_owned_stream_follows_the_same_contract() {
    let db = table(1, 0).connect().await;
    let error = within(SOON, db.into_query::<Value>("nowhere").stream()).await.map(drop).unwrap_err();
    assert!(error.source().is_none());
    assert_eq!(error.to_string(), error.error().to_string());
}
