//! The headers of exports, read from the connection to a real collector.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use backends::Collector;
use serde_json::Value;

use crate::received::Received;
use crate::scenario::Scenario;
use crate::servers::{database, table};

/// What one connection was sent.
type Sent = Arc<Mutex<Vec<u8>>>;

/// Forwards connections to a collector, and keeps what it is sent.
struct Tap {
    endpoint: String,
    connections: Arc<Mutex<Vec<Sent>>>,
}

impl Tap {
    /// Forwards to an endpoint such as `http://127.0.0.1:4318`.
    fn before(endpoint: &str) -> Self {
        let target = endpoint.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&connections);
        std::thread::spawn(move || {
            let clients = listener.incoming().map_while(Result::ok);
            clients
                .for_each(|client| kept.lock().expect("no thread panicked").push(forward(client, &target)));
        });
        Self { endpoint, connections }
    }

    /// Returns what each connection was sent.
    fn sent(&self) -> Vec<Vec<u8>> {
        let connections = self.connections.lock().expect("no thread panicked");
        connections.iter().map(|sent| sent.lock().expect("no copy panicked").clone()).collect()
    }

    /// Returns the text of the HTTP requests for a path, each up to its body.
    fn requests(&self, path: &str) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.sent().concat()).into_owned();
        let requests = text.split("POST ").filter(|request| request.starts_with(path));
        requests.filter_map(|request| request.split("\r\n\r\n").next()).map(str::to_lowercase).collect()
    }
}

/// Forwards a connection in both directions, and returns what the client sends from now on.
fn forward(client: TcpStream, target: &str) -> Sent {
    let server = TcpStream::connect(target).expect("the collector listens");
    let (from, to) = (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
    let sent = Sent::default();
    let kept = Arc::clone(&sent);
    std::thread::spawn(move || copy(from, to, Some(&kept)));
    std::thread::spawn(move || copy(server, client, None));
    sent
}

fn copy(mut from: TcpStream, mut to: TcpStream, kept: Option<&Mutex<Vec<u8>>>) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if let Some(kept) = kept {
            kept.lock().expect("no copy panicked").extend(&buffer[..read]);
        }
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // The other side may have closed it already.
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn each_signal_has_its_own_headers_or_the_general_ones() {
    let collector = Collector::start().unwrap();
    let tap = Tap::before(&collector.http_endpoint());
    let outcome = Scenario::new("environment::one_stream", &database(&table("orders", 1_000)))
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", &tap.endpoint)
        .set("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc%2C1, x-share=5%25")
        // An empty variable counts as unset.
        .set("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "")
        .set("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "x-share=logs")
        .run();
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null));
    assert_eq!(Received::by(&collector).queries("orders").len(), 1);
    for (path, expected, absent) in [
        ("/v1/traces", &["authorization: bearer abc,1", "x-share: 5%"][..], "x-share: logs"),
        ("/v1/metrics", &["authorization: bearer abc,1", "x-share: 5%"], "x-share: logs"),
        ("/v1/logs", &["x-share: logs"], "authorization"),
    ] {
        let requests = tap.requests(path);
        assert!(!requests.is_empty(), "{path}");
        for request in requests {
            let lines: Vec<_> = request.lines().collect();
            assert!(expected.iter().all(|header| lines.contains(header)), "{path}: {request}");
            assert!(!request.contains(absent), "{path}: {request}");
        }
    }
}

/// The letters of this value have codes of 5 bits each in HTTP/2, so that these are its bytes on the wire.
const VALUE: (&str, [u8; 5]) = ("cestoast", [0x21, 0x50, 0x93, 0x8d, 0x09]);

#[test]
fn headers_are_sent_by_grpc_too() {
    let collector = Collector::start().unwrap();
    let tap = Tap::before(&collector.grpc_endpoint());
    let outcome = Scenario::new("environment::one_stream", &database(&table("orders", 1_000)))
        .set("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        .set("OTEL_EXPORTER_OTLP_ENDPOINT", &tap.endpoint)
        .set("OTEL_EXPORTER_OTLP_HEADERS", &format!("x-share={}", VALUE.0))
        // An empty variable counts as unset.
        .set("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "")
        .set("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "x-other=logs")
        .run();
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null));
    assert_eq!(Received::by(&collector).queries("orders").len(), 1);
    let has_header = |sent: &Vec<u8>| sent.windows(VALUE.1.len()).any(|bytes| bytes == VALUE.1);
    let connections = tap.sent();
    // One for each signal.
    assert_eq!(connections.len(), 3);
    assert_eq!(connections.iter().filter(|sent| has_header(sent)).count(), 2);
}
