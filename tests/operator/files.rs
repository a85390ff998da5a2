//! The files of this repository, and what the tests take from them.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// Returns the path of a file of the repository.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

pub(crate) fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns the dashboards, by file name.
pub(crate) fn dashboards() -> Vec<(String, Value)> {
    let folder = path("deploy/grafana/dashboards").read_dir().expect("a folder of dashboards");
    let files = folder.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
    let load = |file: String| {
        let text = read(&format!("deploy/grafana/dashboards/{file}"));
        let dashboard = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        (file, dashboard)
    };
    files.map(load).collect()
}

/// Returns the panels of a dashboard, without its rows.
pub(crate) fn panels(dashboard: &Value) -> Vec<&Value> {
    let panels = dashboard["panels"].as_array().expect("panels");
    panels.iter().filter(|panel| panel["type"] != "row").collect()
}

/// Returns the PromQL expressions of a panel.
pub(crate) fn expressions(panel: &Value) -> Vec<&str> {
    let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
    targets.iter().filter_map(|target| target["expr"].as_str()).collect()
}

/// Returns the values of `key` in a YAML file that has each on a line of its own.
pub(crate) fn yaml_values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let value = |line: &'a str| {
        let line = line.trim_start().trim_start_matches("- ");
        let value = line.strip_prefix(key)?.strip_prefix(':')?;
        Some(value.split(" #").next().unwrap_or_default().trim())
    };
    text.lines().filter_map(value).collect()
}

/// Returns the expressions of the documentation: the lines of its PromQL blocks.
pub(crate) fn documented_expressions(text: &str) -> Vec<&str> {
    let blocks = text.split("```promql\n").skip(1).filter_map(|block| block.split("```").next());
    blocks.flat_map(str::lines).map(str::trim).filter(|line| !line.is_empty()).collect()
}
