//! `docs/metrics.md` is generated from the registry and from `telemetry/metrics.md`, which has its prose.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use opentelemetry_semantic_conventions::SCHEMA_URL;

use super::{Attribute, Level, Metric, Registry, Type};

const HEADER: &str = "<!-- Generated from telemetry/ by `UPDATE=1 cargo test --all-features --test telemetry metrics_document`. Do not edit. -->\n\n";

#[test]
fn metrics_document_is_up_to_date() {
    let document = render(&Registry::read());
    let path = file("docs/metrics.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &document).expect("docs/ can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = found.lines().zip(document.lines()).find(|(found, expected)| found != expected);
    assert!(
        found == document,
        "docs/metrics.md is out of date: {differs:?}; run UPDATE=1 cargo test --all-features --test telemetry metrics_document"
    );
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn render(registry: &Registry) -> String {
    let metrics = &registry.metrics;
    let sum = |of: fn(&Metric) -> usize| metrics.iter().map(of).sum::<usize>();
    let (points, series) = (sum(|metric| metric.annotations.points), sum(Metric::series));
    let of_database = metrics.iter().filter(|metric| metric.name.starts_with("db."));
    let several = metrics.iter().filter(|metric| metric.annotations.points > 1);
    let several = several.map(|metric| format!("`{}` ({})", metric.name, metric.annotations.points));
    let values = [
        ("overview", overview(metrics)),
        ("conventions", format!("version {}", SCHEMA_URL.rsplit('/').next().unwrap_or_default())),
        ("metrics", metrics.iter().map(section).collect()),
        ("attributes", attributes(registry)),
        ("points_1000", grouped(points * 1_000)),
        ("series_1000", grouped(series * 1_000)),
        ("points", grouped(points)),
        ("series", grouped(series)),
        ("failure_points", of_database.clone().count().to_string()),
        ("failure_series", of_database.map(Metric::series).sum::<usize>().to_string()),
        ("several", several.collect::<Vec<_>>().join(", ")),
    ];
    let mut text = std::fs::read_to_string(file("telemetry/metrics.md")).expect("the template");
    for (name, value) in values {
        let placeholder = format!("{{{{{name}}}}}");
        assert!(text.contains(&placeholder), "the template lacks {placeholder}");
        text = text.replace(&placeholder, value.trim_end_matches('\n'));
    }
    assert!(!text.contains("{{"), "the template has an unknown placeholder");
    format!("{HEADER}{text}")
}

fn overview(metrics: &[Metric]) -> String {
    let mut table =
        "| metric | in Prometheus | instrument | unit | records |\n|---|---|---|---|---|\n".to_owned();
    for metric in metrics {
        let Metric { name, instrument, unit, brief, .. } = metric;
        let anchor = name.replace('.', "");
        let brief = brief.trim_end_matches('.');
        let _ = writeln!(
            table,
            "| [`{name}`](#{anchor}) | `{}` | {instrument} | `{unit}` | {brief} |",
            metric.prometheus()
        );
    }
    table
}

fn section(metric: &Metric) -> String {
    let Metric { name, brief, note, annotations, .. } = metric;
    let attributes: Vec<_> = metric.attributes.iter().map(attribute).collect();
    let mut text = format!("### `{name}`\n\n{}. {}\n\n", brief.trim_end_matches('.'), note.trim_end());
    let _ = writeln!(text, "- High: {}", annotations.high);
    let _ = writeln!(text, "- Low: {}", annotations.low);
    let _ = writeln!(text, "- Attributes: {}", attributes.join(", "));
    if !annotations.boundaries.is_empty() {
        let boundaries: Vec<_> = annotations.boundaries.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "- Boundaries: {}", boundaries.join(", "));
    }
    let points = annotations.points;
    let _ = writeln!(
        text,
        "- For each entity: {} in an export, {} series in Prometheus\n",
        counted(points),
        metric.series()
    );
    text
}

fn counted(points: usize) -> String {
    format!("{points} data point{}", if points == 1 { "" } else { "s" })
}

fn attribute(Attribute { name, requirement_level, brief }: &Attribute) -> String {
    let condition = match requirement_level {
        Level::Required => String::new(),
        Level::OptIn => " (on request)".to_owned(),
        Level::ConditionallyRequired(condition) => {
            format!(" (only if: {})", condition.trim_end_matches('.'))
        }
    };
    let brief = brief.as_ref().map_or_else(String::new, |brief| format!(": {}", brief.trim_end_matches('.')));
    format!("`{name}`{condition}{brief}")
}

/// Returns a table of the attributes that metrics have and this crate defines.
fn attributes(registry: &Registry) -> String {
    let mut table = "| attribute | value | meaning |\n|---|---|---|\n".to_owned();
    let used = |name: &str| {
        let all = registry.metrics.iter().flat_map(|metric| &metric.attributes);
        all.into_iter().any(|attribute| attribute.name == name)
    };
    for (name, definition) in registry.attributes.iter().filter(|(name, _)| used(name)) {
        match &definition.of {
            Type::Named(of) => {
                let _ = writeln!(table, "| `{name}` | {of} | {} |", definition.brief.trim_end());
            }
            Type::Enum { members } => {
                for member in members {
                    let _ = writeln!(table, "| `{name}` | `{}` | {} |", member.value, member.brief);
                }
            }
        }
    }
    table
}

/// Writes a number with a comma between groups of three digits.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}
