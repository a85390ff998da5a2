//! A connection that is handed out to one query at a time, and is clean whenever it is handed out.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{CancelToken, Client, Config, Statement};
use tracing::Instrument;

use super::connect::{self, Peer};
use super::rows::{RawRows, Value, check_column};
use super::statements::Statements;
use crate::error::{Error, ErrorKind, describe, io_cause};
use crate::launch::Handover;
use crate::source::Source;
use crate::telemetry::QuerySpan;

/// What a cancelled query may take to be gone. Whatever is later costs the connection.
const CLEAN_UP: Duration = Duration::from_secs(5);
/// After so long a cancel is sent again, and then after twice as long.
const PATIENCE: Duration = Duration::from_millis(25);
/// How long the server may take to show whether it is alive after a connection broke.
const POST_MORTEM: Duration = Duration::from_secs(1);

pub(crate) struct Session {
    client: Client,
    config: Config,
    peer: Peer,
    schema: Option<String>,
    wire: JoinHandle<()>,
    /// Why the connection broke.
    broken: Arc<OnceLock<String>>,
    /// One permit: held by the query that runs, and by the clean-up behind it. Closed with the connection.
    turn: Arc<Semaphore>,
    statements: Statements,
    /// The client was handed out, and a statement that the user sent by it may still run.
    lent: AtomicBool,
    /// A query failed or was cancelled, and its caller may not know: the transaction that it ran in, if any, is
    /// aborted.
    unseen_failure: Arc<AtomicBool>,
}

impl Session {
    pub(crate) async fn connect(config: Config, statement_cache: usize) -> Result<Self, Error> {
        let (client, wire, peer) = connect::connect(&config).await?;
        if let Some(warning) = connect::plaintext_warning(&config, &peer) {
            tracing::warn!("{warning}");
        }
        let schema = wire.parameter("search_path").and_then(first_schema);
        let broken = Arc::new(OnceLock::new());
        let cause = Arc::clone(&broken);
        let wire = tokio::spawn(async move {
            // Whoever waits for an answer only learns that the connection is closed.
            if let Err(error) = wire.await
                && tells(&error)
            {
                let _ = cause.set(describe(&error));
            }
        });
        Ok(Self {
            client,
            config,
            peer,
            schema,
            wire,
            broken,
            turn: Arc::new(Semaphore::new(1)),
            statements: Statements::new(statement_cache),
            lent: AtomicBool::new(false),
            unseen_failure: Arc::default(),
        })
    }

    /// Waits until the query before is gone, its clean-up included. Fails once if it took a transaction along.
    pub(crate) async fn turn(&self) -> Result<OwnedSemaphorePermit, Error> {
        let permit = Arc::clone(&self.turn).acquire_owned().await.map_err(|_| Error::closed())?;
        if self.client.is_closed() {
            return Err(Error::closed());
        }
        if self.unseen_failure.load(Ordering::Relaxed) {
            self.check_transaction().await?;
        }
        Ok(permit)
    }

    /// Like `turn`, for a query. Waits until what the user sent by the client is over, too: from then on a cancel
    /// can hit nothing but that query.
    pub(crate) async fn turn_for_query(&self) -> Result<OwnedSemaphorePermit, Error> {
        let permit = self.turn().await?;
        if self.lent.load(Ordering::Relaxed) {
            // Postgres answers in order.
            if let Err(error) = self.client.check_connection().await {
                return Err(self.explain(Error::query(error)).await);
            }
            self.lent.store(false, Ordering::Relaxed);
        }
        Ok(permit)
    }

