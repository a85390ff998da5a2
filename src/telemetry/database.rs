//! The database of a connection, in the words of the semantic conventions.

use std::borrow::Cow;
use std::sync::Arc;

use opentelemetry::{KeyValue, Value};

/// What the spans and the `db.client` metrics of a connection's streams have in common.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Database {
    pub(super) address: String,
    /// Where it is not 5432.
    pub(super) port: Option<u16>,
    name: Option<String>,
    /// Of entities whose name has no schema.
    namespace: Option<String>,
}

impl Database {
    /// `schema` is the one that names without a schema are looked up in.
    pub(crate) fn new(address: String, port: u16, name: Option<&str>, schema: Option<&str>) -> Self {
        Self {
            address,
            port: Some(port).filter(|port| *port != 5432),
            name: name.map(ToOwned::to_owned),
            namespace: namespace(name, schema).map(Cow::into_owned),
        }
    }

    /// `db.namespace`; `schema` is that of the entity's name, if it has one.
    pub(super) fn namespace(&self, schema: Option<&str>) -> Option<Cow<'_, str>> {
        match schema {
            Some(schema) => {
                namespace(self.name.as_deref(), Some(schema)).map(|name| name.into_owned().into())
            }
            None => self.namespace.as_deref().map(Cow::Borrowed),
        }
    }

    /// The attributes of the `db.client` metrics, in alphabetical order: an SDK finds series by it the fastest.
    pub(super) fn attributes(&self, collection: &Value, schema: Option<&str>) -> Arc<[KeyValue]> {
        let namespace = self.namespace(schema).map(Cow::into_owned);
        let some = [
            Some(KeyValue::new("db.collection.name", collection.clone())),
            namespace.map(|namespace| KeyValue::new("db.namespace", namespace)),
            Some(KeyValue::new("db.operation.name", "SELECT")),
            Some(KeyValue::new("db.system.name", "postgresql")),
            Some(KeyValue::new("server.address", self.address.clone())),
            self.port.map(|port| KeyValue::new("server.port", i64::from(port))),
        ];
        some.into_iter().flatten().collect()
    }
}

/// `{database}|{schema}`, or the one that is known.
fn namespace<'a>(database: Option<&'a str>, schema: Option<&'a str>) -> Option<Cow<'a, str>> {
    match (database, schema) {
        (Some(database), Some(schema)) => Some(format!("{database}|{schema}").into()),
        (one, other) => one.or(other).map(Cow::Borrowed),
    }
}
