//! The modes that are compared.

use std::fmt;

use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

/// A way to read rows. Each mode runs in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// tokio-postgres and `serde_json`, with the SQL text in each query; the baseline for rows
    Raw,
    /// The same with a statement that is prepared once; the baseline for streams
    RawPrepared,
    /// fraiseql-stream without a telemetry provider or subscriber
    StreamTelemetryOff,
    /// fraiseql-stream after `otlp::init()`, exporting metrics, traces and logs to a collector
    StreamTelemetryOn,
    FraiseqlWire,
    Sqlx,
    /// tokio-postgres without decoding; the baseline for the following two
    RawBytes,
    StreamBytesTelemetryOff,
    StreamBytesTelemetryOn,
}

impl Mode {
    /// The modes for the cost of a row.
    pub(crate) const ROWS: [Self; 8] = [
        Self::Raw,
        Self::StreamTelemetryOff,
        Self::StreamTelemetryOn,
        Self::FraiseqlWire,
        Self::Sqlx,
        Self::RawBytes,
        Self::StreamBytesTelemetryOff,
        Self::StreamBytesTelemetryOn,
    ];

    /// The modes for the cost of a stream. fraiseql-wire is missing, since each of its queries consumes a connection.
    pub(crate) const STREAMS: [Self; 5] =
        [Self::RawPrepared, Self::Raw, Self::StreamTelemetryOff, Self::StreamTelemetryOn, Self::Sqlx];

    /// The modes for the cost of waiting.
    pub(crate) const SLOW: [Self; 2] = [Self::RawPrepared, Self::StreamTelemetryOff];

    pub(crate) fn is_bytes(self) -> bool {
        matches!(self, Self::RawBytes | Self::StreamBytesTelemetryOff | Self::StreamBytesTelemetryOn)
    }

    pub(crate) fn has_telemetry(self) -> bool {
        matches!(self, Self::StreamTelemetryOn | Self::StreamBytesTelemetryOn)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.pad(value.as_ref().map_or("", |value| value.get_name()))
    }
}
