//! The settings of the SDK, as given by the `OTEL_*` variables.

use std::ffi::OsStr;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::trace::{Sampler, SpanLimits};

use super::env::{Lookup, Variables, decode};
use super::error::InitError;
use super::propagators::Propagator;
use super::signal::Signal;
use super::{propagators, unsupported};

/// The settings given by the environment.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) disabled: bool,
    pub(super) propagators: Vec<Propagator>,
    pub(super) traces: Signal,
    pub(super) metrics: Signal,
    pub(super) logs: Signal,
    pub(super) sampler: Sampler,
    pub(super) span_limits: SpanLimits,
    pub(super) spans: BatchLimits,
    pub(super) records: BatchLimits,
    pub(super) metric_interval: Duration,
    pub(super) temporality: Temporality,
    /// Whether histograms are exponential.
    pub(super) exponential: bool,
    /// The attributes of the resource, `service.name` among them.
    pub(super) resource: Vec<KeyValue>,
    /// One line for each variable that is invalid or has no effect.
    pub(super) warnings: Vec<String>,
}

/// The bounds of a batch processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchLimits {
    pub(super) queue: usize,
    pub(super) most: usize,
    pub(super) delay: Duration,
}

impl Settings {
    pub(super) fn from_env() -> Result<Self, InitError> {
        Self::read(&|name| std::env::var(name).ok())
    }

    /// Reads the settings from any source of variables.
    pub(super) fn read(lookup: Lookup<'_>) -> Result<Self, InitError> {
        unsupported::refuse_config_file(lookup)?;
        let mut variables = Variables::new(lookup);
        let env = &mut variables;
        unsupported::warn(env);
        let settings = Self {
            disabled: env.flag("OTEL_SDK_DISABLED"),
            propagators: propagators::read(env),
            traces: Signal::read(env, "traces", "OTEL_BSP_EXPORT_TIMEOUT"),
            metrics: Signal::read(env, "metrics", "OTEL_METRIC_EXPORT_TIMEOUT"),
            logs: Signal::read(env, "logs", "OTEL_BLRP_EXPORT_TIMEOUT"),
            sampler: sampler(env),
            span_limits: span_limits(env),
            spans: batch(env, "BSP", 5_000),
            records: batch(env, "BLRP", 1_000),
            metric_interval: Duration::from_millis(env.positive("OTEL_METRIC_EXPORT_INTERVAL", 60_000)),
            temporality: temporality(env),
            exponential: env.choice(
                "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
                &[("explicit_bucket_histogram", false), ("base2_exponential_bucket_histogram", true)],
            ),
            resource: resource(env),
            warnings: Vec::new(),
        };
        warn_of_unused_certificates(env, [&settings.traces, &settings.metrics, &settings.logs]);
        Ok(Self { warnings: variables.into_warnings(), ..settings })
    }
}

/// Warns of certificates that nothing uses: whoever gives one expects encryption.
fn warn_of_unused_certificates(env: &mut Variables<'_>, signals: [&Signal; 3]) {
    if signals.iter().any(|signal| signal.is_encrypted()) {
        return;
    }
    for variable in signals.into_iter().flat_map(|signal| signal.tls.variables()) {
        env.warn(format!("{variable} has no effect: the endpoint is not encrypted; use one with https"));
    }
}

fn batch(env: &mut Variables<'_>, kind: &str, delay: u64) -> BatchLimits {
    let queue = env.positive(&format!("OTEL_{kind}_MAX_QUEUE_SIZE"), 2_048);
    let most = env.positive(&format!("OTEL_{kind}_MAX_EXPORT_BATCH_SIZE"), 512_usize);
    let delay = env.whole(&format!("OTEL_{kind}_SCHEDULE_DELAY"), delay);
    // Without any delay, the SDK's thread would keep a core busy.
    BatchLimits { queue, most: most.min(queue), delay: Duration::from_millis(delay.max(1)) }
}

fn temporality(env: &mut Variables<'_>) -> Temporality {
    let choices = [
        ("cumulative", Temporality::Cumulative),
        ("delta", Temporality::Delta),
        ("lowmemory", Temporality::LowMemory),
    ];
    env.choice("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", &choices)
}

