//! The short examples run against a real Postgres and print what they promise.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use backends::Postgres;

fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start().expect("the server starts"))
}

/// Creates a database with 1,000 orders and returns its connection string.
fn database(name: &str) -> String {
    let url = server().create_database(name).expect("the database is created");
    let script =
        "CREATE TABLE orders AS SELECT jsonb_build_object('id', i) AS data FROM generate_series(1, 1000) i";
    server().psql(name, script).expect("the SQL is valid");
    url
}

/// Builds all examples once, in the same profile as this test, and returns the folder with the executables.
fn programs() -> &'static PathBuf {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // The variables that cargo sets for a test would make it rebuild some dependencies, and again for the next test.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| text.starts_with(prefix)) {
                cargo.env_remove(name);
            }
        }
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args(["build", "--quiet", "--all-features", "--examples"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo runs").success(), "the examples do not build");
        // This test is target/<profile>/deps/examples-<hash>; the examples are in target/<profile>/examples.
        let test = std::env::current_exe().expect("the path of this test");
        test.ancestors().nth(2).expect("the folder of the profile").join("examples")
    })
}

fn example(name: &str, url: &str) -> Command {
    let mut command = Command::new(programs().join(name));
    command.env("DATABASE_URL", url);
    command
}

/// Runs an example to its end and returns its standard output.
fn output_of(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("the example runs");
    let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(status.success(), "{stdout}{stderr}");
    stdout
}

#[test]
fn basic_prints_a_sum_and_the_statistics() {
    let output = output_of(&mut example("basic", &database("basic")));
    assert!(output.contains("last open order: 100000; total of all open orders: 1250025000"), "{output}");
    assert!(output.contains("orders: 50,000 rows, "), "{output}");
}

#[test]
fn spawned_task_gives_the_connection_back() {
    let output = output_of(&mut example("spawned_task", &database("spawned_task")));
    assert!(output.contains("orders: 1,000 rows, "), "{output}");
    assert!(output.contains("the connection can be used again: 100000 orders"), "{output}");
}

#[test]
fn own_providers_export_metrics_and_the_query_span() {
    let output = output_of(example("own_providers", &database("own_providers")).arg("orders"));
    assert!(output.contains(": fraiseql_channel_occupancy_rows\n"), "{output}");
    assert!(output.contains(": SELECT orders\n"), "{output}");
}

#[test]
fn axum_body_streams_all_rows() {
    let mut command = example("axum_body", &database("axum_body"));
    let mut service = command.arg("127.0.0.1:0").stderr(Stdio::piped()).spawn().expect("the example runs");
    let mut line = String::new();
    BufReader::new(service.stderr.take().expect("it is piped")).read_line(&mut line).expect("a line");
    let body = get(line.trim().strip_prefix("listening on ").expect("the address"));
    service.kill().expect("it runs");
    service.wait().expect("it is killed");
    let rows: Vec<_> = body.lines().collect();
    assert_eq!((rows.len(), rows[0], rows[999]), (1_000, r#"{"id": 1}"#, r#"{"id": 1000}"#));
}

/// Returns the body of `/orders`.
fn get(address: &str) -> String {
    let mut socket = TcpStream::connect(address).expect("the service listens");
    socket.write_all(b"GET /orders HTTP/1.0\r\n\r\n").expect("the request is sent");
    let mut response = String::new();
    socket.read_to_string(&mut response).expect("the response ends");
    assert!(response.starts_with("HTTP/1.0 200 OK\r\n"), "{response}");
    response.split_once("\r\n\r\n").expect("a body").1.to_owned()
}
