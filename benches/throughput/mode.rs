//! What is compared.

use std::fmt;

use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

/// A way to read rows. Each runs in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// tokio-postgres and `serde_json` by hand, with the SQL text in each query: the basis for rows.
    Raw,
    /// The same with a statement prepared once: the basis for streams.
    RawPrepared,
    /// fraiseql-stream without provider or subscriber.
    StreamTelemetryOff,
    /// fraiseql-stream after `otlp::init()`: metrics, traces and logs to a collector.
    StreamTelemetryOn,
    FraiseqlWire,
    Sqlx,
    /// tokio-postgres, rows not decoded: the basis of the two below.
    RawBytes,
    StreamBytesTelemetryOff,
    StreamBytesTelemetryOn,
}

impl Mode {
    /// For the cost of a row.
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

    /// For the cost of a stream. A query of fraiseql-wire uses its connection up, so it has no place here.
    pub(crate) const STREAMS: [Self; 5] =
        [Self::RawPrepared, Self::Raw, Self::StreamTelemetryOff, Self::StreamTelemetryOn, Self::Sqlx];

    /// For the cost of waiting.
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
