//! The rules that every dashboard follows.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::files::{dashboards, expressions, panels};
use crate::stack::stack;

/// Returns all panels with a name for messages.
fn all_panels(dashboards: &[(String, Value)]) -> Vec<(String, &Value)> {
    let of = |(file, dashboard): &'_ (String, Value)| {
        file.clone() + ": " + dashboard["title"].as_str().unwrap_or("?")
    };
    let named = dashboards.iter().map(|one| (of(one), panels(&one.1)));
    named
        .flat_map(|(name, panels)| {
            panels.into_iter().map(move |panel| (format!("{name}: {}", panel["title"]), panel))
        })
        .collect()
}

#[test]
fn every_panel_has_a_title_a_description_and_a_unit() {
    for (name, panel) in all_panels(&dashboards()) {
        assert!(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "{name}");
        let description = panel["description"].as_str().unwrap_or_default();
        assert!(description.len() > 30 && description.ends_with('.'), "{name}: {description:?}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{name}");
    }
}

#[test]
fn every_panel_queries_the_chosen_data_source() {
    for (name, panel) in all_panels(&dashboards()) {
        for target in panel["targets"].as_array().expect("targets") {
            let source = target["datasource"]["uid"].as_str().unwrap_or_default();
            assert!(["${datasource}", "${tempo}"].contains(&source), "{name}: {source}");
            assert_eq!(target.get("expr").is_some(), source == "${datasource}", "{name}");
        }
    }
}

#[test]
fn every_selector_is_limited_to_the_chosen_jobs_and_every_rate_to_the_interval_of_grafana() {
    for (name, panel) in all_panels(&dashboards()) {
        for expression in expressions(panel) {
            let after = |bracket| expression.split(bracket).skip(1);
            assert!(after('{').count() > 0, "{name}: {expression}");
            for selector in after('{') {
                assert!(selector.starts_with("job=~\"$job\", "), "{name}: {{{selector}");
                let entity = ["entity=~\"$entity", "db_collection_name=~\"$entity"];
                assert!(entity.iter().any(|entity| selector.contains(entity)), "{name}: {{{selector}");
            }
            for window in after('[') {
                assert!(window.starts_with("$__rate_interval]"), "{name}: [{window}");
            }
        }
    }
}

/// Returns the names of the series that only ever grow, as Prometheus has learnt them from the collector.
fn counters() -> BTreeSet<String> {
    let metadata = stack().prometheus.api("metadata").expect("Prometheus answers");
    let of = |(name, kinds): (&String, &Value)| match kinds[0]["type"].as_str() {
        Some("counter") => vec![name.clone()],
        Some("histogram") => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).to_vec(),
        _ => Vec::new(),
    };
    metadata.as_object().expect("metadata by name").iter().flat_map(of).collect()
}

#[test]
fn counters_are_used_under_rate_or_increase_only() {
    let counters = counters();
    assert!(counters.contains("fraiseql_stream_rows_total"), "{counters:?}");
    assert!(counters.contains("fraiseql_channel_occupancy_rows_bucket"), "{counters:?}");
    for (name, panel) in all_panels(&dashboards()) {
        for expression in expressions(panel) {
            let bare = counters.iter().find(|counter| is_bare(expression, counter));
            assert_eq!(bare, None, "{name}: {expression}");
        }
    }
}

/// Returns whether a counter is used without a rate in front of it.
fn is_bare(expression: &str, counter: &str) -> bool {
    let is_rate = |before: &str| before.ends_with("rate(") || before.ends_with("increase(");
    expression.rsplit(&format!("{counter}{{")).skip(1).any(|before| !is_rate(before))
}

#[test]
fn thresholds_of_the_occupancy_are_those_of_the_documentation() {
    let dashboards = dashboards();
    let all = all_panels(&dashboards);
    let (_, panel) = all.iter().find(|(name, _)| name.contains("Occupancy: quantiles")).expect("the panel");
    let steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"].as_array().expect("thresholds");
    let values: Vec<_> = steps.iter().filter_map(|step| step["value"].as_u64()).collect();
    assert_eq!(values, [10, 50, 200, 240]);
}

#[test]
fn every_query_variable_filters_by_the_chosen_data_source() {
    for (file, dashboard) in dashboards() {
        let variables = dashboard["templating"]["list"].as_array().expect("variables");
        let names: Vec<_> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
        assert_eq!(names, ["datasource", "tempo", "job", "instance", "entity"], "{file}");
        for variable in variables.iter().filter(|variable| variable["type"] == "query") {
            assert_eq!(variable["datasource"]["uid"], "${datasource}", "{file}: {variable}");
        }
    }
}

/// Returns the values of `url` anywhere in a dashboard.
fn urls(value: &Value) -> Vec<&str> {
    let own = value["url"].as_str();
    let inner: Vec<&Value> = match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    };
    own.into_iter().chain(inner.into_iter().flat_map(urls)).collect()
}

#[test]
fn every_link_is_a_valid_url() {
    for (file, dashboard) in dashboards() {
        let urls = urls(&dashboard);
        assert!(urls.iter().any(|url| url.starts_with("/explore?")), "{file} has no link to traces");
        for url in urls {
            // What is neither a variable nor encoded would end the parameter, or the URL.
            assert!(!url.contains([' ', '"', '\\']) && !url.contains("&&"), "{file}: {url}");
        }
    }
}
