//! The text of an error in spans and log records.

use std::fmt;

use tokio_postgres::error::SqlState;

use super::Error;

/// Writes an error for a span or log record, which has the SQLSTATE as an attribute, so the text leaves it out. It also
/// leaves out the server's message for data exceptions (class 22) and violated constraints (class 23), which quote
/// values of the query or of rows.
pub(crate) struct Recorded<'a>(pub(crate) &'a Error);

impl fmt::Display for Recorded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0.0;
        let Some(code) = self.0.sqlstate().map(SqlState::code) else { return self.0.fmt(f) };
        match code.get(..2) {
            Some("22") => {
                inner.write(f, "data exception (its message may quote values, so it is not recorded)", "")
            }
            Some("23") => inner.write(
                f,
                "constraint violation (its message may quote values, so it is not recorded)",
                "",
            ),
            _ => inner.write(f, &inner.message.replacen(&format!(" ({code})"), "", 1), &inner.more),
        }
    }
}