    /// In an aborted transaction Postgres refuses every statement but those that end it.
    async fn check_transaction(&self) -> Result<(), Error> {
        let checked = self.client.batch_execute("SELECT 1").await;
        self.unseen_failure.store(false, Ordering::Relaxed);
        match checked {
            Err(error) if error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
                Err(Error::transaction_aborted())
            }
            Err(error) => Err(self.explain(Error::query(error)).await),
            Ok(()) => Ok(()),
        }
    }

    /// Set from when a query fails until the caller is given its error.
    pub(crate) fn unseen_failure(&self) -> &Arc<AtomicBool> {
        &self.unseen_failure
    }

    /// The statement of this text, if it is prepared.
    pub(crate) fn statement(&self, text: &str) -> Option<Statement> {
        self.statements.get(text)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed() || self.turn.is_closed()
    }

    /// Hands out the client to the user.
    pub(crate) fn lend(&self) -> &Client {
        self.lent.store(true, Ordering::Relaxed);
        &self.client
    }

    pub(crate) fn lend_mut(&mut self) -> &mut Client {
        self.lent.store(true, Ordering::Relaxed);
        &mut self.client
    }

    /// Says goodbye to Postgres, and waits until the socket is closed.
    pub(crate) async fn close(self) {
        let Self { client, wire, .. } = self;
        drop(client);
        let abort = wire.abort_handle();
        if timeout(CLEAN_UP, wire).await.is_err() {
            abort.abort();
        }
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(crate) fn database(&self) -> Option<&str> {
        self.config.get_dbname().or_else(|| self.config.get_user())
    }

    /// The schema that unqualified names are looked up in, if the server said so at connect time.
    pub(crate) fn schema(&self) -> Option<&str> {
        self.schema.as_deref()
    }

    /// Adds to an error that ended the connection whether the server is still there.
    async fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Disconnected {
            return error;
        }
        // Boxed: what it needs is large, and hardly ever needed.
        Box::pin(self.explain_loss(error)).await
    }

    async fn explain_loss(&self, error: Error) -> Error {
        let probe = connect::connect_one(&self.config, &self.peer);
        let answer = timeout(POST_MORTEM, probe).await;
        // The task that knows the cause may have been behind us, but not by as much as that.
        let error = match self.broken.get() {
            Some(cause) if error.sqlstate().is_none() => error.with_note(cause),
            _ => error,
        };
        let Ok(answer) = answer else {
            return error.with_note("the server does not answer");
        };
        let alive = "the server still answers: only this backend is gone";
        let Err(refusal) = answer else { return error.with_note(alive) };
        let state = match (refusal.sqlstate(), is_refused(&refusal)) {
            (Some(&SqlState::CANNOT_CONNECT_NOW), _) | (None, false) => "goes down or comes up",
            (Some(_), _) => return error.with_note(alive),
            (None, true) => "is gone",
        };
        error.with_note(&format!("the whole server {state}: {}", reason(&refusal)))
    }

    /// Closes the socket; the backend ends as soon as it notices.
    fn discard(&self) {
        self.turn.close();
        self.wire.abort();
    }
}

fn first_schema(search_path: &str) -> Option<String> {
    let named = |schema: &&str| !schema.is_empty() && *schema != "$user";
    let mut schemas = search_path.split(',').map(|schema| schema.trim().trim_matches('"'));
    schemas.find(named).map(ToOwned::to_owned)
}

/// The right to run one query on a session.
pub(crate) struct Lease {
    session: Arc<Session>,
    /// Of the query; a cancel is told below it.
    span: QuerySpan,
    /// Something was sent whose end was not seen.
    running: AtomicBool,
    handover: Handover,
    /// Given back last: whoever has it is alone with the session.
    _turn: OwnedSemaphorePermit,
}

/// The consumer left; the connection was cleaned, or closed where that failed.
#[derive(Debug)]
pub(crate) struct Cancelled;

impl Lease {
    pub(crate) fn new(
        session: &Arc<Session>,
        turn: OwnedSemaphorePermit,
        span: &QuerySpan,
        handover: &Handover,
    ) -> Self {
        Self {
            session: Arc::clone(session),
            span: span.clone(),
            running: AtomicBool::new(false),
            handover: handover.clone(),
            _turn: turn,
        }
    }

    pub(crate) fn handover(&self) -> &Handover {
        &self.handover
    }

    /// The query has failed. Until the caller is given the error, nobody knows what became of the transaction.
    pub(crate) fn fails(&self, error: &Error) {
        if error.sqlstate().is_some() {
            self.session.unseen_failure.store(true, Ordering::Relaxed);
        }
    }

    /// Forgets a statement that the server does not accept any more.
    pub(crate) fn forget(&self, text: &str) {
        self.session.statements.remove(text);
    }

    /// Prepares a statement and refuses it unless it gives one column of JSON.
    pub(crate) async fn prepare(
        &self,
        sql: &str,
        gone: impl Future<Output = ()>,
    ) -> Result<Result<Statement, Error>, Cancelled> {
        let prepared = self.until_gone(self.session.client.prepare(sql), gone, async |_| ()).await?;
        self.runs(false);
        Ok(match prepared {
            Ok(statement) => check_column(&statement).map(|()| {
                self.session.statements.insert(sql, &statement);
                statement
            }),
            Err(error) => Err(self.explain(Error::query(error)).await),
        })
    }

    /// Starts a query. Postgres answers with its first rows, so a query that is silent is still in here.
    pub(crate) async fn query(
        &self,
        statement: &Statement,
        values: &[Value],
        gone: impl Future<Output = ()>,
    ) -> Result<Result<RawRows, Error>, Cancelled> {
        // An answer is not the query's end: it runs on if the cancel came before Postgres had begun it.
        let end = async |answer: Result<_, _>| {
            if let Ok(rows) = answer {
                to_end(RawRows::new(rows)).await;
            }
        };
        let values = values.iter().map(|value| value as &(dyn ToSql + Sync));
        let query = self.session.client.query_raw(statement, values);
        Ok(match self.until_gone(query, gone, end).await? {
            Ok(rows) => Ok(RawRows::new(rows)),
            Err(error) => {
                // Only the server's own word says that nothing runs any more.
                self.runs(error.as_db_error().is_none());
                Err(self.explain(Error::query(error)).await)
            }
        })
    }

