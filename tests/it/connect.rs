//! Connecting: every form of address works, and an error says what to change.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use fraiseql_stream::tokio_postgres::Config;
use fraiseql_stream::tokio_postgres::config::SslMode;
use fraiseql_stream::{Connection, Error, ErrorKind};

use crate::server::{Database, SOON, all_of, backend_pid, connect, scalar, shared, within};

async fn refusal(connection: &str) -> Error {
    match within(SOON, Connection::connect(connection)).await {
        Ok(connected) => panic!("connecting must fail: {connected:?}"),
        Err(error) => error,
    }
}

/// Connects and returns the name of the current database.
async fn current_database(connection: &str) -> String {
    scalar(&mut connect(connection).await, "SELECT current_database()::text").await
}

#[tokio::test]
async fn url_connects() {
    let database = Database::with("");
    assert_eq!(current_database(&database.url).await, database.name);
}

#[tokio::test]
async fn key_value_string_connects() {
    let database = Database::with("");
    let connection = format!(
        "host=127.0.0.1 port={} user=postgres password='{}' dbname={}",
        shared().port(),
        shared().password(),
        database.name
    );
    assert_eq!(current_database(&connection).await, database.name);
}

#[tokio::test]
async fn config_connects() {
    let database = Database::with("");
    let config: Config = database.url.parse().unwrap();
    let by_reference = Connection::connect(&config).await.unwrap();
    let by_value = Connection::builder(config).connect().await.unwrap();
    for mut db in [by_reference, by_value] {
        let name: String = scalar(&mut db, "SELECT current_database()::text").await;
        assert_eq!(name, database.name);
    }
}

#[tokio::test]
async fn config_that_is_not_supported_is_rejected() {
    let (mut no_host, mut tls) = (Config::new(), Config::new());
    let no_host = no_host.user("app");
    let tls = tls.host("localhost").ssl_mode(SslMode::Require);
    for (config, text) in [(no_host, "it names no host"), (tls, "sslmode=require is not supported")] {
        let error = within(SOON, Connection::connect(config)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn closing_without_a_runtime_is_an_error_and_closes() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let database = Database::with("");
    let (db, pid) = runtime.block_on(async {
        let mut db = connect(&database.url).await;
        let pid = backend_pid(&mut db).await;
        (db, pid)
    });
    let error = futures::executor::block_on(db.close()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    runtime.block_on(async { database.admin().await.until(pid, |activity| activity.is_none()).await });
}

#[test]
fn connecting_without_a_runtime_is_an_error() {
    let error = futures::executor::block_on(Connection::connect("postgres://localhost/shop")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().starts_with("there is no tokio runtime"), "{error}");
}

#[tokio::test]
async fn unix_socket_connects() {
    let database = Database::with("");
    let mut db = connect(&database.socket()).await;
    let is_socket: bool = scalar(&mut db, "SELECT inet_server_addr() IS NULL").await;
    assert!(is_socket);
}

#[tokio::test]
async fn url_of_a_unix_socket_connects() {
    let database = Database::with("");
    let dir = shared().socket_dir().to_str().unwrap().replace('/', "%2F");
    let url =
        format!("postgres://postgres:{}@{dir}:{}/{}", shared().password(), shared().port(), database.name);
    assert_eq!(current_database(&url).await, database.name);
}

#[tokio::test]
async fn first_reachable_host_is_used() {
    let database = Database::with("");
    let (port, password) = (shared().port(), shared().password());
    let by_keys = format!(
        "host=127.0.0.1,127.0.0.1 port=1,{port} user=postgres password={password} dbname={}",
        database.name
    );
    assert_eq!(current_database(&by_keys).await, database.name);
    let by_url = format!("postgres://postgres:{password}@127.0.0.1:1,127.0.0.1:{port}/{}", database.name);
    assert_eq!(current_database(&by_url).await, database.name);
}

#[tokio::test]
async fn settings_in_the_connection_string_reach_the_session() {
    let database = Database::with("");
    let url = format!("{}?application_name=mine&options=-c%20work_mem%3D7MB", database.url);
    let mut db = connect(&url).await;
    let name: String = scalar(&mut db, "SELECT current_setting('application_name')").await;
    let memory: String = scalar(&mut db, "SELECT current_setting('work_mem')").await;
    assert_eq!((name.as_str(), memory.as_str()), ("mine", "7MB"));
}

#[tokio::test]
async fn sslmodes_that_allow_plaintext_connect() {
    let database = Database::with("");
    for mode in ["disable", "prefer"] {
        assert_eq!(current_database(&format!("{}?sslmode={mode}", database.url)).await, database.name);
    }
}

#[tokio::test]
async fn sslmode_that_requires_tls_is_rejected_before_anything_is_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    for mode in ["require", "verify-ca", "verify-full"] {
        for connection in [
            format!("postgres://me:s3cr3t@127.0.0.1:{port}/shop?sslmode={mode}"),
            format!("host=127.0.0.1 port={port} user=me password=s3cr3t sslmode={mode}"),
        ] {
            let error = refusal(&connection).await;
            assert_eq!(error.kind(), ErrorKind::Config);
            let text = error.to_string();
            assert!(text.contains(&format!("sslmode={mode}")) && text.contains("TLS"), "{text}");
            assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
        }
    }
    let visit = listener.accept();
    assert_eq!(visit.unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nothing may connect");
}

#[tokio::test]
async fn unreachable_host_is_reported_with_its_address_and_cause() {
    let error = refusal("postgres://me:s3cr3t@127.0.0.1:1/shop").await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    let text = error.to_string();
    assert!(text.contains("127.0.0.1:1") && text.contains("refused"), "{text}");
    assert!(text.contains("check host and port"), "what to change: {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
}

#[tokio::test]
async fn host_name_that_does_not_resolve_is_reported() {
    let error = refusal("postgres://me:s3cr3t@no-such-host.invalid/shop").await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(error.to_string().contains("no-such-host.invalid"), "{error}");
    assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
}

#[tokio::test]
async fn missing_unix_socket_is_reported_with_its_path() {
    let error = refusal("host=/no/such/dir user=me password=s3cr3t").await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    let text = error.to_string();
    assert!(text.contains("/no/such/dir/.s.PGSQL.5432"), "{text}");
    assert!(text.contains("No such file or directory"), "{text}");
    assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
}

#[tokio::test]
async fn connecting_to_an_unresponsive_host_fails_after_connect_timeout() {
    // The kernel completes the handshake, but nothing ever reads.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let start = Instant::now();
    let error = refusal(&format!("postgres://me:s3cr3t@127.0.0.1:{port}/shop?connect_timeout=1")).await;
    let took = start.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_secs(3)).contains(&took), "{took:?}");
    assert_eq!(error.kind(), ErrorKind::Connect);
    let text = error.to_string();
    assert!(text.contains(&format!("127.0.0.1:{port}")) && text.contains("1 s"), "{text}");
    assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
}

#[tokio::test]
async fn server_that_speaks_another_protocol_is_a_connect_error() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        let (mut socket, _) = listener.accept().await.unwrap();
        let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    });
    let connection = format!("postgres://me:s3cr3t@127.0.0.1:{port}/shop?connect_timeout=2");
    let error = refusal(&connection).await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");
    assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
}

