//! `RawRows`: the rows of a query, as raw bytes.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{RowStream, Statement};

use crate::error::Error;

/// Rejects a statement that does not return exactly one column of JSON.
pub(crate) fn check_column(statement: &Statement) -> Result<(), Error> {
    match statement.columns() {
        [column] if matches!(*column.type_(), Type::JSON | Type::JSONB) => Ok(()),
        [column] => {
            let (name, ty) = (column.name(), column.type_());
            // Text may be a document already, which `to_jsonb` would wrap into a string.
            let is_text = matches!(*ty, Type::TEXT | Type::VARCHAR | Type::BPCHAR);
            let cast = if is_text { format!("{name}::jsonb") } else { format!("to_jsonb({name})") };
            Err(Error::statement(
                format!("column {name} is of type {ty}, not json or jsonb"),
                &format!("stream a view that casts it: CREATE VIEW v AS SELECT {cast} AS data FROM ..."),
            ))
        }
        columns => Err(Error::statement(
            format!("the query returns {} columns, not one of type json or jsonb", columns.len()),
            "stream a view that has a single column data",
        )),
    }
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

    /// Returns whether `ReadyForQuery` was received, after which nothing runs any more.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// Calls `look` with the JSON text of the next row, which is borrowed so that no memory is allocated for it. SQL NULL
    /// becomes the JSON text `null`. Returns `None` at the end.
    pub(crate) fn poll_row<V>(
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

/// The JSON text for SQL NULL.
const NULL: &[u8] = b"null";

/// The text of a json or jsonb value.
struct Json<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Json<'a> {
    #[inline]
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        // The binary format of jsonb has a version number before the text.
        let text =
            if *ty == Type::JSONB { raw.strip_prefix(&[1]).ok_or("unknown jsonb version")? } else { raw };
        Ok(Self(text))
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::JSON | Type::JSONB)
    }
}
