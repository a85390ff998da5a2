//! Streams JSON rows from Postgres with bounded memory, and reports, live and per entity, which side is slow: your
//! consumer, Postgres, or the async runtime.
//!
//! ```no_run
//! use fraiseql_stream::Connection;
//! use futures_util::TryStreamExt;
//!
//! # #[derive(serde::Deserialize)]
//! # struct Order {}
//! # async fn ship(_: Order) {}
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut db = Connection::connect(std::env::var("DATABASE_URL")?).await?;
//! let mut orders = db.query::<Order>("orders").where_sql("data->>'status' = $1", &[&"open"]).stream().await?;
//! while let Some(order) = orders.try_next().await? { ship(order).await; }
//! println!("{}", orders.stats());
//! // orders: 214,332 rows, 61.0 MB in 12.4 s; consumer-bound 81 % (your code 77 %, decoding 4 %), peak 3.2 MB of 16.8 MB
//! # Ok(())
//! # }
//! ```
//!
//! An error is one line, and reports which side set the pace:
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
//! # Overview
//!
//! - [`Connection`] connects and creates a [`Query`]; [`JsonStream`] is the stream of its rows.
//! - [`Stats`] and [`Verdict`] report where the time of a stream goes; an [`Observer`] reads them from elsewhere.
//! - [`Instruments`] record the metrics, and [describe](Instruments#entities) them.
//! - [`Error`] is the error of connecting, querying and decoding. A stream that owns its connection returns it with the
//!   error, in a [`StreamError`].
//!
//! Rows flow in one direction:
//!
//! ```text
//! Postgres -> producer -> gauged channel (rows and bytes bounded) -> JsonStream<T> -> your code
//!                 |             |                                        |
//!                 +-------------+-------------- write only --------------+--> OpenTelemetry, tracing
//! ```
//!
//! Two signals go the other way: room, when a chunk is taken out of the channel, and the end, when the stream is
//! dropped. Then Postgres is asked to cancel the query, and the connection is clean before its next one.
//!
//! # Features
//!
//! | feature | adds |
//! |---|---|
//! | `otlp` | `otlp::init()`: exports metrics, traces and logs over OTLP (http/protobuf), configured by the `OTEL_*` variables |
//! | `otlp-grpc` | the same over gRPC, if `OTEL_EXPORTER_OTLP_PROTOCOL=grpc` |
//! | `serde` | `Serialize` for [`Stats`] |
//!
//! No feature is enabled by default. Without `otlp`, the crate depends on the OpenTelemetry API, but not on its SDK or an
//! exporter. A service with providers of its own sets them before it connects, or passes [`Instruments`]; for spans, it
//! also needs a layer of tracing-opentelemetry, as described [here](Instruments#spans).

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
/// The Postgres client that [`Connection::client`] returns, with its types for parameters.
pub use tokio_postgres;

// Compiles the examples of the README and of the documents as well.
#[cfg(all(doctest, feature = "otlp"))]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../docs/environment.md")]
struct Readme;
