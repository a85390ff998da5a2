//! Telemetry by OTLP, set up by the standard `OTEL_*` variables alone.
