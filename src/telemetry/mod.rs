//! What a stream reports to OpenTelemetry and `tracing`. Every stage writes to this module, which depends on none of
//! them.

mod before;
mod database;
mod ends;
mod failure;
mod instruments;
mod recorder;
mod registry;
mod spans;

pub(crate) use before::{connect_span, record_connected, record_error, wait_in_span};
pub(crate) use database::Database;
#[cfg(feature = "otlp")]
pub(crate) use ends::ENDS;
pub(crate) use ends::End;
pub use instruments::Instruments;
pub(crate) use recorder::{Heartbeat, Recorder};
#[cfg(feature = "otlp")]
pub(crate) use registry::MAX_ENTITIES;
pub use spans::PollSpans;
#[cfg(feature = "otlp")]
pub(crate) use spans::spans_are_open;
pub(crate) use spans::{PollBatch, QueryInfo, QuerySpan};

/// The version of the semantic conventions whose names the crate uses.
pub(crate) const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.42.0";
/// The name of the crate's meter, and the target of its spans and log records.
pub(crate) const SCOPE: &str = "fraiseql_stream";
/// The target of the one event that belongs in a span but not in the log.
pub(crate) const FIRST_ROW: &str = "fraiseql_stream::first_row";
