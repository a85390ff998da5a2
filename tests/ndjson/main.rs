//! Runs `examples/ndjson` as a user does, and checks its output, its exit codes and how it stops.

mod arguments;
mod ending;
mod errors;
mod memory;
mod pace;
mod rows;
mod support;
mod telemetry;
