//! Checks `docker-compose.yml` and the files it mounts, without a container runtime.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use backends::{Collector, Postgres, collector_program, go, http, wait_until};
use serde_json::{Value, json};

/// A program around Docker Compose's own loader.
const COMPOSECHECK: go::Module = go::Module {
    name: "composecheck",
    files: &[
        ("go.mod", include_str!("../composecheck/go.mod")),
        ("go.sum", include_str!("../composecheck/go.sum")),
        ("main.go", include_str!("../composecheck/main.go")),
    ],
    packages: &[],
    tags: "",
    build_time: "15 seconds",
};

const TIMEOUT: Duration = Duration::from_secs(20);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the repository").to_owned()
}

/// Loads a Compose file and returns the resulting project, or the loader's error.
fn compose(file: &Path) -> Result<Value, String> {
    let program = COMPOSECHECK.program().expect("composecheck builds");
    // A port or password in the environment of this test would override the file.
    let output = Command::new(program).arg(file).env_clear().output().expect("composecheck runs");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).expect("composecheck prints JSON"))
}

/// Returns the services of `docker-compose.yml` by name.
fn services() -> Vec<(String, Value)> {
    let project = compose(&root().join("docker-compose.yml")).expect("docker-compose.yml loads");
    let services = project["services"].as_object().expect("the project has services");
    services.iter().map(|(name, service)| (name.clone(), service.clone())).collect()
}

fn list<'a>(service: &'a Value, key: &str) -> &'a [Value] {
    service[key].as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn every_published_port_is_on_loopback() {
    let mut published = Vec::new();
    for (name, service) in services() {
        for port in list(&service, "ports") {
            assert_eq!(port["host_ip"], "127.0.0.1", "{name}: {port}");
            published.push(port["published"].as_str().unwrap().to_owned());
        }
    }
    for port in ["5432", "4317", "4318", "9090", "3200", "3000"] {
        assert!(published.iter().any(|published| published == port), "{port} is missing in {published:?}");
    }
}

#[test]
fn every_image_is_pinned_to_a_version_and_every_log_is_bounded() {
    for (name, service) in services() {
        let (_, tag) = service["image"].as_str().unwrap().rsplit_once(':').expect("an image has a tag");
        let numbers =
            tag.trim_start_matches('v').split('.').filter(|part| part.parse::<u32>().is_ok()).count();
        assert!(numbers >= 2, "{name}: {tag}");
        assert_eq!(service["logging"]["options"]["max-size"], "10m", "{name}");
    }
}

#[test]
fn every_mounted_file_exists() {
    let mut mounted = Vec::new();
    for (name, service) in services() {
        for mount in list(&service, "volumes").iter().filter(|mount| mount["type"] == "bind") {
            let source = PathBuf::from(mount["source"].as_str().unwrap());
            assert!(source.exists(), "{name}: {}", source.display());
            assert_eq!(mount["read_only"], true, "{name}: {}", source.display());
            mounted.push(source);
        }
    }
    assert!(mounted.contains(&root().join("otel-collector.yaml")), "{mounted:?}");
    assert!(mounted.contains(&root().join("deploy/postgres/seed.sql")), "{mounted:?}");
}

#[test]
fn rules_and_dashboards_are_mounted_where_their_readers_look() {
    let services = services();
    let mount = |name: &str, source: &str| {
        let (_, service) = services.iter().find(|service| service.0 == name).expect("the service exists");
        let source = root().join(source).display().to_string();
        let mounts = list(service, "volumes").iter().find(|mount| mount["source"] == source);
        mounts.and_then(|mount| mount["target"].as_str()).unwrap_or_default().to_owned()
    };
    assert_eq!(mount("prometheus", "deploy/prometheus"), "/etc/prometheus");
    let provider = "deploy/grafana/provisioning/dashboards";
    assert_eq!(mount("grafana", provider), "/etc/grafana/provisioning/dashboards");
    let provider = std::fs::read_to_string(root().join(provider).join("dashboards.yaml")).unwrap();
    assert!(provider.contains(&format!("path: {}\n", mount("grafana", "deploy/grafana/dashboards"))));
}

#[test]
fn anonymous_visitors_of_grafana_cannot_change_anything() {
    let services = services();
    let (_, grafana) = services.iter().find(|service| service.0 == "grafana").unwrap();
    assert_eq!(grafana["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"], "Viewer");
}

