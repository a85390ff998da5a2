//! Telemetry as a real collector receives it: metrics, spans and log records of streams from a real Postgres, by
//! http/protobuf and over gRPC.
//!
//! `otlp::init()` sets globals, so each call is in a *scenario*: an ignored test of this binary that the test of the
//! outcome runs in a separate process.

#![expect(clippy::float_cmp, reason = "floats represent these numbers of rows and bytes exactly")]

mod batches;
mod before;
mod catalogue;
mod certificates;
mod conventions;
mod documented;
mod ends;
mod entities;
mod environment;
mod guard;
mod headers;
mod logs;
mod outage;
mod outcomes;
mod own_provider;
mod propagation;
mod queries;
mod received;
mod registry;
mod scenario;
mod secrets;
mod servers;
mod service;
