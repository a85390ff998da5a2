//! `Connection`: one session with Postgres, on which one stream runs at a time.

use std::fmt;
use std::sync::Arc;

use crate::decode::FromJson;
use crate::error::Result;
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

    /// The client below, for `SET`, transactions and all else. Waits until a stream that was dropped before
    /// is cleaned up, so that its cancel cannot hit what you send.
    ///
    /// # Errors
    ///
    /// [`Disconnected`](crate::ErrorKind::Disconnected) if the connection is closed.
    ///
    /// ```no_run
    /// # async fn example(mut db: fraiseql_stream::Connection) -> Result<(), Box<dyn std::error::Error>> {
    /// db.client().await?.batch_execute("SET statement_timeout = '30s'").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn client(&mut self) -> Result<&tokio_postgres::Client> {
        self.idle().await?;
        Ok(self.session.client())
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

/// Settings of a [`Connection`]; made by [`Connection::builder`].
#[must_use = "nothing is connected until `connect` is called"]
pub struct Builder {
    connection: String,
    instruments: Option<Instruments>,
    poll_spans: PollSpans,
    query_text: bool,
}

impl Builder {
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

    /// Connects; see [`Connection::connect`].
    ///
    /// # Errors
    ///
    /// Those of [`Connection::connect`].
    pub async fn connect(self) -> Result<Connection> {
        let session = Session::connect(postgres::parse(&self.connection)?).await?;
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
