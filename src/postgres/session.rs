//! `Session`: a connection that one query at a time can use, and that is clean before each of them.

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
use crate::telemetry::SCOPE;

/// The time in which the server must answer after a connection was lost, to count as alive.
const LIVENESS_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection to Postgres.
pub(crate) struct Session {
    client: Client,
    config: Config,
    peer: Peer,
    /// The schema in which unqualified names are looked up.
    schema: Option<String>,
    /// The task that drives the connection.
    driver: JoinHandle<()>,
    /// Why the connection was lost.
    loss: Arc<OnceLock<String>>,
    /// One permit, held while a query runs and until it is cleaned up. Closed together with the connection.
    turn: Arc<Semaphore>,
    statements: Statements,
    /// Set if the client was lent to the caller, whose statements may still run.
    lent: AtomicBool,
    /// Set if a query failed or was cancelled and the caller may not know: the transaction in which it ran, if any, is
    /// aborted.
    unseen_failure: Arc<AtomicBool>,
}

impl Session {
    /// Connects to Postgres.
    pub(crate) async fn connect(config: Config, statement_cache: usize) -> Result<Self, Error> {
        let (client, connection, peer) = connect::connect(&config).await?;
        if let Some(warning) = connect::plaintext_warning(&config, &peer) {
            tracing::warn!(name: "fraiseql.connection.plaintext", target: SCOPE, "{warning}");
        }
        let schema = connection.parameter("search_path").and_then(first_schema);
        let loss = Arc::new(OnceLock::new());
        let cause = Arc::clone(&loss);
        let driver = tokio::spawn(async move {
            // A pending request fails only with "connection closed", so the cause is kept for it.
            if let Err(error) = connection.await
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
            driver,
            loss,
            turn: Arc::new(Semaphore::new(1)),
            statements: Statements::new(statement_cache),
            lent: AtomicBool::new(false),
            unseen_failure: Arc::default(),
        })
    }

    /// Waits until the previous query has ended and is cleaned up.
    ///
    /// # Errors
    ///
    /// `Disconnected` if the connection is closed; `TransactionAborted`, once, if the query has aborted a transaction.
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

    /// Like `turn`, but for a query: also waits until the statements that the caller sent through the client have ended.
    /// After that, a cancel request can reach no other statement than the query.
    pub(crate) async fn turn_for_query(&self) -> Result<OwnedSemaphorePermit, Error> {
        let permit = self.turn().await?;
        if self.lent.load(Ordering::Relaxed) {
            // Postgres answers in order, so its answer means that all earlier statements have ended.
            if let Err(error) = self.client.check_connection().await {
                return Err(self.explain(Error::query(error)).await);
            }
            self.lent.store(false, Ordering::Relaxed);
        }
        Ok(permit)
    }

    /// Fails if the open transaction is aborted: Postgres then rejects every statement but those that end it.
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

    /// Returns the flag that is set from the failure of a query until its error is returned to the caller.
    pub(crate) fn unseen_failure(&self) -> &Arc<AtomicBool> {
        &self.unseen_failure
    }

    /// Returns the client, for statements of this crate.
    pub(super) fn sender(&self) -> &Client {
        &self.client
    }

    /// Returns the cache of prepared statements.
    pub(super) fn statements(&self) -> &Statements {
        &self.statements
    }

    /// Returns the prepared statement with this text, if it is in the cache.
    pub(crate) fn statement(&self, text: &str) -> Option<Statement> {
        self.statements.get(text)
    }

    /// Returns whether the connection is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed() || self.turn.is_closed()
    }

    /// Lends the client to the caller, for statements of its own.
    pub(crate) fn lend(&self) -> &Client {
        self.lent.store(true, Ordering::Relaxed);
        &self.client
    }

    /// Lends the client mutably to the caller.
    pub(crate) fn lend_mut(&mut self) -> &mut Client {
        self.lent.store(true, Ordering::Relaxed);
        &mut self.client
    }

    /// Ends the session with Postgres and waits until the socket is closed.
    pub(crate) async fn close(self) {
        let Self { client, driver, .. } = self;
        drop(client);
        let abort = driver.abort_handle();
        if timeout(CLEANUP_TIMEOUT, driver).await.is_err() {
            abort.abort();
        }
    }

    /// Returns the address of the server.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Returns the name of the database; without one, Postgres uses the name of the user.
    pub(crate) fn database(&self) -> Option<&str> {
        self.config.get_dbname().or_else(|| self.config.get_user())
    }

    /// Returns the schema in which unqualified names are looked up, if the server reported it when the connection was
    /// made.
    pub(crate) fn schema(&self) -> Option<&str> {
        self.schema.as_deref()
    }

    /// Adds to an error that ended the connection whether the server still answers.
    pub(super) async fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Disconnected {
            return error;
        }
        // Boxed, because this future is large and rarely needed.
        Box::pin(self.explain_loss(error)).await
    }

    async fn explain_loss(&self, error: Error) -> Error {
        let probe = connect::connect_one(&self.config, &self.peer);
        let answer = timeout(LIVENESS_TIMEOUT, probe).await;
        // Read after the probe, by which time the driver task has stored the cause.
        let error = match self.loss.get() {
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

    /// Closes the connection without ending the session. The backend ends when it notices.
    pub(super) fn discard(&self) {
        self.turn.close();
        self.driver.abort();
    }
}

/// Returns the first schema that a search path names, other than `$user`.
fn first_schema(search_path: &str) -> Option<String> {
    let named = |schema: &&str| !schema.is_empty() && *schema != "$user";
    let mut schemas = search_path.split(',').map(|schema| schema.trim().trim_matches('"'));
    schemas.find(named).map(ToOwned::to_owned)
}

/// Returns whether the error says why the connection ended, and not only that it did.
fn has_cause(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some() || io_cause(error).is_some_and(|io| io.raw_os_error().is_some())
}

/// Returns whether no server listens at the address. A server that restarts accepts connections and then drops them.
fn is_refused(error: &Error) -> bool {
    let io = match error.client_error() {
        Some(error) => io_cause(error),
        None => error.get_ref().and_then(|cause| cause.downcast_ref()),
    };
    io.is_some_and(|io| matches!(io.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
}

/// Returns why a connection could not be made, in the words of the server or the operating system.
fn reason(error: &Error) -> String {
    match error.client_error() {
        Some(error) => describe(error),
        None => error.get_ref().map_or_else(String::new, ToString::to_string),
    }
}
