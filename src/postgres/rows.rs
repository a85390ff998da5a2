//! The text of a query, its parameters, and its rows as raw bytes.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_core::Stream;
use tokio_postgres::types::{Format, FromSql, IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{RowStream, Statement};

use crate::error::Error;
use crate::source::Source;

/// A query before it is prepared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sql {
    pub(crate) entity: String,
    pub(crate) conditions: Vec<String>,
    pub(crate) order_by: Vec<String>,
    pub(crate) limit: Option<u64>,
    pub(crate) offset: Option<u64>,
}

impl Sql {
    /// The statement's text, or why the entity is no name of a relation.
    pub(crate) fn text(&self) -> Result<String, Error> {
        let from = format!("SELECT data FROM {}", quote(&self.entity)?);
        if self.conditions.iter().chain(&self.order_by).any(|text| text.contains('\0')) {
            return Err(Error::config(
                "where_sql or order_by has a NUL byte, which Postgres takes in no text",
            ));
        }
        // On lines of their own: a comment at the end of a condition must not swallow what follows.
        let clauses = [
            clause("WHERE (", &self.conditions.join("\n) AND ("), "\n)"),
            clause("ORDER BY ", &self.order_by.join("\n, "), "\n"),
            self.limit.map_or_else(String::new, |limit| format!("\nLIMIT {limit}")),
            self.offset.map_or_else(String::new, |offset| format!("\nOFFSET {offset}")),
        ];
        Ok(from + &clauses.concat())
    }

    /// The schema, where the entity names one.
    pub(crate) fn schema(&self) -> Option<String> {
        let parts = split(&self.entity).ok()?;
        parts.len().checked_sub(2).map(|i| parts[i].clone())
    }
}

fn clause(before: &str, text: &str, after: &str) -> String {
    if text.is_empty() { String::new() } else { format!("\n{before}{text}{after}") }
}

/// Quotes a relation's name, part by part. Case counts, as always in quotes.
fn quote(entity: &str) -> Result<String, Error> {
    let parts = split(entity).map_err(|why| {
        Error::config(format!(
            "{entity:?} is no name of a relation: {why}; write name, schema.name or \"a.dot\".\"inside\""
        ))
    })?;
    let quoted: Vec<_> = parts.iter().map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
    Ok(quoted.join("."))
}

/// Splits at dots that stand outside of double quotes.
fn split(entity: &str) -> Result<Vec<String>, &'static str> {
    if entity.contains('\0') {
        return Err("it has a NUL byte");
    }
    let mut parts = Vec::new();
    let mut rest = entity;
    loop {
        let (part, after) = if let Some(quoted) = rest.strip_prefix('"') {
            unquote(quoted)?
        } else {
            let end = rest.find('.').unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        };
        if part.is_empty() {
            return Err("a part of it is empty");
        }
        parts.push(part);
        match after.strip_prefix('.') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(parts),
            None => return Err("something follows a closing quote"),
        }
    }
}

/// Reads up to the closing quote; a doubled one stands for itself.
fn unquote(text: &str) -> Result<(String, &str), &'static str> {
    let mut name = String::new();
    let mut rest = text;
    while let Some(end) = rest.find('"') {
        name.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Ok((name, rest)),
        }
    }
    Err("a quote is not closed")
}

/// Refuses a statement that does not give one column of JSON.
pub(crate) fn check_column(statement: &Statement) -> Result<(), Error> {
    match statement.columns() {
        [column] if matches!(*column.type_(), Type::JSON | Type::JSONB) => Ok(()),
        [column] => Err(Error::config(format!(
            "column {} is of type {}, not json or jsonb; stream a view that casts it: CREATE VIEW v AS SELECT to_jsonb({}) AS data FROM ...",
            column.name(),
            column.type_(),
            column.name(),
        ))),
        columns => {
            Err(Error::config(format!("the query gives {} columns, not one of json or jsonb", columns.len())))
        }
    }
}

/// A parameter's value, already in the form that Postgres expects of it.
pub(crate) struct Value {
    bytes: Option<Bytes>,
    format: Format,
}

impl fmt::Debug for Value {
    // tokio-postgres logs parameters by this: it must not show the service's data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.bytes {
            Some(bytes) => write!(f, "<{} bytes>", bytes.len()),
            None => f.write_str("NULL"),
        }
    }
}

