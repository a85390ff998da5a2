//! The recording rules and alerts, evaluated by promtool.

use std::path::PathBuf;
use std::process::Command;

use fraiseql_stream::Shares;

use crate::files::{path, yaml_values};

const RULES: &str = "deploy/prometheus/rules.yml";
const ALERTS: &str = "deploy/prometheus/alerts.yml";

fn promtool(arguments: &[&str]) -> Result<String, String> {
    let program = backends::promtool_program().expect("promtool");
    let output = Command::new(program).args(arguments).output().expect("promtool runs");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

/// Returns the files of tests, each named after its alert.
fn test_files() -> Vec<PathBuf> {
    let folder = path("tests/operator/rules").read_dir().expect("a folder of tests");
    folder.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn configuration_is_valid_and_loads_rules_and_alerts() {
    let config = path("deploy/prometheus/prometheus.yml");
    let output = promtool(&["check", "config", config.to_str().unwrap()]).unwrap();
    assert_eq!(output.matches(" rules found").count(), 2, "{output}");
}

#[test]
fn each_alert_fires_for_its_reason_only_and_resolves() {
    let files: Vec<String> = test_files().iter().map(|file| file.display().to_string()).collect();
    let arguments: Vec<&str> =
        ["test", "rules"].into_iter().chain(files.iter().map(String::as_str)).collect();
    promtool(&arguments).unwrap_or_else(|output| panic!("{output}"));
}

#[test]
fn each_alert_has_a_test_that_expects_it_to_fire_and_not_to_fire() {
    let tests: Vec<String> =
        test_files().iter().map(|file| std::fs::read_to_string(file).expect("UTF-8")).collect();
    let alerts = crate::files::read(ALERTS);
    for alert in yaml_values(&alerts, "alert") {
        let test = tests.iter().find(|test| test.contains(&format!("alertname: {alert}")));
        let test = test.unwrap_or_else(|| panic!("no test of {alert}"));
        let silent = format!("alertname: {alert}, eval_time: ");
        let silent = test.lines().filter(|line| line.contains(&silent) && line.contains("exp_alerts: []"));
        assert!(silent.count() >= 2, "{alert} must not fire at first, and resolve");
        let fires = test.lines().filter(|line| line.trim() == format!("- alertname: {alert}"));
        assert!(fires.count() >= 1 && test.contains("exp_labels"), "{alert} must fire");
    }
}

/// Returns shares in steps of a twentieth, except for those at a limit of the rule, where a rounding error decides.
fn shares() -> Vec<Shares> {
    let mut found = Vec::new();
    for (backlog, source_wait) in (0..=20).flat_map(|one| (0..=20 - one).map(move |two| (one, two))) {
        for scheduled in 0..=20 - backlog - source_wait {
            let mut sides = [backlog, source_wait, scheduled];
            sides.sort_unstable();
            let [_, next, largest] = sides;
            if largest == 2 || largest == 2 * next || sides.iter().sum::<i32>() == 10 {
                continue;
            }
            let share = |twentieths: i32| f64::from(twentieths) / 20.0;
            let mut shares = Shares::default();
            (shares.backlog, shares.source_wait) = (share(backlog), share(source_wait));
            shares.scheduled = share(scheduled);
            shares.overlap = share(20 - backlog - source_wait - scheduled);
            found.push(shares);
        }
    }
    found
}

/// Returns the series of a stream with these shares, as promtool expects them.
fn series(entity: usize, shares: &Shares) -> String {
    let time = "fraiseql_stream_time_seconds_total";
    let busy = shares.backlog + shares.overlap;
    let series = [
        (time, ", state=\"source_wait\"", shares.source_wait),
        (time, ", state=\"scheduled\"", shares.scheduled),
        (time, ", state=\"decode\"", busy / 4.0),
        (time, ", state=\"consumer\"", busy * 3.0 / 4.0),
        (time, ", state=\"paused\"", 2.0),
        ("fraiseql_channel_backlog_time_seconds_total", "", shares.backlog),
    ];
    let line = |(name, state, share): (&str, &str, f64)| {
        let series = format!("{name}{{job=\"shop\", entity=\"{entity}\"{state}}}");
        format!("      - {{series: '{series}', values: '0+{}x6'}}\n", 60.0 * share)
    };
    series.map(line).concat()
}

/// Returns the verdict that is to be recorded for a stream with these shares.
fn verdict(entity: usize, shares: &Shares) -> String {
    let (verdict, value) = (shares.verdict().as_str(), shares.dominant());
    let labels = format!("{{job=\"shop\", entity=\"{entity}\", verdict=\"{verdict}\"}}");
    format!("          - {{labels: '{labels}', value: {value:.2}}}\n")
}

/// Returns a promtool test that expects the library's verdict on the streams of each entity.
fn test_of(all: &[Shares]) -> String {
    let lines = |line: fn(usize, &Shares) -> String| -> String {
        all.iter().enumerate().map(|(entity, shares)| line(entity, shares)).collect()
    };
    format!(
        "rule_files: [{}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
{}    promql_expr_test:
      - expr: round(job_entity:fraiseql_stream_verdict:ratio5m, 0.01)
        eval_time: 5m
        exp_samples:
{}",
        path(RULES).display(),
        lines(series),
        lines(verdict)
    )
}

#[test]
fn recorded_verdict_is_that_of_the_library_for_all_shares() {
    let all = shares();
    assert!(all.len() > 1_000, "{}", all.len());
    let file = std::env::temp_dir().join(format!("fraiseql-verdicts-{}.yml", std::process::id()));
    std::fs::write(&file, test_of(&all)).unwrap();
    let result = promtool(&["test", "rules", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    result.unwrap_or_else(|output| panic!("{output:.5000}"));
}
