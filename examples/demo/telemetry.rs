//! Exports telemetry to the collector named by the `OTEL_*` variables, if any is set.

use fraiseql_stream::otlp::{self, Guard};

/// How to see all of it.
const HINT: &str = "\
To see it in Grafana:
   docker compose up -d --wait
   export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
   export OTEL_SERVICE_NAME=demo OTEL_METRIC_EXPORT_INTERVAL=1000
   cargo run --release --example demo
   and open http://127.0.0.1:3000";

/// Metrics, traces and logs on their way out, or not.
pub(crate) struct Telemetry(Option<Guard>);

impl Telemetry {
    pub(crate) fn start() -> Result<Self, otlp::InitError> {
        otlp::init_if_configured().map(Self)
    }

    pub(crate) fn is_exported(&self) -> bool {
        self.0.is_some()
    }

    /// Sends what is left, and says where all of it is.
    pub(crate) async fn finish(self) -> String {
        let Some(guard) = self.0 else {
            return HINT.to_owned();
        };
        let sent = guard.shutdown().await;
        let off = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|off| off.eq_ignore_ascii_case("true"));
        match sent {
            // A warning on standard error has said why.
            Err(_) => format!("Not all telemetry arrived at {}.", place()),
            Ok(()) if off => "OTEL_SDK_DISABLED is set: nothing was exported.".to_owned(),
            Ok(()) => format!("Metrics, traces and logs went to {}.", place()),
        }
    }
}

/// What the variables name, without a password.
fn place() -> String {
    let endpoint = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_default();
    match endpoint.split_once("://") {
        None => "the place that the OTEL_* variables name".to_owned(),
        Some((scheme, rest)) => {
            let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
            format!("{scheme}://{host}")
        }
    }
}