/// Encodes values for the types that Postgres found in the statement.
pub(crate) fn encode(values: &[&(dyn ToSql + Sync)], types: &[Type]) -> Result<Vec<Value>, Error> {
    if values.len() != types.len() {
        return Err(Error::config(format!(
            "the query has {} parameters ($1, $2, ...) but {} values were given to where_sql",
            types.len(),
            values.len(),
        )));
    }
    let encode = |(index, (value, ty)): (usize, (&&(dyn ToSql + Sync), &Type))| {
        let mut bytes = BytesMut::new();
        let is_null = value.to_sql_checked(ty, &mut bytes).map_err(|why| {
            let number = index + 1;
            Error::config(format!("parameter ${number} is of type {ty} in the query: {why}; give a value of that type, or cast in where_sql: ${number}::text::{ty}"))
        })?;
        let bytes = matches!(is_null, IsNull::No).then(|| bytes.freeze());
        Ok(Value { bytes, format: value.encode_format(ty) })
    };
    values.iter().zip(types).enumerate().map(encode).collect()
}

impl ToSql for Value {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        Ok(match &self.bytes {
            Some(bytes) => {
                out.extend_from_slice(bytes);
                IsNull::No
            }
            None => IsNull::Yes,
        })
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        self.format
    }

    to_sql_checked!();
}

/// The rows of a running query.
pub(crate) struct RawRows {
    rows: Pin<Box<RowStream>>,
    done: bool,
}

impl RawRows {
    pub(super) fn new(rows: RowStream) -> Self {
        Self { rows: Box::pin(rows), done: false }
    }

    /// `ReadyForQuery` was seen: nothing runs any more.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }
}

impl Source for RawRows {
    fn poll_row<V>(
        &mut self,
        cx: &mut Context<'_>,
        look: impl FnOnce(&[u8]) -> V,
    ) -> Poll<Option<Result<V, Error>>> {
        let Some(row) = ready!(self.rows.as_mut().poll_next(cx)) else {
            self.done = true;
            return Poll::Ready(None);
        };
        let looked = row.and_then(|row| {
            let json: Option<Json<'_>> = row.try_get(0)?;
            Ok(look(json.map_or(NULL, |json| json.0)))
        });
        Poll::Ready(Some(looked.map_err(Error::query)))
    }
}

/// How SQL NULL reads as JSON.
const NULL: &[u8] = b"null";

/// The text of a json or jsonb value.
struct Json<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Json<'a> {
    #[inline]
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        // jsonb comes with the number of its format before the text.
        let text =
            if *ty == Type::JSONB { raw.strip_prefix(&[1]).ok_or("unknown version of jsonb")? } else { raw };
        Ok(Self(text))
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::JSON | Type::JSONB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(entity: &str) -> String {
        let sql = Sql { entity: entity.to_owned(), ..Sql::default() };
        sql.text().unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn an_entity_is_a_name_and_never_sql() {
        assert_eq!(text("orders"), r#"SELECT data FROM "orders""#);
        assert_eq!(text("sales.Orders"), r#"SELECT data FROM "sales"."Orders""#);
        assert_eq!(text("users; drop table x"), r#"SELECT data FROM "users; drop table x""#);
        assert_eq!(text(r#"a"b"#), r#"SELECT data FROM "a""b""#);
        assert_eq!(text(r#""a.b"."c""d""#), r#"SELECT data FROM "a.b"."c""d""#);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for entity in ["", ".", "a.", ".a", "a\0b", "\"a", "\"a\"b", "\"\""] {
            assert!(text(entity).contains("is no name of a relation"), "{entity:?}");
        }
    }

    #[test]
    fn a_parameter_does_not_show_its_value() {
        let values = encode(&[&"s3cr3t", &None::<&str>], &[Type::TEXT, Type::TEXT]).unwrap();
        assert_eq!(format!("{values:?}"), "[<6 bytes>, NULL]");
    }

    #[test]
    fn clauses_stand_on_lines_of_their_own() {
        let sql = Sql {
            entity: "t".to_owned(),
            conditions: vec!["a = $1 -- why".to_owned(), "b OR c".to_owned()],
            order_by: vec!["a".to_owned(), "b DESC".to_owned()],
            limit: Some(3),
            offset: Some(1),
        };
        assert_eq!(
            sql.text().unwrap(),
            "SELECT data FROM \"t\"\nWHERE (a = $1 -- why\n) AND (b OR c\n)\nORDER BY a\n, b DESC\n\nLIMIT 3\nOFFSET 1"
        );
    }
}
