//! `Connection`: one session with Postgres, on which one stream runs at a time.

use std::borrow::BorrowMut;
use std::fmt;
use std::sync::Arc;

use crate::decode::FromJson;
use crate::error::{Error, Result};
use crate::postgres::{self, Session};
use crate::query::Query;
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

    /// A query for the JSON in column `data` of a table or view, whose stream borrows this connection.
    ///
    /// `entity` is the name of a relation, quoted as an identifier (so case counts), or `schema.name`. It is
    /// never SQL. It is also the attribute `entity` of all metrics: do not make up names by the thousand.
    pub fn query<'p, T: FromJson>(&mut self, entity: &str) -> Query<'p, T, &mut Self> {
        Query::new(self, entity)
    }

    /// Like [`query`](Self::query), but the stream owns the connection and is `'static`;
    /// [`JsonStream::close`](crate::JsonStream::close) gives it back.
    ///
    /// ```no_run
    /// use futures_util::StreamExt;
    /// # async fn example(db: fraiseql_stream::Connection) -> Result<(), fraiseql_stream::Error> {
    /// let mut rows = db.into_query::<serde_json::Value>("orders").stream().await?;
    /// tokio::spawn(async move { while let Some(row) = rows.next().await { /* ... */ } });
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_query<'p, T: FromJson>(self, entity: &str) -> Query<'p, T, Self> {
        Query::new(self, entity)
    }

    /// Returns the underlying client, for example to run `SET` or a transaction. Waits for the clean-up of a
    /// previously dropped stream, so that its cancel request cannot reach your statement.
    ///
    /// What you send by the client is yours: a stream that is begun while a statement of yours still runs waits
    /// for its end, and never cancels it. That costs the first stream after `client` one round trip.
    ///
    /// # Transactions
    ///
    /// Streams may run inside a transaction. Dropping one before its end cancels its query, and in Postgres that
    /// aborts the transaction: `COMMIT` would roll back and report success. So the next use of the connection
    /// fails once with [`TransactionAborted`](crate::ErrorKind::TransactionAborted). To stop early and keep the
    /// transaction, end the stream with [`drain`](crate::JsonStream::drain), or set a savepoint before it and
    /// `ROLLBACK TO` it afterwards.
    ///
    /// # Errors
    ///
    /// [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is closed;
    /// [`TransactionAborted`](crate::ErrorKind::TransactionAborted) as described above.
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
    pub async fn client(&mut self) -> Result<&tokio_postgres::Client> {
        self.idle().await?;
        Ok(self.session.lend())
    }

    /// Returns the underlying client mutably, which [`tokio_postgres::Transaction`] needs. Otherwise like
    /// [`client`](Self::client), its errors included.
    ///
    /// No stream can run inside such a transaction: it borrows the client. For that, send `BEGIN` and `COMMIT`
    /// by [`client`](Self::client).
    ///
    /// # Errors
    ///
    /// Those of [`client`](Self::client).
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
        // Whoever shares the session holds its turn as long as it does.
        Arc::get_mut(&mut self.session).map(Session::lend_mut).ok_or_else(Error::closed)
    }

    /// Closes the connection: waits for the clean-up of a dropped stream, says goodbye to Postgres, and returns when
    /// the socket is closed. Dropping the connection does the same without waiting; a program that exits right
    /// after that may cut the connection, which Postgres then logs.
    ///
    /// # Errors
    ///
    /// Those of [`client`](Self::client). The connection is closed in any case.
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

/// An error of a stream that owned its connection, and the connection.
///
/// Converts into [`Error`], so that `?` works where the connection is not needed any more.
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
    /// Returns the error alone.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Returns the error and the connection, which can be used again unless [`Connection::is_closed`].
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

    /// Sets how many prepared statements the connection keeps, the least recently used making room; 0 prepares
    /// each query anew.
    ///
    /// A query whose text was run before on this connection saves a round trip, and Postgres the planning of it.
    /// A statement that the server no longer accepts, after a change of the schema or `DISCARD ALL`, is prepared
    /// again unnoticed. After five runs Postgres may choose a plan that does not look at the parameters; where
    /// that is slower, `SET plan_cache_mode = force_custom_plan`. Defaults to 100.
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

/// How a stream holds its connection: `&mut Connection` for [`Connection::query`], [`Connection`] for
/// [`Connection::into_query`]. Cannot be implemented elsewhere.
pub trait Hold: BorrowMut<Connection> + sealed::Sealed + Sized {
    /// What a stream fails with that could not be begun or closed.
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
