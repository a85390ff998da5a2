//! The recorded rules, the alerts and every documented expression, on the metrics of real streams.

use std::collections::BTreeMap;

use backends::http;
use serde_json::Value;

use crate::files::{dashboards, documented_expressions, expressions, panels, read, yaml_values};
use crate::stack::{EXPECTED, firing, stack};

/// Returns the values of an expression, by the label `entity`.
fn values(expression: &str) -> Vec<(String, f64)> {
    let series = stack().prometheus.query(expression).expect("a valid expression");
    let entity = |series: &Value| series["metric"]["entity"].as_str().unwrap_or_default().to_owned();
    let value = |series: &Value| series["value"][1].as_str().expect("a value").parse().expect("a number");
    series.iter().map(|series| (entity(series), value(series))).collect()
}

fn value(expression: &str) -> f64 {
    let values = values(expression);
    assert_eq!(values.len(), 1, "{expression}: {values:?}");
    values[0].1
}

/// Returns the recorded verdicts on an entity.
fn verdicts(job: &str, entity: &str) -> Vec<String> {
    let series = format!("job_entity:fraiseql_stream_verdict:ratio5m{{job='{job}', entity='{entity}'}}");
    let series = stack().prometheus.query(&series).expect("a valid expression");
    series.iter().map(|series| series["metric"]["verdict"].as_str().expect("a verdict").to_owned()).collect()
}

#[test]
fn recorded_rule_names_the_verdict_of_each_stream() {
    for (entity, expected) in [
        ("slow_sink", &["consumer_bound"][..]),
        ("slow_view", &["source_bound"]),
        ("starved", &["runtime_bound"]),
        // Where Postgres and its consumer share two processors with other programs, it varies which of them is late.
        ("fast", &["source_bound", "balanced", "mixed", "runtime_bound"]),
    ] {
        let verdicts = verdicts("shop", entity);
        assert_eq!(verdicts.len(), 1, "{entity}: {verdicts:?}");
        assert!(expected.contains(&verdicts[0].as_str()), "{entity}: {verdicts:?}");
        if entity != "fast" {
            assert_eq!(stack().verdicts[entity], verdicts[0], "{entity}");
        }
    }
}

#[test]
fn recorded_shares_add_up_to_one() {
    // At the beginning of a series, `rate` extends it by up to half a scrape interval, or back to zero.
    for (entity, sum) in values("sum by (job, entity) (job_entity:fraiseql_stream_share:ratio5m{job='shop'})")
    {
        assert!((sum - 1.0).abs() < 0.05, "{entity}: {sum}");
    }
}

#[test]
fn occupancy_arrives_by_the_collector_and_by_the_otlp_receiver() {
    for job in ["shop", "direct"] {
        let all = format!(
            "sum by (entity) (max_over_time(fraiseql_channel_occupancy_rows_bucket{{job='{job}', entity='slow_sink', le='+Inf'}}[5m]))"
        );
        assert!(value(&all) > 0.0, "{job}");
        let shares =
            stack().prometheus.query(&format!("job_entity:fraiseql_stream_share:ratio5m{{job='{job}'}}"));
        assert_eq!(verdicts(job, "slow_sink"), ["consumer_bound"], "{job}: {shares:#?}");
    }
    assert!(
        value("job_entity:fraiseql_channel_occupancy_rows:p95_5m{job='shop', entity='slow_sink'}") > 200.0
    );
}

#[test]
fn counters_begin_at_zero_so_that_short_streams_count_in_full() {
    let rows = "fraiseql_stream_rows_total{job='shop', entity='fast', outcome='yielded'}";
    assert!(value(&format!("min_over_time({rows}[5m])")) < 1.0);
    assert!(value(rows) > 1.0);
}

#[test]
fn each_alert_fires_for_the_streams_that_it_is_made_for_only() {
    for (alert, job, entity) in firing(&stack().prometheus) {
        let varies = match alert.as_str() {
            // How much of its time a short stream waits is not up to this test.
            "FraiseqlSourceBound" => ["fast", "broken", "odd", "_OTHER"].contains(&entity.as_str()),
            // While a runtime is starved, rows pile up; and on a busy machine, every runtime is late.
            "FraiseqlChannelOccupancyHigh" if entity == "starved" => true,
            "FraiseqlRuntimeStarved" => true,
            // The direct job has one stream, which is as slow.
            "FraiseqlConsumerBound" | "FraiseqlChannelOccupancyHigh" => job == "direct",
            _ => false,
        };
        let is_expected = EXPECTED.contains(&(&alert, &job, &entity));
        assert!(is_expected || varies, "{alert} fires for {job} {entity}");
    }
}

