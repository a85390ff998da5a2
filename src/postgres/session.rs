//! A connection that is handed out to one query at a time, and is clean whenever it is handed out.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Statement};

use super::cancel::CLEANUP_TIMEOUT;
use super::connect::{self, Peer};
use super::statements::Statements;
use crate::error::{Error, ErrorKind, describe, io_cause};

/// The time in which the server has to show that it is alive after a connection broke.
const LIVENESS_TIMEOUT: Duration = Duration::from_secs(1);

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
                && has_cause(&error)
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

    /// The client, to send statements of this crate.
    pub(super) fn sender(&self) -> &Client {
        &self.client
    }

    pub(super) fn statements(&self) -> &Statements {
        &self.statements
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
        if timeout(CLEANUP_TIMEOUT, wire).await.is_err() {
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
    pub(super) async fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Disconnected {
            return error;
        }
        // Boxed: what it needs is large, and hardly ever needed.
        Box::pin(self.explain_loss(error)).await
    }

    async fn explain_loss(&self, error: Error) -> Error {
        let probe = connect::connect_one(&self.config, &self.peer);
        let answer = timeout(LIVENESS_TIMEOUT, probe).await;
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
            (Some(&SqlState::CANNOT_CONNECT_NOW), _) | (None, false) => "is shutting down or starting up",
            (Some(_), _) => return error.with_note(alive),
            (None, true) => "is gone",
        };
        error.with_note(&format!("the whole server {state}: {}", reason(&refusal)))
    }

    /// Closes the socket; the backend ends as soon as it notices.
    pub(super) fn discard(&self) {
        self.turn.close();
        self.wire.abort();
    }
}

fn first_schema(search_path: &str) -> Option<String> {
    let named = |schema: &&str| !schema.is_empty() && *schema != "$user";
    let mut schemas = search_path.split(',').map(|schema| schema.trim().trim_matches('"'));
    schemas.find(named).map(ToOwned::to_owned)
}

/// Whether the end of a connection has a cause of its own, beyond its being over.
fn has_cause(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some() || io_cause(error).is_some_and(|io| io.raw_os_error().is_some())
}

/// Whether nobody listens; a server that restarts takes connections, and drops them.
fn is_refused(error: &Error) -> bool {
    let io = match error.client_error() {
        Some(error) => io_cause(error),
        None => error.get_ref().and_then(|cause| cause.downcast_ref()),
    };
    io.is_some_and(|io| matches!(io.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
}

/// Why a connection could not be made, in the server's or the system's words.
fn reason(error: &Error) -> String {
    match error.client_error() {
        Some(error) => describe(error),
        None => error.get_ref().map_or_else(String::new, ToString::to_string),
    }
}
