//! Telemetry export as set by the `OTEL_*` variables, if there are any.

use fraiseql_stream::otlp::{self, Guard};

/// Printed when no telemetry is exported.
const HINT: &str = "\
To see it in Grafana:
   docker compose up -d --wait
   export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
   export OTEL_SERVICE_NAME=demo OTEL_METRIC_EXPORT_INTERVAL=5000
   cargo run --release --features otlp --example demo
   and open http://127.0.0.1:3000";

/// The export of metrics, traces and logs, or `None` without `OTEL_*` variables.
pub(crate) struct Telemetry(Option<Guard>);

impl Telemetry {
    pub(crate) fn start() -> Result<Self, otlp::InitError> {
        otlp::init_if_configured().map(Self)
    }

    pub(crate) fn is_exported(&self) -> bool {
        self.0.is_some()
    }

    /// Exports what is left, and returns a line for the user about where the telemetry went.
    pub(crate) async fn finish(self) -> String {
        let Some(guard) = self.0 else {
            return HINT.to_owned();
        };
        let result = guard.shutdown().await;
        let off = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|off| off.eq_ignore_ascii_case("true"));
        match result {
            // The reason has been logged to standard error.
            Err(_) => format!("Some telemetry did not reach {}.", endpoint()),
            Ok(()) if off => "OTEL_SDK_DISABLED is set: nothing was exported.".to_owned(),
            Ok(()) => format!("Metrics, traces and logs were exported to {}.", endpoint()),
        }
    }
}

/// Returns the endpoint that the variables set, without a password.
fn endpoint() -> String {
    let endpoint = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_default();
    match endpoint.split_once("://") {
        None => "the endpoint set by the OTEL_* variables".to_owned(),
        Some((scheme, rest)) => {
            let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
            format!("{scheme}://{host}")
        }
    }
}
