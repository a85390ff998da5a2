//! Reads the `OTEL_*` variables as the specification asks: empty is unset, names are case-insensitive, and
//! what makes no sense is told once and replaced by the default.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::trace::Sampler;
use reqwest::Url;

/// What the environment asks for.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) disabled: bool,
    pub(super) traces: Signal,
    pub(super) metrics: Signal,
    pub(super) logs: Signal,
    pub(super) sampler: Sampler,
    pub(super) spans: Batch,
    pub(super) records: Batch,
    pub(super) metric_interval: Duration,
    pub(super) service_name: Option<String>,
    pub(super) resource: Vec<KeyValue>,
    /// To be told once something can show it.
    pub(super) warnings: Vec<String>,
}

/// How one signal leaves.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Signal {
    pub(super) exporters: Vec<Exporter>,
    pub(super) protocol: Protocol,
    /// The whole of it. The exporter would read the variable itself, but untrimmed, and fail over nonsense.
    pub(super) endpoint: String,
    /// Where it goes, for people.
    pub(super) place: String,
    /// Of one export, retries included.
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

/// A batch processor's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) queue: usize,
    pub(super) most: usize,
    pub(super) delay: Duration,
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

struct Reader<'a> {
    lookup: Lookup<'a>,
    warnings: Vec<String>,
}

impl Settings {
    pub(super) fn from_env() -> Self {
        Self::read(&|name| std::env::var(name).ok())
    }

    /// Reads from any source of variables.
    pub(super) fn read(lookup: Lookup<'_>) -> Self {
        let mut env = Reader { lookup, warnings: Vec::new() };
        Self {
            disabled: env.flag("OTEL_SDK_DISABLED"),
            traces: env.signal("traces", "OTEL_BSP_EXPORT_TIMEOUT"),
            metrics: env.signal("metrics", "OTEL_METRIC_EXPORT_TIMEOUT"),
            logs: env.signal("logs", "OTEL_BLRP_EXPORT_TIMEOUT"),
            sampler: env.sampler(),
            spans: env.batch("BSP", Duration::from_secs(5)),
            records: env.batch("BLRP", Duration::from_secs(1)),
            metric_interval: Duration::from_millis(env.positive("OTEL_METRIC_EXPORT_INTERVAL", 60_000)),
            service_name: env.get("OTEL_SERVICE_NAME"),
            resource: env.resource(),
            warnings: env.warnings,
        }
    }
}

