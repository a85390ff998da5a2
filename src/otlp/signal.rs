//! How each signal is exported, as given by the variables of the exporters.

use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::env::{Variables, decode};
use super::tls::Tls;

/// How one signal is exported.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Signal {
    pub(super) exporters: Vec<Exporter>,
    pub(super) protocol: Protocol,
    /// The complete URL. The exporter would read the variable itself, but untrimmed, and fail if it is invalid.
    pub(super) endpoint: String,
    /// The endpoint for messages: without path, user and password.
    pub(super) place: String,
    /// All values are marked as sensitive.
    pub(super) headers: HeaderMap,
    pub(super) tls: Tls,
    /// The limit of one export, retries included.
    pub(super) timeout: Duration,
    /// `traces`, `metrics` or `logs`.
    pub(super) name: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exporter {
    Otlp,
    Console,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Protocol {
    #[default]
    HttpProtobuf,
    Grpc,
}

impl Signal {
    pub(super) fn read(env: &mut Variables<'_>, name: &'static str, export_timeout: &str) -> Self {
        let signal = &name.to_ascii_uppercase();
        let protocol = protocol(env, signal);
        let (endpoint, place) = endpoint(env, signal, protocol);
        check_compression(env, signal);
        Self {
            exporters: exporters(env, signal),
            protocol,
            endpoint,
            place,
            headers: headers(env, signal),
            tls: Tls::read(env, signal),
            timeout: timeout(env, signal, export_timeout),
            name,
        }
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.place.starts_with("https://")
    }
}

fn timeout(env: &mut Variables<'_>, signal: &str, export_timeout: &str) -> Duration {
    let general = "OTEL_EXPORTER_OTLP_TIMEOUT".to_owned();
    let name = env.own_or_general(signal, "TIMEOUT").map_or(general, |(name, _)| name);
    // The SDK's processors do not apply their limit, so it bounds the exporter's.
    env.timeout(&name, 10_000).min(env.timeout(export_timeout, 30_000))
}

fn exporters(env: &mut Variables<'_>, signal: &str) -> Vec<Exporter> {
    let name = format!("OTEL_{signal}_EXPORTER");
    let Some(value) = env.get(&name) else {
        return vec![Exporter::Otlp];
    };
    let mut exporters = Vec::new();
    for exporter in value.split(',').map(|exporter| exporter.trim().to_ascii_lowercase()) {
        let exporter = match exporter.as_str() {
            "otlp" => Exporter::Otlp,
            "console" => Exporter::Console,
            "none" => continue,
            _ => {
                env.refuse((&name, &value), "otlp, console or none", "otlp");
                return vec![Exporter::Otlp];
            }
        };
        if !exporters.contains(&exporter) {
            exporters.push(exporter);
        }
    }
    exporters
}

/// Reads the headers, which the exporter reads as well. It takes an empty variable of the signal for a set one,
/// though, and drops invalid headers silently.
fn headers(env: &mut Variables<'_>, signal: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let Some((name, value)) = env.own_or_general(signal, "HEADERS") else {
        return headers;
    };
    for pair in value.split(',').filter(|pair| !pair.trim().is_empty()) {
        if let Some((key, value)) = header(pair) {
            headers.insert(key, value);
        } else {
            env.warn(format!(
                "{name} is invalid (expected key=value,key=value; the value is not shown, since it may hold a secret); ignoring the invalid parts"
            ));
        }
    }
    headers
}

fn header(pair: &str) -> Option<(HeaderName, HeaderValue)> {
    let (key, value) = pair.split_once('=')?;
    // What is not percent-encoded properly is sent as it is.
    let value = decode(value.trim()).unwrap_or_else(|| value.trim().to_owned());
    let mut value = HeaderValue::from_str(&value).ok()?;
    value.set_sensitive(true);
    Some((key.trim().parse().ok()?, value))
}

fn check_compression(env: &mut Variables<'_>, signal: &str) {
    if let Some((name, _)) = env.own_or_general(signal, "COMPRESSION") {
        env.choice(&name, &[("none", ()), ("gzip", ())]);
    }
}

fn protocol(env: &mut Variables<'_>, signal: &str) -> Protocol {
    let Some((name, value)) = env.own_or_general(signal, "PROTOCOL") else {
        return Protocol::default();
    };
    let expected = match value.to_ascii_lowercase().as_str() {
        "http/protobuf" => return Protocol::HttpProtobuf,
        "grpc" if cfg!(feature = "otlp-grpc") => return Protocol::Grpc,
        "grpc" => "http/protobuf, or grpc with the cargo feature otlp-grpc",
        _ => "http/protobuf or grpc",
    };
    env.refuse((&name, &value), expected, "http/protobuf");
    Protocol::HttpProtobuf
}

