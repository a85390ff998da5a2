//! `Lease`: the right to run one query on a session.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use super::Session;
use super::cancel::{self, CLEANUP_TIMEOUT};
use super::params::Value;
use super::rows::{RawRows, check_column};
use crate::error::Error;
use crate::telemetry::QuerySpan;

/// The right to run one query on a session. Cancelling, draining and diagnosing need timers, so they must be awaited in
/// a task.
pub(crate) struct Lease {
    session: Arc<Session>,
    span: QuerySpan,
    /// Set if something was sent and its end has not been received.
    is_running: AtomicBool,
    /// Released last, when nothing else uses the session.
    _turn: OwnedSemaphorePermit,
}

/// Why a request to Postgres has no result.
#[derive(Debug)]
pub(crate) enum Interrupted {
    Failed(Error),
    /// The stream was dropped, and the request was cancelled. The connection is clean, or was closed.
    Cancelled,
}

impl Lease {
    /// Creates the lease of a session whose turn was acquired.
    pub(crate) fn new(session: &Arc<Session>, turn: OwnedSemaphorePermit, span: &QuerySpan) -> Self {
        Self {
            session: Arc::clone(session),
            span: span.clone(),
            is_running: AtomicBool::new(false),
            _turn: turn,
        }
    }

    /// Records that the query failed. Until the error is returned to the caller, the caller does not know that the
    /// transaction, if there is one, is aborted.
    pub(crate) fn record_failure(&self, error: &Error) {
        if error.sqlstate().is_some() {
            self.session.unseen_failure().store(true, Ordering::Relaxed);
        }
    }

    /// Removes a statement from the cache that the server no longer accepts.
    pub(crate) fn forget(&self, text: &str) {
        self.session.statements().remove(text);
    }

    /// Prepares a statement, and rejects it unless it returns one column of JSON. Cancels the request when `dropped`
    /// resolves first.
    pub(crate) async fn prepare(
        &self,
        sql: &str,
        dropped: impl Future<Output = ()>,
    ) -> Result<Statement, Interrupted> {
        let prepared =
            self.cancel_if_dropped(self.session.sender().prepare(sql), dropped, async |_| ()).await?;
        self.set_running(false);
        let statement = prepared.map_err(|error| Interrupted::Failed(Error::query(error)))?;
        check_column(&statement).map_err(Interrupted::Failed)?;
        self.session.statements().insert(sql, &statement);
        Ok(statement)
    }

    /// Starts a query, and returns when Postgres answers. It answers together with the first rows, which may take long.
    /// Cancels the query when `dropped` resolves first.
    pub(crate) async fn query(
        &self,
        statement: &Statement,
        values: &[Value],
        dropped: impl Future<Output = ()>,
    ) -> Result<RawRows, Interrupted> {
        // The answer is not the end of the query, which runs on if Postgres ignored a cancel request that came too early.
        let end = async |answer: Result<_, _>| {
            if let Ok(rows) = answer {
                cancel::drain(RawRows::new(rows)).await;
            }
        };
        let values = values.iter().map(|value| value as &(dyn ToSql + Sync));
        let query = self.session.sender().query_raw(statement, values);
        self.cancel_if_dropped(query, dropped, end).await?.map(RawRows::new).map_err(|error| {
            // Only an error of the server proves that nothing runs any more.
            self.set_running(error.as_db_error().is_none());
            Interrupted::Failed(Error::query(error))
        })
    }

    /// Cancels a query whose remaining rows are not wanted.
    pub(crate) async fn cancel(&self, rows: RawRows) {
        // After ReadyForQuery nothing runs, and a cancel request could only reach the next query.
        if !rows.is_done() {
            self.cancel_until(cancel::drain(rows)).await;
        }
        self.set_running(false);
    }

    /// Reads the remaining messages of a query that Postgres has ended, up to `ReadyForQuery`.
    pub(crate) async fn finish(&self, rows: RawRows) {
        if !rows.is_done() && timeout(CLEANUP_TIMEOUT, cancel::drain(rows)).await.is_err() {
            self.session.discard();
        }
        self.set_running(false);
    }

    /// Adds to an error that ended the connection whether the server still answers.
    pub(crate) async fn explain(&self, error: Error) -> Error {
        self.session.explain(error).await
    }

    /// Awaits the answer to a request. If `dropped` resolves first, asks Postgres to cancel; the answer, and `end` with
    /// it, are awaited all the same, because only then is the connection clean.
    async fn cancel_if_dropped<T>(
        &self,
        request: impl Future<Output = T>,
        dropped: impl Future<Output = ()>,
        end: impl AsyncFnOnce(T),
    ) -> Result<T, Interrupted> {
        self.set_running(true);
        let mut request = pin!(request);
        tokio::select! {
            biased;
            answer = &mut request => return Ok(answer),
            () = dropped => {}
        }
        self.cancel_until(async { end(request.await).await }).await;
        self.set_running(false);
        Err(Interrupted::Cancelled)
    }

    fn set_running(&self, is_running: bool) {
        self.is_running.store(is_running, Ordering::Relaxed);
    }

    /// Sends cancel requests until `end` resolves, or closes the connection.
    async fn cancel_until(&self, end: impl Future<Output = ()>) {
        let session = &self.session;
        session.unseen_failure().store(true, Ordering::Relaxed);
        let token = session.sender().cancel_token();
        if !cancel::request_until(session.peer(), &token, &self.span, end).await {
            session.discard();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The task was dropped with its runtime or has panicked, so the rest will not be read.
        if self.is_running.load(Ordering::Relaxed) {
            self.session.discard();
        }
    }
}
