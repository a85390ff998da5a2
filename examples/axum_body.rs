//! Serves a table as the body of an HTTP response, one document per line.
//!
//! `DATABASE_URL=postgres://app@localhost/shop cargo run --example axum_body`, then
//! `curl http://127.0.0.1:8080/orders`

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, StatusCode, header::CONTENT_TYPE};
use axum::{Router, routing::get};
use fraiseql_stream::{Connection, RawJson};
use futures_util::TryStreamExt as _;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let listener = tokio::net::TcpListener::bind(address).await?;
    eprintln!("listening on {}", listener.local_addr()?);
    axum::serve(listener, Router::new().route("/orders", get(orders))).await
}

async fn orders() -> Result<([(HeaderName, &'static str); 1], Body), StatusCode> {
    let body = open().await.map_err(|error| {
        eprintln!("{error}");
        StatusCode::BAD_GATEWAY
    })?;
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body))
}

/// Returns when Postgres has accepted the query. The body then takes rows only as fast as the client reads them, and
/// a client that goes away cancels the query.
async fn open() -> Result<Body, Box<dyn std::error::Error + Send + Sync>> {
    let db = Connection::connect(std::env::var("DATABASE_URL").expect("DATABASE_URL is set")).await?;
    let rows = db.into_query::<RawJson>("orders").stream().await?;
    // An error ends the body without its last chunk, so that the client sees that rows are missing.
    let rows = rows.inspect_err(|error| eprintln!("{error}"));
    Ok(Body::from_stream(rows.map_ok(|row| Bytes::from([row.as_bytes(), b"\n"].concat()))))
}
