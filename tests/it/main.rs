//! The promises of the crate, each on a real Postgres.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod backpressure;
mod bad_input;
mod cancel;
mod closing;
mod connect;
mod consumers;
mod cost;
mod fatal;
mod first_row;
mod given_back;
mod loss;
mod null;
mod own_statements;
mod polling;
mod proxy;
mod relations;
mod rows;
mod runtime;
mod sequences;
mod server;
mod statements;
mod stats;
mod transactions;
mod unseen;
mod verdict;