impl Reader<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn refuse(&mut self, name: &str, value: &str, instead: impl Display) {
        self.warn(format!("{name}={value:?} makes no sense here: using {instead}"));
    }

    /// Once, though three signals read the same general variable.
    fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Only `true` is true.
    fn flag(&mut self, name: &str) -> bool {
        let Some(value) = self.get(name) else {
            return false;
        };
        if !value.eq_ignore_ascii_case("true") && !value.eq_ignore_ascii_case("false") {
            self.refuse(name, &value, "false");
        }
        value.eq_ignore_ascii_case("true")
    }

    fn positive<N: FromStr + PartialOrd + From<u8> + Display + Copy>(&mut self, name: &str, default: N) -> N {
        let Some(value) = self.get(name) else {
            return default;
        };
        match value.parse() {
            Ok(number) if number > N::from(0) => number,
            _ => {
                self.refuse(name, &value, format_args!("{default} (a whole number above 0 is wanted)"));
                default
            }
        }
    }

    fn batch(&mut self, kind: &str, delay: Duration) -> Batch {
        let queue = self.positive(&format!("OTEL_{kind}_MAX_QUEUE_SIZE"), 2_048);
        let most = self.positive(&format!("OTEL_{kind}_MAX_EXPORT_BATCH_SIZE"), 512_usize);
        let delay = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let delay = self.positive(&format!("OTEL_{kind}_SCHEDULE_DELAY"), delay);
        Batch { queue, most: most.min(queue), delay: Duration::from_millis(delay) }
    }

    fn signal(&mut self, name: &'static str, export_timeout: &str) -> Signal {
        let signal = &name.to_ascii_uppercase();
        let protocol = self.protocol(signal);
        let (endpoint, place) = self.endpoint(signal, protocol);
        self.check_headers(signal);
        self.check_compression(signal);
        let timeout = self.timeout(signal, export_timeout);
        Signal { exporters: self.exporters(signal), protocol, endpoint, place, timeout, name }
    }

    /// The processor's limit bounds the exporter's: the SDK's processors do not keep to it by themselves.
    fn timeout(&mut self, signal: &str, export_timeout: &str) -> Duration {
        let own = self.own_or_general(signal, "TIMEOUT").map(|(name, _)| name);
        let own = own.map_or(10_000, |name| self.positive(&name, 10_000));
        Duration::from_millis(own.min(self.positive(export_timeout, 30_000)))
    }

    fn exporters(&mut self, signal: &str) -> Vec<Exporter> {
        let name = format!("OTEL_{signal}_EXPORTER");
        let Some(value) = self.get(&name) else {
            return vec![Exporter::Otlp];
        };
        let mut exporters = Vec::new();
        for word in value.split(',').map(|word| word.trim().to_ascii_lowercase()) {
            match word.as_str() {
                "otlp" => exporters.push(Exporter::Otlp),
                "console" => exporters.push(Exporter::Console),
                "none" => {}
                _ => {
                    self.refuse(&name, &value, "otlp (one of otlp, console, none is wanted)");
                    return vec![Exporter::Otlp];
                }
            }
        }
        exporters
    }

    /// The signal's own variable of the exporter if it is set, else the general one.
    fn own_or_general(&self, signal: &str, what: &str) -> Option<(String, String)> {
        let names = [format!("OTEL_EXPORTER_OTLP_{signal}_{what}"), format!("OTEL_EXPORTER_OTLP_{what}")];
        names.into_iter().find_map(|name| self.get(&name).map(|value| (name, value)))
    }

    /// The exporter reads these by itself, and drops what it can't read without a word.
    fn check_headers(&mut self, signal: &str) {
        if let Some((name, value)) = self.own_or_general(signal, "HEADERS")
            && value.split(',').any(|pair| !pair.trim().is_empty() && !pair.contains('='))
        {
            self.warn(format!("{name} is not of the form key=value,key=value (not shown, it may hold a secret): what can't be read is left out"));
        }
    }

    fn check_compression(&mut self, signal: &str) {
        if let Some((name, value)) = self.own_or_general(signal, "COMPRESSION")
            && !["gzip", "none"].contains(&value.to_ascii_lowercase().as_str())
        {
            self.refuse(&name, &value, "none (one of gzip, none is wanted)");
        }
    }

    fn protocol(&mut self, signal: &str) -> Protocol {
        let Some((name, value)) = self.own_or_general(signal, "PROTOCOL") else {
            return Protocol::default();
        };
        let name = name.as_str();
        match value.to_ascii_lowercase().as_str() {
            "http/protobuf" => Protocol::HttpProtobuf,
            "grpc" if cfg!(feature = "otlp-grpc") => Protocol::Grpc,
            "grpc" => {
                self.refuse(name, &value, "http/protobuf (gRPC needs the cargo feature otlp-grpc)");
                Protocol::HttpProtobuf
            }
            _ => {
                self.refuse(name, &value, "http/protobuf (one of http/protobuf, grpc is wanted)");
                Protocol::HttpProtobuf
            }
        }
    }

    /// The signal's endpoint, and the same for people.
    fn endpoint(&mut self, signal: &str, protocol: Protocol) -> (String, String) {
        let default = match protocol {
            Protocol::HttpProtobuf => "http://localhost:4318",
            Protocol::Grpc => "http://localhost:4317",
        };
        // By HTTP, a general endpoint is a base.
        let below = |base: &str| match protocol {
            Protocol::HttpProtobuf => {
                format!("{}/v1/{}", base.trim_end_matches('/'), signal.to_ascii_lowercase())
            }
            Protocol::Grpc => base.to_owned(),
        };
        let Some((name, value)) = self.own_or_general(signal, "ENDPOINT") else {
            return (below(default), default.to_owned());
        };
        let url =
            Url::parse(&value).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let Some(url) = url else {
            self.warn(format!("{name} is no URL such as http://localhost:4318: using the default"));
            return (below(default), default.to_owned());
        };
        // Without user and password, if someone put them there.
        let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
        let place = format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default());
        let is_own = name.contains(signal);
        (if is_own { url.to_string() } else { below(url.as_str()) }, place)
    }

    fn sampler(&mut self) -> Sampler {
        let name = "OTEL_TRACES_SAMPLER";
        let default = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        let Some(value) = self.get(name) else {
            return default;
        };
        let root = match value.to_ascii_lowercase().as_str() {
            "always_on" | "parentbased_always_on" => Sampler::AlwaysOn,
            "always_off" | "parentbased_always_off" => Sampler::AlwaysOff,
            "traceidratio" | "parentbased_traceidratio" => Sampler::TraceIdRatioBased(self.ratio()),
            _ => {
                self.refuse(name, &value, "parentbased_always_on");
                return default;
            }
        };
        if value.to_ascii_lowercase().starts_with("parentbased") {
            Sampler::ParentBased(Box::new(root))
        } else {
            root
        }
    }

    fn ratio(&mut self) -> f64 {
        let name = "OTEL_TRACES_SAMPLER_ARG";
        let Some(value) = self.get(name) else {
            return 1.0;
        };
        match value.parse() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
            _ => {
                self.refuse(name, &value, "1 (a ratio from 0 to 1 is wanted)");
                1.0
            }
        }
    }

    /// Attributes of the resource; the SDK does not decode percent signs, so it is done here.
    fn resource(&mut self) -> Vec<KeyValue> {
        let name = "OTEL_RESOURCE_ATTRIBUTES";
        let Some(value) = self.get(name) else {
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
            self.refuse(
                name,
                &value,
                "none of it (key=value,key=value is wanted, with , and = inside values as %2C and %3D)",
            );
            Vec::new()
        })
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
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
    fn nothing_set_means_the_defaults_of_the_specification() {
        let settings = read(&[("OTEL_TRACES_EXPORTER", ""), ("OTEL_BSP_MAX_QUEUE_SIZE", " ")]);
        assert!(!settings.disabled && settings.warnings.is_empty());
        assert_eq!(settings.traces.exporters, [Exporter::Otlp]);
        assert_eq!(settings.logs.protocol, Protocol::HttpProtobuf);
        assert_eq!(settings.spans, Batch { queue: 2_048, most: 512, delay: Duration::from_secs(5) });
        assert_eq!(settings.records.delay, Duration::from_secs(1));
        assert_eq!(settings.metric_interval, Duration::from_mins(1));
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
    fn a_general_endpoint_is_a_base_and_a_signals_own_is_not() {
        let settings = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector/otel/\n"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs:4318/in"),
        ]);
        assert_eq!(settings.traces.endpoint, "https://collector/otel/v1/traces");
        assert_eq!(settings.logs.endpoint, "http://logs:4318/in");
        assert_eq!(read(&[]).metrics.endpoint, "http://localhost:4318/v1/metrics");
    }

    #[test]
    fn nonsense_is_told_once_and_replaced_by_the_default() {
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
            let told: Vec<_> = settings.warnings.iter().filter(|warning| warning.contains(name)).collect();
            assert_eq!((told.len(), settings.warnings.len()), (1, 1), "{name}");
            assert!(!settings.disabled && settings.traces.exporters == [Exporter::Otlp]);
            assert_eq!(settings.spans, read(&[]).spans);
            assert_eq!(
                (settings.metric_interval, settings.traces.timeout),
                (read(&[]).metric_interval, read(&[]).traces.timeout)
            );
        }
    }

    #[test]
    fn an_export_has_the_shorter_time_of_its_exporter_and_its_processor() {
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
    fn samplers_are_read_in_any_case_and_their_ratio_is_checked() {
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
    }
}