/// Replaces the variables of Grafana, in a query of a dashboard or of a data source.
fn without_variables(expression: &str) -> String {
    let all = [
        ("$__rate_interval", "5m"),
        ("$__interval", "15s"),
        ("$__range", "5m"),
        ("$job", ".+"),
        ("$instance", ".*"),
        ("$entity", ".+"),
    ];
    let expression = expression.replace("$$", "$").replace("$__tags", "entity=\"slow_sink\"");
    all.iter().fold(expression, |expression, (variable, value)| expression.replace(variable, value))
}

#[test]
fn every_expression_of_rules_and_alerts_returns_series() {
    let rules = stack().prometheus.api("rules").unwrap();
    let mut count = 0;
    for rule in
        rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap())
    {
        assert_eq!(rule["health"], "ok", "{rule}");
        let expression = rule["query"].as_str().unwrap();
        // Whether a stream is mixed or balanced is not up to this test.
        let may_be_empty = ["mixed", "balanced"].iter().any(|verdict| rule["labels"]["verdict"] == *verdict);
        assert!(may_be_empty || !values(expression).is_empty(), "{expression}");
        count += 1;
    }
    assert!(count >= 20, "{count}");
}

#[test]
fn every_expression_of_dashboards_returns_series() {
    for (file, dashboard) in dashboards() {
        for panel in panels(&dashboard) {
            for expression in expressions(panel) {
                let found = values(&without_variables(expression));
                assert!(!found.is_empty(), "{file}: {}: {expression}", panel["title"]);
            }
        }
    }
}

/// Returns the values of a panel's only query by the label `entity`.
fn panel_values(dashboard: &Value, title: &str) -> BTreeMap<String, f64> {
    let panel = panels(dashboard).into_iter().find(|panel| panel["title"] == title);
    let expressions = expressions(panel.unwrap_or_else(|| panic!("no panel {title}")));
    assert_eq!(expressions.len(), 1, "{title}");
    values(&without_variables(expressions[0]).replace("job=~\".+\"", "job=\"shop\"")).into_iter().collect()
}

#[test]
fn panels_show_which_side_is_slow() {
    let (_, streams) =
        dashboards().into_iter().find(|(file, _)| file == "streams.json").expect("the dashboard");
    let verdicts = panel_values(&streams, "Verdict over time");
    let timeline = panels(&streams).into_iter().find(|panel| panel["title"] == "Verdict over time");
    let names = &timeline.expect("the panel")["fieldConfig"]["defaults"]["mappings"][0]["options"];
    for (entity, expected) in
        [("slow_sink", "consumer-bound"), ("slow_view", "source-bound"), ("starved", "runtime-bound")]
    {
        assert_eq!(names[verdicts[entity].to_string()]["text"], expected, "{entity}");
    }
    let held_back = panel_values(&streams, "Postgres held back");
    assert!(held_back["slow_sink"] > 0.5 && held_back["slow_view"] < 0.1, "{held_back:?}");
    let silence = panel_values(&streams, "Longest silence");
    assert!(silence["held"] > silence["slow_view"] + 3.0, "{silence:?}");
    let live = panel_values(&streams, "Live streams");
    assert!((live["slow_sink"] - 1.0).abs() < 0.1 && live["broken"] < 1.1, "{live:?}");
}

#[test]
fn every_expression_of_the_documentation_returns_series() {
    let (readme, runbook) = (read("README.md"), read("docs/runbook.md"));
    let data_sources = read("deploy/grafana/provisioning/datasources/datasources.yaml");
    let mut all = documented_expressions(&readme);
    assert!(!all.is_empty());
    all.extend(documented_expressions(&runbook));
    all.extend(yaml_values(&data_sources, "query"));
    for expression in all {
        assert!(!values(&without_variables(expression)).is_empty(), "{expression}");
    }
}

#[test]
fn checks_of_the_runbook_answer_as_it_says() {
    let runbook = read("docs/runbook.md");
    let sql = runbook.split("```sql\n").nth(1).and_then(|block| block.split("```").next()).expect("a query");
    let answer = stack().postgres.psql("postgres", sql).expect("a valid query");
    let waits =
        |kind: &str, event: &str| answer.lines().any(|line| line.contains(&format!("|{kind}|{event}|")));
    // Postgres waits for the slow consumer, and the slow view sleeps.
    assert!(waits("Client", "ClientWrite") && waits("Timeout", "PgSleep"), "{answer}");
    let (status, _) = http::get(stack().collector.http_port(), "/v1/metrics").expect("the collector answers");
    assert!(
        runbook.contains(&format!("curl -i http://collector:4318/v1/metrics` answers {status}")),
        "{status}"
    );
}