/// Reads the limits of spans. The general limit of attributes is the default of the other ones.
fn span_limits(env: &mut Variables<'_>) -> SpanLimits {
    let attributes = env.whole("OTEL_ATTRIBUTE_COUNT_LIMIT", 128);
    SpanLimits {
        max_attributes_per_span: env.whole("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", attributes),
        max_events_per_span: env.whole("OTEL_SPAN_EVENT_COUNT_LIMIT", 128),
        max_links_per_span: env.whole("OTEL_SPAN_LINK_COUNT_LIMIT", 128),
        max_attributes_per_event: env.whole("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", attributes),
        max_attributes_per_link: env.whole("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT", attributes),
    }
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

/// Reads the attributes of the resource, and the name of the service. The SDK would not decode them, and would take the
/// name from an invalid list as well.
fn resource(env: &mut Variables<'_>) -> Vec<KeyValue> {
    let name = env.get("OTEL_SERVICE_NAME");
    let mut attributes = attributes(env);
    let is_name = |attribute: &KeyValue| attribute.key.as_str() == "service.name";
    if let Some(name) = name.or_else(|| (!attributes.iter().any(is_name)).then(unknown_service)) {
        attributes.retain(|attribute| !is_name(attribute));
        attributes.push(KeyValue::new("service.name", name));
    }
    attributes
}

fn unknown_service() -> String {
    let path = std::env::current_exe().ok();
    let program = path.as_ref().and_then(|path| path.file_name()).and_then(OsStr::to_str);
    program.map_or_else(|| "unknown_service".to_owned(), |program| format!("unknown_service:{program}"))
}

fn attributes(env: &mut Variables<'_>) -> Vec<KeyValue> {
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

#[cfg(test)]
impl Settings {
    /// Reads the settings from these variables instead of the environment.
    pub(super) fn of(variables: &[(&str, &str)]) -> Self {
        let lookup =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Self::read(&lookup).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::otlp::InitErrorKind;
    use crate::otlp::propagators::Propagator;
    use crate::otlp::signal::{Exporter, Protocol};

    #[test]
    fn unset_variables_give_the_defaults_of_the_specification() {
        let settings = Settings::of(&[("OTEL_TRACES_EXPORTER", ""), ("OTEL_BSP_MAX_QUEUE_SIZE", " ")]);
        assert!(!settings.disabled && settings.warnings.is_empty());
        assert_eq!(settings.traces.exporters, [Exporter::Otlp]);
        assert_eq!(settings.logs.protocol, Protocol::HttpProtobuf);
        assert_eq!(settings.spans, BatchLimits { queue: 2_048, most: 512, delay: Duration::from_secs(5) });
        assert_eq!(settings.records.delay, Duration::from_secs(1));
        assert_eq!(settings.metric_interval, Duration::from_secs(60));
        assert!(matches!(settings.sampler, Sampler::ParentBased(_)));
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
            ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
            ("OTEL_PROPAGATORS", "smoke"),
            ("OTEL_SPAN_EVENT_COUNT_LIMIT", "few"),
            ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "sometimes"),
            ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "round"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "never"),
            ("OTEL_RESOURCE_ATTRIBUTES", "team=a%zz"),
        ] {
            let settings = Settings::of(&[(name, value)]);
            let warnings: Vec<_> =
                settings.warnings.iter().filter(|warning| warning.contains(name)).collect();
            assert_eq!((warnings.len(), settings.warnings.len()), (1, 1), "{name}");
            assert!(!settings.disabled && settings.traces.exporters == [Exporter::Otlp]);
            assert_eq!(
                (settings.spans, settings.propagators),
                (Settings::of(&[]).spans, Settings::of(&[]).propagators)
            );
            assert_eq!(
                (settings.metric_interval, settings.traces.timeout),
                (Settings::of(&[]).metric_interval, Settings::of(&[]).traces.timeout)
            );
        }
    }

    #[test]
    fn sampler_names_ignore_case_and_ratios_are_checked() {
        let sampler = |value, ratio| {
            format!(
                "{:?}",
                Settings::of(&[("OTEL_TRACES_SAMPLER", value), ("OTEL_TRACES_SAMPLER_ARG", ratio)]).sampler
            )
        };
        assert_eq!(sampler("TraceIdRatio", "0.25"), "TraceIdRatioBased(0.25)");
        assert_eq!(sampler("traceidratio", "7"), "TraceIdRatioBased(1.0)");
        assert_eq!(sampler("always_off", ""), "AlwaysOff");
        assert_eq!(sampler("parentbased_always_off", ""), "ParentBased(AlwaysOff)");
    }

    #[test]
    fn resource_attributes_are_percent_decoded() {
        let settings = Settings::of(&[("OTEL_RESOURCE_ATTRIBUTES", "team=a%2Cb%20c, zone = eu")]);
        assert_eq!(settings.resource[..2], [KeyValue::new("team", "a,b c"), KeyValue::new("zone", "eu")]);
    }

    #[test]
    fn invalid_list_of_resource_attributes_is_ignored_with_its_service_name() {
        let name = |list, name| {
            let settings = Settings::of(&[("OTEL_RESOURCE_ATTRIBUTES", list), ("OTEL_SERVICE_NAME", name)]);
            let names = settings.resource.iter().filter(|attribute| attribute.key.as_str() == "service.name");
            names.map(|attribute| attribute.value.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(name("service.name=shop,team=a", ""), ["shop"]);
        assert_eq!(name("service.name=shop,team=a", "store"), ["store"]);
        let invalid = name("service.name=shop,team=a%zz", "");
        assert!(invalid.len() == 1 && invalid[0].starts_with("unknown_service:"), "{invalid:?}");
    }

    #[test]
    fn propagators_are_listed_once_and_unknown_ones_are_ignored() {
        let of = |value| Settings::of(&[("OTEL_PROPAGATORS", value)]);
        assert_eq!(of("Baggage, baggage").propagators, [Propagator::Baggage]);
        assert_eq!(of("none").propagators, []);
        assert_eq!(
            (of("b3,tracecontext").propagators, of("b3,none").propagators),
            (vec![Propagator::TraceContext], vec![])
        );
        assert_eq!(
            of("none").warnings.len() + of("b3,none").warnings.len() + of("b3,jaeger").warnings.len(),
            2
        );
    }

    #[test]
    fn batches_without_delay_are_exported_almost_at_once() {
        let spans = Settings::of(&[("OTEL_BSP_SCHEDULE_DELAY", "0")]);
        assert_eq!((spans.spans.delay, spans.warnings.len()), (Duration::from_millis(1), 0));
    }

    #[test]
    fn general_limit_of_attributes_is_the_default_of_the_others() {
        let limits =
            Settings::of(&[("OTEL_ATTRIBUTE_COUNT_LIMIT", "7"), ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "3")])
                .span_limits;
        assert_eq!((limits.max_attributes_per_span, limits.max_attributes_per_link), (7, 7));
        assert_eq!((limits.max_attributes_per_event, limits.max_events_per_span), (3, 128));
    }

    #[test]
    fn configuration_file_is_refused() {
        for name in ["OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE"] {
            let error = Settings::read(&|asked| (asked == name).then(|| "otel.yaml".to_owned())).unwrap_err();
            assert_eq!(error.kind(), InitErrorKind::Configuration);
            assert!(error.to_string().starts_with(&format!("{name} is set: ")), "{error}");
        }
    }

    /// Returns the variables that `docs/environment.md` documents with a default.
    fn documented_defaults() -> Vec<(&'static str, &'static str)> {
        let rows =
            include_str!("../../docs/environment.md").lines().filter(|line| line.starts_with("| `OTEL_"));
        // The first two texts in backquotes, in different cells.
        let default = |row: &'static str| {
            let mut cells = row.split(" | ");
            let (name, value) = (cells.next()?.trim_matches(['|', ' ', '`']), cells.next()?);
            let value = value.strip_prefix('`')?.split('`').next()?;
            Some((name, value))
        };
        rows.filter_map(default).collect()
    }

    #[test]
    fn documented_defaults_are_those_in_effect() {
        let mut documented = documented_defaults();
        // The program is not named.
        documented.retain(|(name, _)| *name != "OTEL_SERVICE_NAME");
        assert!(documented.len() > 25, "{documented:?}");
        assert_eq!(format!("{:?}", Settings::of(&documented)), format!("{:?}", Settings::of(&[])));
    }
}