/// Returns the signal's endpoint, and the same for messages.
fn endpoint(env: &mut Variables<'_>, signal: &str, protocol: Protocol) -> (String, String) {
    let default = match protocol {
        Protocol::HttpProtobuf => "http://localhost:4318",
        Protocol::Grpc => "http://localhost:4317",
    };
    // A general endpoint is a base for HTTP.
    let below = |base: &str| match protocol {
        Protocol::HttpProtobuf => {
            format!("{}/v1/{}", base.trim_end_matches('/'), signal.to_ascii_lowercase())
        }
        Protocol::Grpc => base.to_owned(),
    };
    let is_insecure = is_insecure(env, signal);
    let Some((name, value)) = env.own_or_general(signal, "ENDPOINT") else {
        return (below(default), default.to_owned());
    };
    let has_no_scheme = protocol == Protocol::Grpc && !value.contains("://");
    let scheme = if is_insecure { "http://" } else { "https://" };
    let url = if has_no_scheme { format!("{scheme}{value}") } else { value };
    let url = Url::parse(&url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let Some(url) = url else {
        env.warn(format!(
            "{name} is invalid (expected a URL such as {default}; the value is not shown, since it may hold a secret); using {default}"
        ));
        return (below(default), default.to_owned());
    };
    // The URL may hold a user and a password.
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    let place = format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default());
    let is_own = name.contains(signal);
    (if is_own { url.to_string() } else { below(url.as_str()) }, place)
}

/// Whether an endpoint for gRPC without a scheme is not encrypted.
fn is_insecure(env: &mut Variables<'_>, signal: &str) -> bool {
    env.own_or_general(signal, "INSECURE").is_some_and(|(name, _)| env.flag(&name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::otlp::env::NO_LIMIT;
    use crate::otlp::settings::Settings;

    #[test]
    fn each_signal_has_its_own_exporters_and_protocol() {
        let settings = Settings::of(&[
            ("OTEL_METRICS_EXPORTER", "Console, otlp"),
            ("OTEL_LOGS_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "GRPC"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:secret@collector:4318"),
        ]);
        assert_eq!(settings.metrics.exporters, [Exporter::Console, Exporter::Otlp]);
        assert!(settings.logs.exporters.is_empty());
        assert_eq!(settings.metrics.protocol, Protocol::HttpProtobuf);
        assert_eq!(settings.traces.protocol == Protocol::Grpc, cfg!(feature = "otlp-grpc"));
        assert_eq!(settings.metrics.place, "http://collector:4318");
    }

    #[test]
    fn general_endpoint_is_a_base_and_the_endpoint_of_a_signal_is_not() {
        let settings = Settings::of(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector/otel/\n"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs:4318/in"),
        ]);
        assert_eq!(settings.traces.endpoint, "https://collector/otel/v1/traces");
        assert_eq!(settings.logs.endpoint, "http://logs:4318/in");
        assert_eq!(Settings::of(&[]).metrics.endpoint, "http://localhost:4318/v1/metrics");
    }

    #[test]
    fn export_timeout_is_the_shorter_of_exporter_and_processor() {
        let settings = Settings::of(&[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "7000"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "900"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "500"),
        ]);
        let signals = [settings.traces, settings.metrics, settings.logs];
        assert_eq!(signals.map(|signal| signal.timeout.as_millis()), [500, 900, 7_000]);
        assert_eq!(Settings::of(&[]).logs.timeout, Duration::from_secs(10));
    }

    #[test]
    fn timeout_of_zero_is_no_limit() {
        let settings = Settings::of(&[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "0"),
            ("OTEL_BLRP_EXPORT_TIMEOUT", "40000"),
        ]);
        assert_eq!(settings.traces.timeout, NO_LIMIT);
        assert_eq!(settings.logs.timeout, Duration::from_secs(40));
        assert_eq!(settings.metrics.timeout, Duration::from_secs(30));
    }

    #[cfg(feature = "otlp-grpc")]
    #[test]
    fn grpc_endpoint_without_scheme_is_encrypted_unless_it_is_insecure() {
        let endpoint = |insecure| {
            let settings = Settings::of(&[
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
                ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", insecure),
            ]);
            assert!(settings.warnings.is_empty());
            settings.traces.place
        };
        assert_eq!(endpoint(""), "https://collector:4317");
        assert_eq!(endpoint("True"), "http://collector:4317");
    }

    #[test]
    fn empty_headers_of_a_signal_leave_the_general_ones() {
        let settings = Settings::of(&[
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20t0ken, x-tenant=a%b"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", ""),
            ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "x-tenant=logs"),
        ]);
        let header =
            |signal: &Signal, name| signal.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(header(&settings.traces, "authorization").as_deref(), Some("Bearer t0ken"));
        assert_eq!(header(&settings.traces, "x-tenant").as_deref(), Some("a%b"));
        assert_eq!(header(&settings.logs, "authorization"), None);
        assert!(settings.warnings.is_empty() && !format!("{settings:?}").contains("t0ken"));
    }
}
