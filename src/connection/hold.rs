//! `Hold`: how a stream holds its connection, and how it returns the connection with an error.

use std::borrow::BorrowMut;
use std::fmt;

use super::Connection;
use crate::error::Error;

/// A way for a stream to hold its connection: `&mut Connection` after [`Connection::query`], [`Connection`] after
/// [`Connection::into_query`]. Cannot be implemented outside of this crate.
///
/// # Examples
///
/// Name it to accept streams of both kinds:
///
/// ```
/// use fraiseql_stream::{Hold, JsonStream};
///
/// async fn skip_the_rest<C: Hold>(orders: JsonStream<serde_json::Value, C>) -> Result<C, C::Error> {
///     let skipped = orders.stats().buffered_rows;
///     println!("skipping at least {skipped} rows");
///     orders.drain().await
/// }
/// ```
pub trait Hold: BorrowMut<Connection> + sealed::Sealed + Sized {
    /// The error of starting, closing or draining a stream: [`Error`] if the stream borrows its connection,
    /// [`StreamError`], which returns the connection, if it owns it.
    type Error: Into<Error> + std::error::Error;

    #[doc(hidden)]
    fn give_back(self, error: Error) -> Self::Error;
}

impl Hold for &mut Connection {
    type Error = Error;

    fn give_back(self, error: Error) -> Error {
        error
    }
}

impl Hold for Connection {
    type Error = StreamError;

    fn give_back(self, error: Error) -> StreamError {
        StreamError { error, connection: Box::new(self) }
    }
}

mod sealed {
    #[expect(unnameable_types, reason = "this is what seals Hold")]
    pub trait Sealed {}
    impl Sealed for &mut super::Connection {}
    impl Sealed for super::Connection {}
}

/// The error of a stream that owned its connection, together with that connection.
///
/// Returned by [`Query::stream`](crate::Query::stream), [`JsonStream::close`](crate::JsonStream::close) and
/// [`JsonStream::drain`](crate::JsonStream::drain) after [`Connection::into_query`]. Its text is that of the
/// [`Error`], and like that one, it has no `source`. It converts into an [`Error`]: `?` works where the connection is no
/// longer needed.
///
/// # Examples
///
/// ```no_run
/// # async fn example(db: fraiseql_stream::Connection) {
/// let db = match db.into_query::<serde_json::Value>("orders").stream().await {
///     Ok(orders) => orders.close().await.unwrap_or_else(|error| error.into_parts().1),
///     Err(error) => {
///         eprintln!("{error}");
///         error.into_parts().1
///     }
/// };
/// # }
/// ```
#[derive(Debug)]
pub struct StreamError {
    error: Error,
    connection: Box<Connection>,
}

impl StreamError {
    /// Returns the error.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(db: fraiseql_stream::Connection) {
    /// if let Err(error) = db.into_query::<serde_json::Value>("orders").stream().await {
    ///     println!("{:?}", error.error().kind());
    /// }
    /// # }
    /// ```
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Returns the error and the connection. The connection can be used again unless it
    /// [is closed](Connection::is_closed).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use fraiseql_stream::{Connection, Error};
    /// # async fn example(db: Connection) -> Result<(), Error> {
    /// if let Err(error) = db.into_query::<serde_json::Value>("orders").stream().await {
    ///     let (error, db) = error.into_parts();
    ///     eprintln!("{error}");
    ///     db.close().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_parts(self) -> (Error, Connection) {
        (self.error, *self.connection)
    }
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Self {
        error.error
    }
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for StreamError {}
