//! Everything that talks to Postgres, one file for each verb. Nothing here knows of chunks or channels.

mod cancel;
mod connect;
mod lease;
mod params;
mod rows;
mod session;
mod sql;
mod statements;

pub(crate) use self::connect::{check, parse};
pub(crate) use self::lease::{Interrupted, Lease};
pub(crate) use self::params::{Value, encode};
pub(crate) use self::rows::RawRows;
pub(crate) use self::session::Session;
pub(crate) use self::sql::Sql;
