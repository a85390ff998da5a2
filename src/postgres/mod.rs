//! Everything that talks to Postgres: connect, read rows, cancel. Nothing here knows of chunks or channels.

mod connect;
mod rows;
mod session;

pub(crate) use connect::parse;
pub(crate) use rows::{Sql, Value, encode};
pub(crate) use session::{Cancelled, Lease, Session};
