//! Everything that talks to Postgres: connect, read rows, cancel. Nothing here knows of chunks or channels.

mod connect;
mod rows;
mod session;
mod statements;

pub(crate) use connect::parse;
pub(crate) use rows::{RawRows, Sql, Value, encode};
pub(crate) use session::{Cancelled, Lease, Session};
