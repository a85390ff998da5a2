//! `examples/ndjson`, run as its user runs it: its bytes, its exit codes, its manners.

mod arguments;
mod ending;
mod errors;
mod memory;
mod pace;
mod rows;
mod support;
mod telemetry;
