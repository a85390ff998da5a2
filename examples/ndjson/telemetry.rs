//! Telemetry export as set by the `OTEL_*` variables, if there are any.

use std::io;

use fraiseql_stream::otlp::{self, Guard, InitError};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::prelude::*;

/// Prints warnings, and exports telemetry if a variable is set. Unlike `otlp::init_if_configured`, it does not print the
/// errors of streams, which the program prints itself.
pub(crate) fn start() -> Result<Option<Guard>, InitError> {
    let is_set = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        name.as_encoded_bytes().starts_with(b"OTEL_") && !value.as_encoded_bytes().trim_ascii().is_empty()
    };
    let guard = std::env::vars_os().any(is_set).then(otlp::set_global_providers).transpose()?;
    let warnings = filter_fn(|about| {
        *about.level() == tracing::Level::WARN && about.target().starts_with("fraiseql_stream")
    });
    let print = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false).with_ansi(false);
    let print = print.without_time().with_filter(warnings);
    tracing_subscriber::registry().with(guard.as_ref().map(Guard::layer)).with(print).init();
    Ok(guard)
}
