//! `Database`: the database of a connection, as attributes of the semantic conventions.

use std::borrow::Cow;
use std::sync::Arc;

use opentelemetry::{KeyValue, Value};

/// What the spans and `db.client` metrics of all streams of a connection have in common.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Database {
    pub(super) address: String,
    /// `None` for the default port, 5432.
    pub(super) port: Option<u16>,
    name: Option<String>,
    /// The `db.namespace` of entities whose name has no schema.
    namespace: Option<String>,
}

impl Database {
    /// Describes a database. `schema` is the one in which names without a schema are looked up.
    pub(crate) fn new(address: String, port: u16, name: Option<&str>, schema: Option<&str>) -> Self {
        Self {
            address,
            port: Some(port).filter(|port| *port != 5432),
            name: name.map(ToOwned::to_owned),
            namespace: namespace(name, schema).map(Cow::into_owned),
        }
    }

    /// Returns the value of `db.namespace`. `schema` is that of the entity's name, if it has one.
    pub(super) fn namespace(&self, schema: Option<&str>) -> Option<Cow<'_, str>> {
        match schema {
            Some(schema) => {
                namespace(self.name.as_deref(), Some(schema)).map(|name| name.into_owned().into())
            }
            None => self.namespace.as_deref().map(Cow::Borrowed),
        }
    }

    /// Returns the attributes of the `db.client` metrics, in alphabetical order, in which an SDK finds their series
    /// fastest.
    pub(super) fn attributes(&self, collection: &Value, schema: Option<&str>) -> Arc<[KeyValue]> {
        let namespace = self.namespace(schema).map(Cow::into_owned);
        let summary = format!("SELECT {collection}");
        let attributes = [
            Some(KeyValue::new("db.collection.name", collection.clone())),
            namespace.map(|namespace| KeyValue::new("db.namespace", namespace)),
            Some(KeyValue::new("db.operation.name", "SELECT")),
            Some(KeyValue::new("db.query.summary", summary)),
            Some(KeyValue::new("db.system.name", "postgresql")),
            Some(KeyValue::new("server.address", self.address.clone())),
            self.port.map(|port| KeyValue::new("server.port", i64::from(port))),
        ];
        attributes.into_iter().flatten().collect()
    }
}

/// Returns `{database}|{schema}`, or the one of the two that is known.
fn namespace<'a>(database: Option<&'a str>, schema: Option<&'a str>) -> Option<Cow<'a, str>> {
    match (database, schema) {
        (Some(database), Some(schema)) => Some(format!("{database}|{schema}").into()),
        (one, other) => one.or(other).map(Cow::Borrowed),
    }
}
