//! The private Prometheus server: it works, and it never outlives its owner.

use std::process::Command;
use std::time::Duration;

use backends::{Prometheus, http, promtool_program, wait_until};

const TIMEOUT: Duration = Duration::from_secs(10);

const CONFIG: &str = "global: {evaluation_interval: 100ms}\nrule_files: [rules.yml]\n";
const RULES: &str = "groups: [{name: one, rules: [{record: 'job:two', expr: 'vector(1) + 1'}]}]\n";

#[test]
fn server_evaluates_its_rules_and_is_gone_after_drop() {
    let server = Prometheus::start(&[("prometheus.yml", CONFIG), ("rules.yml", RULES)], &[]).unwrap();
    let recorded = || server.query("job:two{} > 1").unwrap();
    assert!(wait_until(TIMEOUT, || !recorded().is_empty()), "{}", server.log());
    assert_eq!(recorded()[0]["value"][1], "2");
    let error = server.query("job:two +").unwrap_err().to_string();
    assert!(error.contains("unexpected end of input"), "{error}");
    let port = server.port();
    drop(server);
    assert!(http::get(port, "/").is_err());
}

#[test]
fn server_with_an_invalid_configuration_reports_why() {
    let error = Prometheus::start(&[("prometheus.yml", "nonsense: 1\n")], &[]).unwrap_err().to_string();
    assert!(error.contains("field nonsense not found"), "{error}");
}

#[test]
fn promtool_is_there() {
    let output = Command::new(promtool_program().unwrap()).arg("--help").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
