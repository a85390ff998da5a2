//! Streams JSON rows out of Postgres with bounded memory, and tells, live and per entity, who is slow: your
//! consumer or Postgres.
//!
//! ```no_run
//! use fraiseql_stream::Connection;
//! use futures_util::TryStreamExt;
//!
//! # #[derive(serde::Deserialize)]
//! # struct Order {}
//! # async fn ship(_: Order) {}
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut db = Connection::connect(&std::env::var("DATABASE_URL")?).await?;
//! let mut orders = db.query::<Order>("orders").where_sql("data->>'status' = $1", &[&"open"]).stream().await?;
//! while let Some(order) = orders.try_next().await? { ship(order).await; }
//! println!("{}", orders.stats());
//! // orders: 214,332 rows, 61.0 MB in 12.4 s; consumer-bound 81 % (your code 77 %, decoding 4 %), peak 3.2 MB of 16.8 MB
//! # Ok(())
//! # }
//! ```
//!
//! An error at 3 a.m., whole and on one line:
//!
//! ```text
//! orders: canceling statement due to statement timeout (57014) after 100,213 rows in 30.0 s; consumer-bound 94 %: Postgres waited for your code, not the other way round
//! ```
//!
//! The demo (`cargo run --release --features otlp --example demo`) while it runs:
//!
//! ```text
//! orders             312,000 rows   466 k/s  [##........]  source-bound    68 %
//! orders_slow_sink    26,700 rows   4.4 k/s  [##########]  consumer-bound 100 %
//! ```
//!
//! # How rows flow
//!
//! ```text
//! Query -> Connection -> producer (task) -> gauged channel (rows and bytes bounded) -> JsonStream<T> -> your code
//!                           |                  |                                       |
//!                           +------------------+---- write only ----> Instruments -----+----> OpenTelemetry / tracing
//! ```
//!
//! Only two things go upstream: room, freed when a chunk is taken, and goodbye, when the stream is dropped:
//! then Postgres is asked to cancel, and the connection is clean before its next query.
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `otlp` | [`otlp::init`]: metrics, traces and logs by OTLP (http/protobuf), set up by the `OTEL_*` variables |
//! | `otlp-grpc` | the same by gRPC, where `OTEL_EXPORTER_OTLP_PROTOCOL=grpc` |
//!
//! Without features the crate depends on the OpenTelemetry API and `tracing` only. A service with providers of its own
//! sets them before it connects, or passes [`Instruments`]; its spans need a layer of tracing-opentelemetry, as
//! [described there](Instruments#spans).

#![cfg_attr(docsrs, feature(doc_cfg))]

mod channel;
mod connection;
mod error;
#[cfg(feature = "otlp")]
pub mod otlp;
mod postgres;
mod stream;
mod sync;
mod telemetry;

pub use channel::{Observer, ProducerTime, Shares, Stats, StreamTime, Verdict};
pub use connection::{Connection, ConnectionBuilder, Hold, IntoConfig, StreamError};
pub use error::{Error, ErrorKind, Result};
/// The OpenTelemetry API of the providers that [`Instruments`] accepts.
pub use opentelemetry;
pub use stream::{FromJson, JsonStream, Query, RawJson};
pub use telemetry::{Instruments, PollSpans};
pub use tokio_postgres;

// The examples of the README compile, too.
#[cfg(all(doctest, feature = "otlp"))]
#[doc = include_str!("../README.md")]
struct Readme;
