//! A query and its stream: joins Postgres, the channel and the decoder.
//!
//! [`Query`] starts a `Task`, which sends the statement and reads its rows. The producer cuts them into chunks for the
//! channel; the `Reader` in [`JsonStream`] takes the chunks out and decodes them.

mod decode;
mod json_stream;
mod launch;
mod producer;
mod query;
mod reader;
mod task;

pub use self::decode::{FromJson, RawJson};
pub use self::json_stream::JsonStream;
pub use self::query::Query;