    /// Ends a query whose rows nobody wants any more.
    pub(crate) async fn cancel(&self, rows: RawRows) {
        // Nothing runs after ReadyForQuery; a cancel could only hit what comes next.
        if !rows.is_done() {
            self.cancel_until(to_end(rows)).await;
        }
        self.runs(false);
    }

    /// Reads what is left of a query that Postgres has ended, up to `ReadyForQuery`.
    pub(crate) async fn finish(&self, rows: RawRows) {
        if !rows.is_done() {
            self.handover.ensure_task().await;
            if timeout(CLEAN_UP, to_end(rows)).await.is_err() {
                self.session.discard();
            }
        }
        self.runs(false);
    }

    /// Adds to an error that ended the connection whether the server is still there.
    pub(crate) async fn explain(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::Disconnected {
            self.handover.ensure_task().await;
        }
        self.session.explain(error).await
    }

    /// Runs a request up to its answer. If the consumer goes first, Postgres is asked to cancel, and the request
    /// is still awaited, as is what `end` makes of its answer: that is what makes the connection clean.
    async fn until_gone<T>(
        &self,
        request: impl Future<Output = T>,
        gone: impl Future<Output = ()>,
        end: impl AsyncFnOnce(T),
    ) -> Result<T, Cancelled> {
        self.runs(true);
        let mut request = pin!(request);
        tokio::select! {
            biased;
            answer = &mut request => return Ok(answer),
            () = gone => {}
        }
        self.cancel_until(async { end(request.await).await }).await;
        self.runs(false);
        Err(Cancelled)
    }

    fn runs(&self, running: bool) {
        self.running.store(running, Ordering::Relaxed);
    }

    /// Asks Postgres to cancel until `end`, the end of what runs, has come; closes the connection if it does not
    /// come. Once is not enough: a backend that has not begun the query yet passes over the signal.
    async fn cancel_until(&self, end: impl Future<Output = ()>) {
        self.handover.ensure_task().await;
        let session = &self.session;
        session.unseen_failure.store(true, Ordering::Relaxed);
        let span = tracing::info_span!(
            parent: &self.span.get(),
            "cancel",
            otel.kind = "client",
            otel.status_code = tracing::field::Empty,
            db.system.name = "postgresql",
            server.address = session.peer.address(),
        );
        let token = session.client.cancel_token();
        let work = cancel_until(&session.peer, &token, end);
        let why = match timeout(CLEAN_UP, work).instrument(span.clone()).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it did not end within {} s", CLEAN_UP.as_secs()),
        };
        span.record("otel.status_code", "error");
        tracing::warn!(parent: &span, "a dropped query could not be cancelled, so its connection is closed: {why}");
        session.discard();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The task was dropped in the midst of it, with its runtime or by a panic: nobody reads the rest.
        if self.running.load(Ordering::Relaxed) {
            self.session.discard();
        }
    }
}

/// Fails if a request may still be under way: it could hit the next query.
async fn cancel_until(peer: &Peer, token: &CancelToken, end: impl Future<Output = ()>) -> io::Result<()> {
    let mut end = pin!(end);
    let mut patience = PATIENCE;
    loop {
        let socket = tokio::select! {
            biased;
            () = &mut end => return Ok(()),
            socket = peer.cancel_socket() => socket,
        };
        // A socket that could not be opened has sent nothing: the next one may do better.
        if let Ok(socket) = socket {
            // Awaited to its end, always.
            socket.cancel(token).await?;
        }
        if timeout(patience, &mut end).await.is_ok() {
            return Ok(());
        }
        patience *= 2;
    }
}

async fn to_end(mut rows: RawRows) {
    let mut next = async || std::future::poll_fn(|cx| rows.poll_row(cx, |_| ())).await;
    // A lost connection yields its error for ever.
    let lost = |error: &Error| error.kind() == ErrorKind::Disconnected;
    while next().await.is_some_and(|row| !row.as_ref().is_err_and(lost)) {}
}

/// Whether the end of a connection has a cause of its own, beyond its being over.
fn tells(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some() || io_cause(error).is_some_and(|io| io.raw_os_error().is_some())
}

/// Whether nobody listens; a server that restarts takes connections, and drops them.
fn is_refused(error: &Error) -> bool {
    let io = match error.client_error() {
        Some(error) => io_cause(error),
        None => std::error::Error::source(error).and_then(|source| source.downcast_ref()),
    };
    io.is_some_and(|io| matches!(io.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
}

/// Why a connection could not be made, in the server's or the system's words.
fn reason(error: &Error) -> String {
    match error.client_error() {
        Some(error) => describe(error),
        None => std::error::Error::source(error).map_or_else(String::new, ToString::to_string),
    }
}
