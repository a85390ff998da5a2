//! The settings of all signals, read from the `OTEL_*` variables.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;
use reqwest::Url;

use super::env::{Lookup, Variables};

/// The settings given by the environment.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) disabled: bool,
    pub(super) traces: Signal,
    pub(super) metrics: Signal,
    pub(super) logs: Signal,
    pub(super) sampler: Sampler,
    pub(super) spans: BatchLimits,
    pub(super) records: BatchLimits,
    pub(super) metric_interval: Duration,
    pub(super) service_name: Option<String>,
    pub(super) resource: Vec<KeyValue>,
    /// One line for each invalid value.
    pub(super) warnings: Vec<String>,
}

/// How one signal is exported.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Signal {
    pub(super) exporters: Vec<Exporter>,
    pub(super) protocol: Protocol,
    /// The complete URL. The exporter would read the variable itself, but untrimmed, and fail if it is invalid.
    pub(super) endpoint: String,
    /// The endpoint for messages: without path, user and password.
    pub(super) place: String,
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

/// The bounds of a batch processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchLimits {
    pub(super) queue: usize,
    pub(super) most: usize,
    pub(super) delay: Duration,
}

impl Settings {
    pub(super) fn from_env() -> Self {
        Self::read(&|name| std::env::var(name).ok())
    }

    /// Reads the settings from any source of variables.
    pub(super) fn read(lookup: Lookup<'_>) -> Self {
        let mut variables = Variables::new(lookup);
        let env = &mut variables;
        let settings = Self {
            disabled: env.flag("OTEL_SDK_DISABLED"),
            traces: signal(env, "traces", "OTEL_BSP_EXPORT_TIMEOUT"),
            metrics: signal(env, "metrics", "OTEL_METRIC_EXPORT_TIMEOUT"),
            logs: signal(env, "logs", "OTEL_BLRP_EXPORT_TIMEOUT"),
            sampler: sampler(env),
            spans: batch(env, "BSP", 5_000),
            records: batch(env, "BLRP", 1_000),
            metric_interval: Duration::from_millis(env.positive("OTEL_METRIC_EXPORT_INTERVAL", 60_000)),
            service_name: env.get("OTEL_SERVICE_NAME"),
            resource: resource(env),
            warnings: Vec::new(),
        };
        Self { warnings: variables.into_warnings(), ..settings }
    }
}

fn batch(env: &mut Variables<'_>, kind: &str, delay: u64) -> BatchLimits {
    let queue = env.positive(&format!("OTEL_{kind}_MAX_QUEUE_SIZE"), 2_048);
    let most = env.positive(&format!("OTEL_{kind}_MAX_EXPORT_BATCH_SIZE"), 512_usize);
    let delay = env.positive(&format!("OTEL_{kind}_SCHEDULE_DELAY"), delay);
    BatchLimits { queue, most: most.min(queue), delay: Duration::from_millis(delay) }
}

fn signal(env: &mut Variables<'_>, name: &'static str, export_timeout: &str) -> Signal {
    let signal = &name.to_ascii_uppercase();
    let protocol = protocol(env, signal);
    let (endpoint, place) = endpoint(env, signal, protocol);
    check_headers(env, signal);
    check_compression(env, signal);
    let timeout = timeout(env, signal, export_timeout);
    Signal { exporters: exporters(env, signal), protocol, endpoint, place, timeout, name }
}

fn timeout(env: &mut Variables<'_>, signal: &str, export_timeout: &str) -> Duration {
    let own = env.own_or_general(signal, "TIMEOUT").map(|(name, _)| name);
    let own = own.map_or(10_000, |name| env.positive(&name, 10_000));
    // The SDK's processors do not apply their limit, so it bounds the exporter's.
    Duration::from_millis(own.min(env.positive(export_timeout, 30_000)))
}

fn exporters(env: &mut Variables<'_>, signal: &str) -> Vec<Exporter> {
    let name = format!("OTEL_{signal}_EXPORTER");
    let Some(value) = env.get(&name) else {
        return vec![Exporter::Otlp];
    };
    let mut exporters = Vec::new();
    for exporter in value.split(',').map(|exporter| exporter.trim().to_ascii_lowercase()) {
        match exporter.as_str() {
            "otlp" => exporters.push(Exporter::Otlp),
            "console" => exporters.push(Exporter::Console),
            "none" => {}
            _ => {
                env.refuse((&name, &value), "otlp, console or none", "otlp");
                return vec![Exporter::Otlp];
            }
        }
    }
    exporters
}

/// Warns about headers that the exporter, which reads them itself, would drop silently.
fn check_headers(env: &mut Variables<'_>, signal: &str) {
    if let Some((name, value)) = env.own_or_general(signal, "HEADERS")
        && value.split(',').any(|pair| !pair.trim().is_empty() && !pair.contains('='))
    {
        env.warn(format!(
            "{name} is invalid (expected key=value,key=value; the value is not shown, since it may hold a secret); ignoring the invalid parts"
        ));
    }
}

