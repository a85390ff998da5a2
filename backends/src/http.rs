//! Just enough HTTP to talk to a collector on loopback.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

/// Sends a GET request for `path` to a server on 127.0.0.1 and returns the status and the body.
///
/// # Errors
/// If the server does not answer, or its answer is not HTTP.
pub fn get(port: u16, path: &str) -> io::Result<(u16, String)> {
    exchange(port, &format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"))
}

/// Sends `json` in a POST request for `path` to a server on 127.0.0.1 and returns the status and the body.
///
/// # Errors
/// If the server does not answer, or its answer is not HTTP.
pub fn post_json(port: u16, path: &str, json: &str) -> io::Result<(u16, String)> {
    let length = json.len();
    exchange(
        port,
        &format!(
            "POST {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{json}"
        ),
    )
}

/// Uses HTTP/1.0, so that the answer ends when the connection is closed.
fn exchange(port: u16, request: &str) -> io::Result<(u16, String)> {
    let mut socket = TcpStream::connect(("127.0.0.1", port))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(invalid)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(invalid)?;
    Ok((status, body.to_owned()))
}
