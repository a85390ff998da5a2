//! What the library tells, as a real collector gets it: metrics, spans and log records of streams out of a real
//! Postgres, by http/protobuf and by gRPC.
//!
//! `otlp::init()` sets what is global, so whatever calls it is a *scenario*: an ignored test of this binary, which
//! the test that looks at the outcome runs in a process of its own.

#![expect(clippy::float_cmp, reason = "rows and bytes come as floats, which hold them exactly")]

mod batches;
mod catalogue;
mod ends;
mod entities;
mod environment;
mod guard;
mod logs;
mod outage;
mod outcomes;
mod own_provider;
mod queries;
mod received;
mod scenario;
mod secrets;
mod servers;
mod service;
