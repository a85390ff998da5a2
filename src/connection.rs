//! `Connection`: one session with Postgres, on which one stream runs at a time.

use std::borrow::BorrowMut;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::postgres::{self, Session};
use crate::telemetry::{Database, Instruments, PollSpans};

/// A connection to Postgres that runs one stream at a time; the types see to that: a stream borrows it
/// mutably ([`query`](Self::query)) or owns it ([`into_query`](Self::into_query)).
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
/// It needs a tokio runtime with time and I/O enabled, as `#[tokio::main]` makes it.
pub struct Connection {
    pub(crate) session: Arc<Session>,
    pub(crate) telemetry: Telemetry,
}

/// What the streams of a connection tell, and where.
#[derive(Clone, Debug)]
pub(crate) struct Telemetry {
    pub(crate) instruments: Instruments,
    pub(crate) poll_spans: PollSpans,
    pub(crate) query_text: bool,
    pub(crate) database: Arc<Database>,
}

impl Connection {
    /// Connects by a URL (`postgres://user:password@host/database`) or a key-value string
    /// (`host=/run/postgresql user=app`), with the options of tokio-postgres. Several hosts are tried in
    /// turn; each address is given 10 s unless `connect_timeout` says otherwise.
    ///
    /// There is no TLS yet: `sslmode=require` and stricter are refused, and `prefer`, the default, connects
    /// in plaintext, with a warning if that leaves the machine.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for a string that does not parse,
    /// [`Connect`](crate::ErrorKind::Connect) when no host can be reached or Postgres refuses.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what was opened.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), fraiseql_stream::Error> {
    /// let db = fraiseql_stream::Connection::connect("postgres://app@localhost/shop").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(connection: &str) -> Result<Self> {
        Self::builder(connection).connect().await
    }

    /// Like [`connect`](Self::connect), with settings of its own.
    ///
    /// ```no_run
    /// use fraiseql_stream::{Connection, PollSpans};
    /// # async fn example() -> Result<(), fraiseql_stream::Error> {
    /// let db = Connection::builder("postgres://app@localhost/shop").poll_spans(PollSpans::Off).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(connection: &str) -> Builder {
        Builder {
            connection: connection.to_owned(),
            instruments: None,
            poll_spans: PollSpans::default(),
            query_text: false,
            statement_cache: Builder::STATEMENT_CACHE,
        }
    }

    /// Returns the underlying client, for example to run `SET` or a transaction. Waits for the clean-up of a
    /// previously dropped stream, so that its cancel request cannot reach your statement.
    ///
    /// A statement that you send through the client is never cancelled by a stream: a stream that is started while
    /// the statement still runs waits for it to end. This costs the first stream after `client` one round trip.
    ///
    /// # Transactions
    ///
    /// Streams can run inside a transaction. A stream borrows the connection, so what you write while it runs goes
    /// through another connection; or take a chunk, [`drain`](crate::JsonStream::drain), write, and stream on from
    /// there. Dropping a stream before its end cancels its query, and Postgres
    /// then aborts the transaction: a `COMMIT` would roll back and report success. For that reason the next use of
    /// the connection fails with [`TransactionAborted`](crate::ErrorKind::TransactionAborted); the use after that
    /// succeeds, so that you can send `ROLLBACK`; see the second example. To stop early and keep the transaction, end the stream with
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
    /// The same as those of [`client`](Self::client). The connection is closed in any case.
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
        if let Some(session) = Arc::into_inner(self.session) {
            session.close().await;
        }
        idle
    }

    /// Whether the connection is gone: by Postgres, the network, or a clean-up that failed.
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

/// The error of a stream that owned its connection, together with that connection.
///
/// Returned by [`Query::stream`](crate::Query::stream), [`JsonStream::close`](crate::JsonStream::close) and
/// [`JsonStream::drain`](crate::JsonStream::drain) after [`Connection::into_query`]. Its text is that of the
/// [`Error`], into which it converts: `?` works where the connection is no longer needed.
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
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Returns the error and the connection. The connection can be used again unless it
    /// [is closed](Connection::is_closed).
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

impl std::error::Error for StreamError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Settings of a [`Connection`]; made by [`Connection::builder`].
#[must_use = "nothing is connected until `connect` is called"]
pub struct Builder {
    connection: String,
    instruments: Option<Instruments>,
    poll_spans: PollSpans,
    query_text: bool,
    statement_cache: usize,
}

impl Builder {
    const STATEMENT_CACHE: usize = 100;

    /// Records metrics with these instruments. Defaults to those of the global meter provider.
    pub fn instruments(mut self, instruments: &Instruments) -> Self {
        self.instruments = Some(instruments.clone());
        self
    }

    /// How many spans poll batches get. Defaults to [`PollSpans::Budget`] of 64.
    pub fn poll_spans(mut self, poll_spans: PollSpans) -> Self {
        self.poll_spans = poll_spans;
        self
    }

    /// Puts the SQL text, without the values of its parameters, on the query span. Defaults to no.
    pub fn query_text(mut self, query_text: bool) -> Self {
        self.query_text = query_text;
        self
    }

    /// Sets the maximum number of prepared statements that the connection keeps. When it is reached, the least
    /// recently used statement is closed. With 0, every query is prepared anew.
    ///
    /// A query whose statement is kept saves a round trip, and saves Postgres from parsing it again. A statement
    /// that Postgres no longer accepts, for example after a change of the schema or `DISCARD ALL`, is prepared again
    /// and run. Only two cases fail, with an error of kind [`Query`](crate::ErrorKind::Query): inside a transaction,
    /// which Postgres has aborted by then, and if the types of the parameters have changed.
    ///
    /// After five runs of a statement, Postgres may switch to a plan that ignores the values of its parameters. If
    /// that plan is slower, run `SET plan_cache_mode = force_custom_plan`. Defaults to 100.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::Connection;
    /// let builder = Connection::builder("postgres://localhost/shop").statement_cache(500);
    /// ```
    pub fn statement_cache(mut self, statements: usize) -> Self {
        self.statement_cache = statements;
        self
    }

    /// Connects; see [`Connection::connect`].
    ///
    /// # Errors
    ///
    /// Those of [`Connection::connect`].
    pub async fn connect(self) -> Result<Connection> {
        let session = Session::connect(postgres::parse(&self.connection)?, self.statement_cache).await?;
        let peer = session.peer();
        let database = Database::new(peer.address(), peer.port(), session.database(), session.schema());
        Ok(Connection {
            session: Arc::new(session),
            telemetry: Telemetry {
                instruments: self.instruments.unwrap_or_else(Instruments::global),
                poll_spans: self.poll_spans,
                query_text: self.query_text,
                database: Arc::new(database),
            },
        })
    }
}

impl fmt::Debug for Builder {
    // Without the connection string: it may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("poll_spans", &self.poll_spans)
            .field("query_text", &self.query_text)
            .finish_non_exhaustive()
    }
}

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
