//! `ConnectionBuilder`: the settings of a connection.

use std::fmt;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio_postgres::Config;
use tracing::Instrument;

use super::{Connection, Telemetry};
use crate::error::{Error, Result};
use crate::postgres::{self, Session};
use crate::telemetry::{self, Database, Instruments, PollSpans};

/// A builder for a [`Connection`] with settings other than the defaults. Created by [`Connection::builder`].
///
/// # Examples
///
/// ```no_run
/// use fraiseql_stream::{Connection, PollSpans};
///
/// # async fn example() -> Result<(), fraiseql_stream::Error> {
/// let db = Connection::builder("postgres://app@localhost/shop")
///     .poll_spans(PollSpans::Off)
///     .statement_cache(500)
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is connected until `connect` is called"]
pub struct ConnectionBuilder {
    config: Result<Config>,
    instruments: Option<Instruments>,
    poll_spans: PollSpans,
    query_text: bool,
    statement_cache: usize,
}

impl ConnectionBuilder {
    const STATEMENT_CACHE: usize = 100;

    pub(super) fn new(config: impl IntoConfig) -> Self {
        Self {
            config: config.into_config(),
            instruments: None,
            poll_spans: PollSpans::default(),
            query_text: false,
            statement_cache: Self::STATEMENT_CACHE,
        }
    }

    /// Sets the instruments that record the metrics of this connection. Defaults to instruments of the global meter
    /// provider.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::{Connection, Instruments};
    /// use opentelemetry_sdk::metrics::SdkMeterProvider;
    ///
    /// let instruments = Instruments::new(&SdkMeterProvider::default());
    /// let builder = Connection::builder("postgres://localhost/shop").instruments(&instruments);
    /// ```
    pub fn instruments(mut self, instruments: &Instruments) -> Self {
        self.instruments = Some(instruments.clone());
        self
    }

    /// Sets how many poll batches have a span of their own. Defaults to [`PollSpans::Budget`] of 64.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::{Connection, PollSpans};
    /// let builder = Connection::builder("postgres://localhost/shop").poll_spans(PollSpans::Every);
    /// ```
    pub fn poll_spans(mut self, poll_spans: PollSpans) -> Self {
        self.poll_spans = poll_spans;
        self
    }

    /// Sets whether query spans have the attribute `db.query.text`: the SQL text, without the values of its
    /// parameters. Defaults to `false`.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::Connection;
    /// let builder = Connection::builder("postgres://localhost/shop").query_text(true);
    /// ```
    pub fn query_text(mut self, query_text: bool) -> Self {
        self.query_text = query_text;
        self
    }

    /// Sets the maximum number of prepared statements that the connection caches. When the cache is full, the least
    /// recently used statement is closed. With 0, every query is prepared anew. Defaults to 100.
    ///
    /// A cached statement saves a round trip, and Postgres does not parse it again. A statement that Postgres no longer
    /// accepts, for example after a schema change or `DISCARD ALL`, is prepared again and run. That fails in three cases:
    /// with [`Query`](crate::ErrorKind::Query) inside a transaction, which Postgres has aborted by then; with `Query` if
    /// the types of the parameters have changed; and with [`Statement`](crate::ErrorKind::Statement) if the column `data`
    /// is no longer json or jsonb.
    ///
    /// After five runs of a statement, Postgres may switch to a plan that ignores the values of its parameters. If
    /// that plan is slower, run `SET plan_cache_mode = force_custom_plan`.
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

    /// Connects with these settings.
    ///
    /// # Errors
    ///
    /// The same as [`Connection::connect`].
    ///
    /// # Panics
    ///
    /// The same as [`Connection::connect`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the sockets that it has opened are closed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), fraiseql_stream::Error> {
    /// let db = fraiseql_stream::Connection::builder("postgres://localhost/shop").connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(self) -> Result<Connection> {
        let config = self.config?;
        if Handle::try_current().is_err() {
            return Err(Error::no_runtime());
        }
        let span = telemetry::connect_span();
        let session = Session::connect(config, self.statement_cache).instrument(span.clone()).await;
        let session = session.inspect_err(|error| telemetry::record_error(&span, error))?;
        let peer = session.peer();
        let database = Database::new(peer.address(), peer.port(), session.database(), session.schema());
        telemetry::record_connected(&span, &database);
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

impl fmt::Debug for ConnectionBuilder {
    // Without the configuration, which may contain a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionBuilder")
            .field("poll_spans", &self.poll_spans)
            .field("query_text", &self.query_text)
            .field("statement_cache", &self.statement_cache)
            .finish_non_exhaustive()
    }
}

/// The configuration of a connection: a connection string, or a [`tokio_postgres::Config`].
///
/// A string is a URL (`postgres://user:password@host/database`) or has key-value pairs
/// (`host=/run/postgresql user=app`), with the options of tokio-postgres. Cannot be implemented outside of this crate.
///
/// # Examples
///
/// ```no_run
/// use fraiseql_stream::{Connection, tokio_postgres};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let db = Connection::connect(std::env::var("DATABASE_URL")?).await?;
///
/// let mut config = tokio_postgres::Config::new();
/// config.host("localhost").user("app").password("a password with any character").dbname("shop");
/// let db = Connection::connect(config).await?;
/// # Ok(())
/// # }
/// ```
pub trait IntoConfig: sealed::Sealed {
    #[doc(hidden)]
    fn into_config(self) -> Result<Config, Error>;
}

impl IntoConfig for &str {
    fn into_config(self) -> Result<Config, Error> {
        postgres::parse(self)
    }
}

impl IntoConfig for &String {
    fn into_config(self) -> Result<Config, Error> {
        postgres::parse(self)
    }
}

impl IntoConfig for String {
    fn into_config(self) -> Result<Config, Error> {
        postgres::parse(&self)
    }
}

impl IntoConfig for Config {
    fn into_config(self) -> Result<Config, Error> {
        postgres::check(&self)?;
        Ok(self)
    }
}

impl IntoConfig for &Config {
    fn into_config(self) -> Result<Config, Error> {
        self.clone().into_config()
    }
}

impl IntoConfig for &mut Config {
    fn into_config(self) -> Result<Config, Error> {
        self.clone().into_config()
    }
}

mod sealed {
    #[expect(unnameable_types, reason = "this is what seals IntoConfig")]
    pub trait Sealed {}
    impl Sealed for &str {}
    impl Sealed for &String {}
    impl Sealed for String {}
    impl Sealed for tokio_postgres::Config {}
    impl Sealed for &tokio_postgres::Config {}
    impl Sealed for &mut tokio_postgres::Config {}
}
