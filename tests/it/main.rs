//! Tests of the crate's guarantees against a real Postgres.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod backpressure;
mod bad_input;
mod cancel;
mod client_statements;
mod closing;
mod connect;
mod consumers;
mod cost;
mod error_contract;
mod fatal;
mod first_row;
mod loss;
mod null;
mod polling;
mod proxy;
mod relations;
mod returned_connection;
mod rows;
mod runtime;
mod sequences;
mod server;
mod statements;
mod stats;
mod transactions;
mod unread_errors;
mod verdict;
