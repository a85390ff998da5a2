//! The promises of the crate, each on a real Postgres.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod backpressure;
mod bad_input;
mod cancel;
mod connect;
mod consumers;
mod fatal;
mod first_row;
mod loss;
mod null;
mod relations;
mod rows;
mod runtime;
mod sequences;
mod server;
mod stats;
mod unseen;
mod verdict;