fn check_compression(env: &mut Variables<'_>, signal: &str) {
    if let Some((name, value)) = env.own_or_general(signal, "COMPRESSION")
        && !["gzip", "none"].contains(&value.to_ascii_lowercase().as_str())
    {
        env.refuse((&name, &value), "gzip or none", "none");
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
    let Some((name, value)) = env.own_or_general(signal, "ENDPOINT") else {
        return (below(default), default.to_owned());
    };
    let url =
        Url::parse(&value).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
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

fn sampler(env: &mut Variables<'_>) -> Sampler {
    let name = "OTEL_TRACES_SAMPLER";
    let default = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
    let Some(value) = env.get(name) else {
        return default;
    };
    let root = match value.to_ascii_lowercase().as_str() {
        "always_on" | "parentbased_always_on" => Sampler::AlwaysOn,
        "always_off" | "parentbased_always_off" => Sampler::AlwaysOff,
        "traceidratio" | "parentbased_traceidratio" => {
            Sampler::TraceIdRatioBased(env.ratio("OTEL_TRACES_SAMPLER_ARG"))
        }
        _ => {
            let expected = "always_on, always_off or traceidratio, optionally prefixed with parentbased_";
            env.refuse((name, &value), expected, "parentbased_always_on");
            return default;
        }
    };
    if value.to_ascii_lowercase().starts_with("parentbased") {
        Sampler::ParentBased(Box::new(root))
    } else {
        root
    }
}

/// Reads the attributes of the resource, which the SDK would not percent-decode.
fn resource(env: &mut Variables<'_>) -> Vec<KeyValue> {
    let name = "OTEL_RESOURCE_ATTRIBUTES";
    let Some(value) = env.get(name) else {
        return Vec::new();
    };
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let key = Some(decode(key.trim())?).filter(|key| !key.is_empty())?;
        Some(KeyValue::new(key, decode(value.trim())?))
    };
    let pairs = value.split(',').filter(|pair| !pair.trim().is_empty());
    let attributes: Option<Vec<_>> = pairs.map(pair).collect();
    attributes.unwrap_or_else(|| {
        let expected = "key=value,key=value, with %2C and %3D for , and = inside values";
        env.refuse((name, &value), expected, "no attributes");
        Vec::new()
    })
}

fn decode(text: &str) -> Option<String> {
    // The decoder leaves a `%` that no two digits follow as it is; the specification wants the value refused.
    let is_code = |rest: &str| rest.get(..2).is_some_and(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
    let decoded = || percent_decode_str(text).decode_utf8().ok().map(Into::into);
    text.split('%').skip(1).all(is_code).then(decoded).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Settings {
        Settings::read(&|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn unset_variables_give_the_defaults_of_the_specification() {
        let settings = read(&[("OTEL_TRACES_EXPORTER", ""), ("OTEL_BSP_MAX_QUEUE_SIZE", " ")]);
        assert!(!settings.disabled && settings.warnings.is_empty());
        assert_eq!(settings.traces.exporters, [Exporter::Otlp]);
        assert_eq!(settings.logs.protocol, Protocol::HttpProtobuf);
        assert_eq!(settings.spans, BatchLimits { queue: 2_048, most: 512, delay: Duration::from_secs(5) });
        assert_eq!(settings.records.delay, Duration::from_secs(1));
        assert_eq!(settings.metric_interval, Duration::from_secs(60));
        assert!(matches!(settings.sampler, Sampler::ParentBased(_)));
    }

    #[test]
    fn each_signal_has_its_own_exporters_and_protocol() {
        let settings = read(&[
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
        let settings = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector/otel/\n"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs:4318/in"),
        ]);
        assert_eq!(settings.traces.endpoint, "https://collector/otel/v1/traces");
        assert_eq!(settings.logs.endpoint, "http://logs:4318/in");
        assert_eq!(read(&[]).metrics.endpoint, "http://localhost:4318/v1/metrics");
    }

    #[test]
    fn invalid_value_is_replaced_by_the_default_with_one_warning() {
        for (name, value) in [
            ("OTEL_SDK_DISABLED", "yes"),
            ("OTEL_TRACES_EXPORTER", "carrier-pigeon"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "nowhere"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "tightly"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "Bearer"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
            ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "never"),
            ("OTEL_RESOURCE_ATTRIBUTES", "team=a%zz"),
        ] {
            let settings = read(&[(name, value)]);
            let warnings: Vec<_> =
                settings.warnings.iter().filter(|warning| warning.contains(name)).collect();
            assert_eq!((warnings.len(), settings.warnings.len()), (1, 1), "{name}");
            assert!(!settings.disabled && settings.traces.exporters == [Exporter::Otlp]);
            assert_eq!(settings.spans, read(&[]).spans);
            assert_eq!(
                (settings.metric_interval, settings.traces.timeout),
                (read(&[]).metric_interval, read(&[]).traces.timeout)
            );
        }
    }

    #[test]
    fn export_timeout_is_the_shorter_of_exporter_and_processor() {
        let settings = read(&[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "7000"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "900"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "500"),
        ]);
        let signals = [settings.traces, settings.metrics, settings.logs];
        assert_eq!(signals.map(|signal| signal.timeout.as_millis()), [500, 900, 7_000]);
        assert_eq!(read(&[]).logs.timeout, Duration::from_secs(10));
    }

    #[test]
    fn sampler_names_ignore_case_and_ratios_are_checked() {
        let sampler = |value, ratio| {
            format!(
                "{:?}",
                read(&[("OTEL_TRACES_SAMPLER", value), ("OTEL_TRACES_SAMPLER_ARG", ratio)]).sampler
            )
        };
        assert_eq!(sampler("TraceIdRatio", "0.25"), "TraceIdRatioBased(0.25)");
        assert_eq!(sampler("traceidratio", "7"), "TraceIdRatioBased(1.0)");
        assert_eq!(sampler("always_off", ""), "AlwaysOff");
        assert_eq!(sampler("parentbased_always_off", ""), "ParentBased(AlwaysOff)");
    }

    #[test]
    fn resource_attributes_are_percent_decoded() {
        let settings = read(&[("OTEL_RESOURCE_ATTRIBUTES", "team=a%2Cb%20c, zone = eu")]);
        assert_eq!(settings.resource, [KeyValue::new("team", "a,b c"), KeyValue::new("zone", "eu")]);
        for invalid in ["%", "100%", "%2", "%zz", "%+1", "%ff", "%é"] {
            assert_eq!(decode(invalid), None, "{invalid}");
        }
    }
}
