//! `Connection`: one session with Postgres, on which one stream runs at a time.

mod builder;
mod hold;

use std::fmt;
use std::sync::Arc;

use tokio::runtime::Handle;

pub use self::builder::{ConnectionBuilder, IntoConfig};
pub use self::hold::{Hold, StreamError};
use crate::error::{Error, Result};
use crate::postgres::Session;
use crate::telemetry::{Database, Instruments, PollSpans};

/// A connection to Postgres that runs one stream at a time.
///
/// The types ensure that: a stream borrows the connection mutably ([`query`](Self::query)) or owns it
/// ([`into_query`](Self::into_query)).
///
/// ```compile_fail,E0499
/// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
/// let one = db.query::<serde_json::Value>("orders").stream().await?;
/// let two = db.query::<serde_json::Value>("users").stream().await?; // `one` still borrows `db`
/// drop(one);
/// # Ok(())
/// # }
/// ```
///
/// A connection needs a tokio runtime with time and I/O enabled, such as that of `#[tokio::main]`.
///
/// # Examples
///
/// ```no_run
/// use futures_util::TryStreamExt;
///
/// # async fn example() -> Result<(), fraiseql_stream::Error> {
/// let mut db = fraiseql_stream::Connection::connect("postgres://app@localhost/shop").await?;
/// for entity in ["orders", "customers"] {
///     let mut rows = db.query::<serde_json::Value>(entity).stream().await?;
///     while let Some(row) = rows.try_next().await? {
///         println!("{row}");
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Connection {
    pub(crate) session: Arc<Session>,
    pub(crate) telemetry: Telemetry,
}

/// What the streams of a connection record, and where.
#[derive(Clone, Debug)]
pub(crate) struct Telemetry {
    pub(crate) instruments: Instruments,
    pub(crate) poll_spans: PollSpans,
    pub(crate) query_text: bool,
    pub(crate) database: Arc<Database>,
}

