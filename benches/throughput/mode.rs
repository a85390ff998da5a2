//! What is compared.

use std::fmt;

use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

/// A way to read rows. Each runs in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// tokio-postgres and `serde_json` by hand: the basis.
    Raw,
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
    pub(crate) const TYPED: [Self; 5] =
        [Self::Raw, Self::StreamTelemetryOff, Self::StreamTelemetryOn, Self::FraiseqlWire, Self::Sqlx];
    pub(crate) const BYTES: [Self; 3] =
        [Self::RawBytes, Self::StreamBytesTelemetryOff, Self::StreamBytesTelemetryOn];

    /// What its cost is compared with.
    pub(crate) fn basis(self) -> Self {
        if Self::BYTES.contains(&self) { Self::RawBytes } else { Self::Raw }
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