#[tokio::test]
async fn wrong_password_is_reported_with_its_user_and_never_shown() {
    let port = shared().port();
    let error = refusal(&format!("postgres://postgres:s3cr3t@127.0.0.1:{port}/postgres")).await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert_eq!(error.sqlstate().unwrap().code(), "28P01");
    let text = error.to_string();
    assert!(text.contains("password authentication failed for user \"postgres\""), "{text}");
    assert!(text.contains("check user and password"), "what to change: {text}");
    assert!(text.contains(&format!("127.0.0.1:{port}")), "{text}");
    assert!(!all_of(&error).contains("s3cr3t"), "{}", all_of(&error));
}

#[tokio::test]
async fn missing_password_is_reported() {
    let port = shared().port();
    let error = refusal(&format!("postgres://postgres@127.0.0.1:{port}/postgres")).await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(error.to_string().contains("password missing"), "{error}");
}

#[tokio::test]
async fn unknown_database_is_reported() {
    let error = refusal(&shared().url_for("no_such_database")).await;
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert_eq!(error.sqlstate().unwrap().code(), "3D000");
    assert!(error.to_string().contains("no_such_database"), "{error}");
    assert!(!all_of(&error).contains(shared().password()), "{}", all_of(&error));
}

#[tokio::test]
async fn debug_output_never_shows_the_password_or_a_value() {
    let database = Database::with("CREATE VIEW v AS SELECT '1'::jsonb AS data");
    let password = shared().password();
    let hidden = |shown: String| {
        assert!(!shown.contains(password), "the password shows: {shown}");
        assert!(!shown.contains("a-value"), "a value shows: {shown}");
    };
    let builder = Connection::builder(&database.url);
    hidden(format!("{builder:?} {builder:#?}"));
    let mut db = builder.connect().await.unwrap();
    hidden(format!("{db:?} {db:#?}"));
    let query = db.query::<serde_json::Value>("v").where_sql("$1 = 'a'", &[&"a-value"]);
    hidden(format!("{query:?} {query:#?}"));
    let stream = query.stream().await.unwrap();
    hidden(format!("{stream:?} {stream:#?} {:?} {}", stream.observer(), stream.stats()));
    let owned = Connection::connect(&database.socket()).await.unwrap();
    hidden(format!("{owned:?}"));
    hidden(format!("{:?}", owned.into_query::<u32>("v")));
}

#[tokio::test]
async fn dropped_connection_ends_its_backend() {
    let database = Database::with("");
    let admin = database.admin().await;
    let mut db = database.connect().await;
    let pid = backend_pid(&mut db).await;
    drop(db);
    admin.until(pid, |now| now.is_none()).await;
}
