//! Alerts, runbook and the configuration of the stack agree.

use crate::files::{read, yaml_values};

const ALERTS: &str = "deploy/prometheus/alerts.yml";
const LINK: &str = "https://github.com/fraiseql/fraiseql-stream/blob/main/docs/runbook.md#";

#[test]
fn each_alert_links_to_its_own_section_of_the_runbook() {
    let (alerts, runbook) = (read(ALERTS), read("docs/runbook.md"));
    let names = yaml_values(&alerts, "alert");
    let links: Vec<_> = names.iter().map(|name| format!("{LINK}{}", name.to_lowercase())).collect();
    assert_eq!(yaml_values(&alerts, "runbook_url"), links);
    let sections: Vec<_> = runbook.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(sections, names);
}

#[test]
fn each_alert_has_a_severity_a_figure_and_a_reason_for_its_duration() {
    let alerts = read(ALERTS);
    for alert in alerts.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap_or_default();
        let severities = ["info", "warning", "critical"].map(|level| format!("severity: {level} }}"));
        assert!(severities.iter().any(|severity| alert.contains(severity)), "{name}");
        assert!(yaml_values(alert, "summary")[0].contains("$value"), "{name}");
        let lines: Vec<_> = alert.lines().map(str::trim).collect();
        let duration = lines.iter().position(|line| line.starts_with("for: ")).expect(name);
        assert!(lines[duration - 1].starts_with("# "), "{name}");
    }
}

#[test]
fn links_within_the_documents_lead_to_a_section() {
    let runbook = read("docs/runbook.md");
    let sections: Vec<_> =
        runbook.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_lowercase).collect();
    for link in runbook.split("](#").skip(1).filter_map(|rest| rest.split(')').next()) {
        assert!(sections.iter().any(|section| section == link), "{link}");
    }
    assert!(read("README.md").contains("](docs/runbook.md)"));
}

/// Returns a duration such as `60s` in seconds.
fn seconds(duration: &str) -> u64 {
    duration.strip_suffix('s').and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{duration}"))
}

#[test]
fn rates_span_several_exports_of_a_service_with_the_default_interval() {
    let default = 60;
    let data_sources = read("deploy/grafana/provisioning/datasources/datasources.yaml");
    let config = read("deploy/prometheus/prometheus.yml");
    let scrape = seconds(yaml_values(&config, "scrape_interval")[0]);
    // `$__rate_interval` is at least four times this, and `[5m]` of the rules five times the default.
    let least = seconds(yaml_values(&data_sources, "timeInterval")[0]);
    assert!(least >= default && least >= scrape, "{least}");
    // Nothing is exported more often than it is scraped.
    let (readme, compose) = (read("README.md"), read("docker-compose.yml"));
    for text in [readme, compose] {
        let interval = format!("OTEL_METRIC_EXPORT_INTERVAL={scrape}000");
        assert!(text.contains(&interval), "{interval} is missing");
    }
}
