//! The registry in `telemetry/registry/`: what it says of each metric, span and event.

mod compare;
mod document;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

/// The groups of all files, with their attributes resolved.
pub(crate) struct Registry {
    pub(crate) metrics: Vec<Metric>,
    pub(crate) spans: Vec<Span>,
    pub(crate) events: Vec<Event>,
    /// The attributes of this crate by name. Those of the semantic conventions are not in the registry.
    pub(crate) attributes: BTreeMap<String, Definition>,
}

pub(crate) struct Metric {
    pub(crate) name: String,
    pub(crate) instrument: String,
    pub(crate) unit: String,
    pub(crate) brief: String,
    pub(crate) note: String,
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) annotations: MetricAnnotations,
}

pub(crate) struct Span {
    /// The name, or the first word of it.
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) attributes: Vec<Attribute>,
}

pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) attributes: Vec<Attribute>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attribute {
    #[serde(rename = "ref")]
    pub(crate) name: String,
    pub(crate) requirement_level: Level,
    pub(crate) brief: Option<String>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    Required,
    OptIn,
    ConditionallyRequired(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MetricAnnotations {
    #[serde(default)]
    pub(crate) boundaries: Vec<f64>,
    /// The number of data points of an entity.
    pub(crate) points: usize,
    pub(crate) high: String,
    pub(crate) low: String,
}

#[derive(Deserialize)]
pub(crate) struct Definition {
    id: String,
    pub(crate) brief: String,
    #[serde(rename = "type")]
    pub(crate) of: Type,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Type {
    Named(String),
    Enum { members: Vec<Member> },
}

#[derive(Deserialize)]
pub(crate) struct Member {
    pub(crate) value: String,
    #[serde(default)]
    pub(crate) brief: String,
}

#[derive(Deserialize)]
struct File {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    id: String,
    brief: String,
    #[serde(default)]
    note: String,
    extends: Option<String>,
    #[serde(flatten)]
    of: Kind,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Kind {
    AttributeGroup {
        attributes: Vec<Entry>,
    },
    Metric {
        metric_name: String,
        instrument: String,
        unit: String,
        #[serde(default)]
        attributes: Vec<Attribute>,
        annotations: Own<MetricAnnotations>,
    },
    Span {
        span_kind: String,
        attributes: Vec<Attribute>,
        annotations: Own<SpanAnnotations>,
    },
    Event {
        name: String,
        #[serde(default)]
        attributes: Vec<Attribute>,
    },
}

/// A definition of an attribute, or a reference to one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Definition(Definition),
    Reference(Attribute),
}

/// The annotations for this crate.
#[derive(Deserialize)]
struct Own<T> {
    fraiseql: T,
}

#[derive(Deserialize)]
struct SpanAnnotations {
    span_name: String,
}

impl Registry {
    pub(crate) fn read() -> Self {
        let mut registry =
            Self { metrics: Vec::new(), spans: Vec::new(), events: Vec::new(), attributes: BTreeMap::new() };
        let mut groups = BTreeMap::new();
        for file in ["attributes.yaml", "metrics.yaml", "spans.yaml"] {
            for group in file_groups(file) {
                registry.add(group, &mut groups);
            }
        }
        registry
    }

    /// Adds a group. `groups` are the attributes of those that can be extended.
    fn add(&mut self, group: Group, groups: &mut BTreeMap<String, Vec<Attribute>>) {
        let Group { id, brief, note, extends, of } = group;
        let inherited = extends.map(|extends| groups[&extends].clone()).unwrap_or_default();
        match of {
            Kind::AttributeGroup { attributes } => {
                for entry in attributes {
                    match entry {
                        Entry::Definition(of) => drop(self.attributes.insert(of.id.clone(), of)),
                        Entry::Reference(of) => groups.entry(id.clone()).or_default().push(of),
                    }
                }
            }
            Kind::Metric { metric_name, instrument, unit, attributes, annotations } => {
                let attributes = [inherited, attributes].concat();
                let (name, annotations) = (metric_name, annotations.fraiseql);
                self.metrics.push(Metric { name, instrument, unit, brief, note, attributes, annotations });
            }
            Kind::Span { span_kind: kind, attributes, annotations } => {
                self.spans.push(Span { name: annotations.fraiseql.span_name, kind, attributes });
            }
            Kind::Event { name, attributes } => self.events.push(Event { name, attributes }),
        }
    }
}

fn file_groups(name: &str) -> Vec<Group> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("telemetry/registry").join(name);
    let text = std::fs::read_to_string(path).expect("the registry");
    let file: File = serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    file.groups
}

impl Metric {
    /// Returns the name in Prometheus, of which a histogram has several.
    pub(crate) fn prometheus(&self) -> String {
        let unit = match (self.unit.as_str(), self.instrument.as_str()) {
            ("s", _) => "_seconds",
            ("By", _) => "_bytes",
            _ => "",
        };
        let suffix = match self.instrument.as_str() {
            "counter" => "_total",
            "histogram" => "_bucket",
            _ => "",
        };
        format!("{}{unit}{suffix}", self.name.replace('.', "_"))
    }

    /// Returns the number of series of an entity in Prometheus: a histogram has one for each bucket, the count and the
    /// sum.
    pub(crate) fn series(&self) -> usize {
        match self.annotations.boundaries.len() {
            0 => self.annotations.points,
            // The last bucket has no boundary.
            boundaries => self.annotations.points * (boundaries + 1 + 2),
        }
    }
}