#[test]
fn invalid_compose_file_is_rejected() {
    let folder = std::env::temp_dir().join(format!("fraiseql-compose-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("docker-compose.yml");
    std::fs::write(&file, "services: {one: {image: \"one:1.0\", depends_on: [two]}}\n").unwrap();
    let result = compose(&file);
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(result.unwrap_err().contains("two"));
}

#[test]
fn seed_script_creates_the_orders_that_the_examples_stream() {
    let server = Postgres::start().unwrap();
    let script = std::fs::read_to_string(root().join("deploy/postgres/seed.sql")).unwrap();
    server.psql("postgres", &script).unwrap();
    let query = |sql| server.psql("postgres", sql).unwrap();
    assert_eq!(query("SELECT count(*) FROM orders"), "200000\n");
    assert_eq!(query("SELECT count(DISTINCT data->>'status') FROM orders"), "4\n");
    assert_eq!(query("SELECT count(*) FROM orders WHERE (data->>'id')::bigint <> id"), "0\n");
    assert_eq!(
        query("SELECT bool_and(jsonb_array_length(data->'lines') BETWEEN 1 AND 5) FROM orders"),
        "t\n"
    );
}

/// A collector with the configuration for users, on free ports.
struct UsersCollector {
    child: Child,
    http: u16,
    prometheus: u16,
}

impl UsersCollector {
    fn start(tempo: &str) -> Self {
        let listeners: Vec<_> =
            (0..4).map(|_| TcpListener::bind("127.0.0.1:0").expect("there is a free port")).collect();
        let ports: Vec<u16> =
            listeners.iter().map(|one| one.local_addr().expect("the listener is bound").port()).collect();
        drop(listeners);
        let names = ["OTLP_GRPC_ENDPOINT", "OTLP_HTTP_ENDPOINT", "PROMETHEUS_ENDPOINT", "HEALTH_ENDPOINT"];
        let mut command = Command::new(collector_program().expect("there is a collector"));
        command.arg("--config").arg(root().join("otel-collector.yaml")).env("TEMPO_ENDPOINT", tempo);
        // Its own metrics would use port 8888, which may be taken.
        command.args(["--config", "yaml:service::telemetry::metrics::level: none"]);
        command.envs(names.iter().zip(&ports).map(|(name, port)| (name, format!("127.0.0.1:{port}"))));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let collector =
            Self { child: child.expect("the collector runs"), http: ports[1], prometheus: ports[2] };
        let healthy = || http::get(ports[3], "/").is_ok_and(|(status, _)| status == 200);
        assert!(wait_until(TIMEOUT, healthy), "the collector does not start with otel-collector.yaml");
        collector
    }

    fn send(&self, signal: &str, body: &Value) {
        let (status, answer) = http::post_json(self.http, &format!("/v1/{signal}"), &body.to_string())
            .expect("the collector answers");
        assert_eq!(status, 200, "{answer}");
    }
}

impl Drop for UsersCollector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn collector_exposes_documented_metric_names_and_forwards_traces() {
    // Another collector takes the place of Tempo and keeps what it receives.
    let tempo = Collector::start().unwrap();
    let collector = UsersCollector::start(tempo.grpc_endpoint().trim_start_matches("http://"));
    let resource = json!({"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]});
    let point = json!({
        "attributes": [{"key": "entity", "value": {"stringValue": "orders"}}],
        "timeUnixNano": "2000000000", "count": "1", "sum": 7, "explicitBounds": [10], "bucketCounts": ["1", "0"],
    });
    let histogram = json!({"aggregationTemporality": 2, "dataPoints": [point]});
    let metric = json!({"name": "fraiseql_channel_occupancy_rows", "unit": "{row}", "histogram": histogram});
    let scope = json!({"scope": {"name": "fraiseql-stream"}, "metrics": [metric]});
    collector.send("metrics", &json!({"resourceMetrics": [{"resource": resource, "scopeMetrics": [scope]}]}));
    let (trace, id) = ("0af7651916cd43dd8448eb211c80319c", "0102030405060708");
    let span = json!({"traceId": trace, "spanId": id, "name": "SELECT orders", "startTimeUnixNano": "1", "endTimeUnixNano": "2"});
    let scope = json!({"spans": [span]});
    collector.send("traces", &json!({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}));

    let line = r#"fraiseql_channel_occupancy_rows_bucket{entity="orders",job="shop",le="10"} 1"#;
    let exposed = || http::get(collector.prometheus, "/metrics").unwrap().1;
    assert!(wait_until(TIMEOUT, || exposed().lines().any(|exposed| exposed == line)), "{}", exposed());
    assert!(
        wait_until(TIMEOUT, || tempo.spans().iter().any(|span| span.trace_id == trace)),
        "{}",
        tempo.debug_log()
    );
}
