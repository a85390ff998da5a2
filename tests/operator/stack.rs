//! The stack that all tests share: Postgres, a service, the collector and a Prometheus with the users' configuration.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use backends::{Collector, Postgres, Prometheus, wait_until};
use serde_json::Value;

use crate::files::read;
use crate::service::Service;
use crate::streams::SCHEMA;

const TIMEOUT: Duration = Duration::from_secs(120);

/// The alerts that the streams are made for, with job and entity, if they have one.
pub(crate) const EXPECTED: [(&str, &str, &str); 14] = [
    ("FraiseqlConsumerBound", "shop", "slow_sink"),
    ("FraiseqlConsumerBound", "shop", "large"),
    ("FraiseqlConsumerBound", "shop", "held"),
    ("FraiseqlChannelOccupancyHigh", "shop", "slow_sink"),
    ("FraiseqlChannelFullByBytes", "shop", "large"),
    ("FraiseqlSourceBound", "shop", "slow_view"),
    ("FraiseqlRuntimeStarved", "shop", "starved"),
    ("FraiseqlStreamStalled", "shop", "held"),
    ("FraiseqlStreamsFail", "shop", "broken"),
    ("FraiseqlQueriesRefused", "shop", ""),
    ("FraiseqlRowsFail", "shop", "odd"),
    ("FraiseqlEntityOverflow", "shop", ""),
    ("FraiseqlExporterSilent", "direct", ""),
    ("FraiseqlCollectorDown", "collector", ""),
];

pub(crate) struct Stack {
    pub(crate) prometheus: Prometheus,
    /// The library's own verdicts on the streams, by entity.
    pub(crate) verdicts: BTreeMap<String, String>,
    _service: Service,
    pub(crate) collector: Collector,
    pub(crate) postgres: Postgres,
}

/// Returns the stack once every expected alert fires.
pub(crate) fn stack() -> &'static Stack {
    static STACK: OnceLock<Stack> = OnceLock::new();
    STACK.get_or_init(Stack::start)
}

impl Stack {
    fn start() -> Self {
        let postgres = Postgres::start().expect("a private Postgres");
        postgres.psql("postgres", SCHEMA).expect("the schema is valid");
        let collector = Collector::start().expect("a collector");
        let prometheus = prometheus(collector.prometheus_port());
        let endpoint = format!("{}/v1/metrics", collector.http_endpoint());
        let mut service = Service::start("shop", "all", &postgres.url(), &endpoint);
        let direct = prometheus.otlp_metrics_endpoint();
        let direct = Service::start("direct", "slow_sink", &postgres.url(), &direct);
        // The wait for its first row weighs less and less.
        let verdict =
            "job_entity:fraiseql_stream_verdict:ratio5m{job='direct', verdict='consumer_bound'} > 0.6";
        let is_received = || prometheus.query(verdict).is_ok_and(|series| !series.is_empty());
        assert!(wait_until(TIMEOUT, is_received), "nothing arrives by OTLP: {}", prometheus.log());
        // From here on, this job is silent.
        direct.end();
        let missing = || {
            let firing = firing(&prometheus);
            let fires = |expected: &(&str, &str, &str)| {
                firing.iter().any(|(alert, job, entity)| (&**alert, &**job, &**entity) == *expected)
            };
            EXPECTED.into_iter().filter(|expected| !fires(expected)).collect::<Vec<_>>()
        };
        assert!(
            wait_until(TIMEOUT, || missing().is_empty()),
            "{:?} do not fire: {:#?}",
            missing(),
            firing(&prometheus)
        );
        let verdicts = service.verdicts();
        Self { prometheus, verdicts, _service: service, collector, postgres }
    }
}

/// Starts a Prometheus with the users' configuration at a faster pace. It scrapes the collector, and another one that is
/// down.
fn prometheus(collector: u16) -> Prometheus {
    let config = read("deploy/prometheus/prometheus.yml");
    let config = replaced(
        &config,
        &[
            ("[collector:8889]", &format!("['127.0.0.1:{collector}', '127.0.0.1:1']")),
            ("scrape_interval: 5s", "scrape_interval: 500ms"),
            ("evaluation_interval: 15s", "evaluation_interval: 500ms"),
        ],
    );
    // The expressions stay as they are, except for five minutes of silence, which would take too long. `[5m]` is not shortened:
    // a rate extends what it has seen, and the shares are ratios of rates.
    let alerts = replaced(
        &read("deploy/prometheus/alerts.yml"),
        &[
            ("seconds) > 300", "seconds) > 3"),
            ("for: 30s", "for: 1s"),
            ("for: 15m", "for: 1s"),
            ("for: 5m", "for: 1s"),
            ("for: 1m", "for: 1s"),
        ],
    );
    let rules = read("deploy/prometheus/rules.yml");
    let files = [("prometheus.yml", config), ("alerts.yml", alerts), ("rules.yml", rules)];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    let users = read("docker-compose.yml");
    let features = yaml_options(&users).filter(|option| option.starts_with("--enable-feature="));
    // A series that ends is forgotten as quickly.
    let options: Vec<&str> = features.chain(["--query.lookback-delta=3s"]).collect();
    Prometheus::start(&files, &options).expect("a private Prometheus")
}

/// Returns the items of YAML lists that are command-line options.
fn yaml_options(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.trim_start().strip_prefix("- ")).filter(|item| item.starts_with("--"))
}

fn replaced(text: &str, replacements: &[(&str, &str)]) -> String {
    replacements.iter().fold(text.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "the file has no {old:?}");
        text.replace(old, new)
    })
}

/// Returns the firing alerts, as name, job and entity.
pub(crate) fn firing(prometheus: &Prometheus) -> Vec<(String, String, String)> {
    let alerts = prometheus.api("alerts").expect("Prometheus answers");
    let alerts = alerts["alerts"].as_array().expect("a list of alerts");
    let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
    let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
    firing.map(|alert| (label(alert, "alertname"), label(alert, "job"), label(alert, "entity"))).collect()
}