impl Connection {
    /// Connects to Postgres. `config` is a URL (`postgres://user:password@host/database`), a string of key-value pairs
    /// (`host=/run/postgresql user=app`), or a [`tokio_postgres::Config`].
    ///
    /// If there are several hosts, they are tried in order, or in random order with `load_balance_hosts=random`. Each
    /// address is given 10 s unless `connect_timeout` is set; resolving a name is given 10 s in any case.
    ///
    /// There is no TLS yet: `sslmode=require` and stricter modes are rejected. The default, `prefer`, connects in
    /// plaintext, and logs a warning if the server is not on this machine.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the configuration is invalid, or there is no tokio runtime;
    /// [`Connect`](crate::ErrorKind::Connect) if no host can be reached or Postgres refuses the connection.
    ///
    /// # Panics
    ///
    /// Panics on a tokio runtime that was built without time or without I/O.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the sockets that it has opened are closed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), fraiseql_stream::Error> {
    /// let db = fraiseql_stream::Connection::connect("postgres://app@localhost/shop").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(config: impl IntoConfig) -> Result<Self> {
        Self::builder(config).connect().await
    }

    /// Returns a builder for a connection with other settings than the defaults. An invalid `config` is reported by
    /// [`ConnectionBuilder::connect`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use fraiseql_stream::{Connection, PollSpans};
    /// # async fn example() -> Result<(), fraiseql_stream::Error> {
    /// let db = Connection::builder("postgres://app@localhost/shop").poll_spans(PollSpans::Off).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(config: impl IntoConfig) -> ConnectionBuilder {
        ConnectionBuilder::new(config)
    }

    /// Returns the underlying client, for example to run `SET` or a transaction. Waits for the clean-up of a
    /// previously dropped stream, so that its cancel request cannot reach your statement.
    ///
    /// A statement that you send through the client is never cancelled by a stream: a stream that is started while
    /// the statement still runs waits for it to end. This costs the first stream after `client` one round trip.
    ///
    /// # Transactions
    ///
    /// Streams can run inside a transaction that you begin with `BEGIN`. A stream borrows the connection, so nothing else
    /// can be sent on it meanwhile. To alternate between reading and writing, read in pages: set an order and a
    /// [`limit`](crate::Query::limit), read to the end, write, and query the next page.
    ///
    /// Dropping a stream before its end cancels its query, and Postgres then aborts the transaction: `COMMIT` would roll
    /// back and report success. Therefore, the next use of the connection fails with
    /// [`TransactionAborted`](crate::ErrorKind::TransactionAborted). The use after that succeeds, so that you can send
    /// `ROLLBACK` (second example). To stop early and keep the transaction, end the stream with
    /// [`drain`](crate::JsonStream::drain), or set a savepoint before it and send `ROLLBACK TO` afterwards.
    ///
    /// # Errors
    ///
    /// [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is closed;
    /// [`TransactionAborted`](crate::ErrorKind::TransactionAborted) as described above, once.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), Box<dyn std::error::Error>> {
    /// db.client().await?.batch_execute("SET statement_timeout = '30s'").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Rolls back whatever happened in a transaction, reported or not:
    ///
    /// ```no_run
    /// # use fraiseql_stream::ErrorKind;
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), Box<dyn std::error::Error>> {
    /// if let Err(error) = db.client().await
    ///     && error.kind() != ErrorKind::TransactionAborted
    /// {
    ///     return Err(error.into());
    /// }
    /// db.client().await?.batch_execute("ROLLBACK").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn client(&mut self) -> Result<&tokio_postgres::Client> {
        self.idle().await?;
        Ok(self.session.lend())
    }

    /// Returns the underlying client mutably, as [`tokio_postgres::Transaction`] requires. Otherwise behaves like
    /// [`client`](Self::client).
    ///
    /// No stream can run inside a [`tokio_postgres::Transaction`], because it borrows the client. To stream inside
    /// a transaction, send `BEGIN` and `COMMIT` through [`client`](Self::client).
    ///
    /// # Errors
    ///
    /// The same as those of [`client`](Self::client).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), Box<dyn std::error::Error>> {
    /// let transaction = db.client_mut().await?.transaction().await?;
    /// transaction.execute("UPDATE orders SET shipped = true", &[]).await?;
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn client_mut(&mut self) -> Result<&mut tokio_postgres::Client> {
        self.idle().await?;
        // Every other owner of the session also holds its turn, so there is none left now.
        Arc::get_mut(&mut self.session).map(Session::lend_mut).ok_or_else(Error::closed)
    }

    /// Closes the connection: waits for the clean-up of a previously dropped stream, ends the session with Postgres,
    /// and returns once the socket is closed. If Postgres does not respond, the socket is closed after 5 s.
    ///
    /// Dropping the connection does the same without waiting. A program that exits right after that may break the
    /// connection instead, which Postgres logs.
    ///
    /// # Errors
    ///
    /// The same as [`client`](Self::client), and [`Config`](crate::ErrorKind::Config) outside of a tokio runtime. The
    /// connection is closed in any case.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the connection is dropped and still closes.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// db.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close(self) -> Result<()> {
        let idle = self.idle().await;
        if Handle::try_current().is_err() {
            // Dropping the session closes it as well, without waiting.
            return Err(Error::no_runtime());
        }
        if let Some(session) = Arc::into_inner(self.session) {
            session.close().await;
        }
        idle
    }

    /// Returns whether the connection is closed: by Postgres, by the network, or because a query could not be
    /// cancelled.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use fraiseql_stream::Connection;
    /// # async fn example(mut db: Connection, url: &str) -> Result<(), fraiseql_stream::Error> {
    /// if db.is_closed() {
    ///     db = Connection::connect(url).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_closed(&self) -> bool {
        self.session.is_closed()
    }

    pub(crate) async fn idle(&self) -> Result<()> {
        self.session.turn().await.map(drop)
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.session.peer())
            .field("database", &self.session.database())
            .field("is_closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}
