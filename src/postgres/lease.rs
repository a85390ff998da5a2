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

/// The right to run one query on a session. Whatever needs timers - cancelling, draining and diagnosing - must be
/// awaited in a task.
pub(crate) struct Lease {
    session: Arc<Session>,
    span: QuerySpan,
    /// Something was sent, and its end has not been received.
    is_running: AtomicBool,
    /// Released last: whoever acquires it is alone with the session.
    _turn: OwnedSemaphorePermit,
}

/// Why a request to Postgres has no result.
#[derive(Debug)]
pub(crate) enum Interrupted {
    Failed(Error),
    /// The consumer left, and the request was cancelled. The connection is clean, or was closed.
    Cancelled,
}

impl Lease {
    pub(crate) fn new(session: &Arc<Session>, turn: OwnedSemaphorePermit, span: &QuerySpan) -> Self {
        Self {
            session: Arc::clone(session),
            span: span.clone(),
            is_running: AtomicBool::new(false),
            _turn: turn,
        }
    }

    /// Records that the query failed. Until the caller has received the error, nobody knows what became of the
    /// transaction.
    pub(crate) fn fails(&self, error: &Error) {
        if error.sqlstate().is_some() {
            self.session.unseen_failure().store(true, Ordering::Relaxed);
        }
    }

    /// Removes a statement that the server no longer accepts from the cache.
    pub(crate) fn forget(&self, text: &str) {
        self.session.statements().remove(text);
    }

    /// Prepares a statement, and rejects it unless it returns one column of JSON.
    pub(crate) async fn prepare(
        &self,
        sql: &str,
        gone: impl Future<Output = ()>,
    ) -> Result<Statement, Interrupted> {
        let prepared = self.until_gone(self.session.sender().prepare(sql), gone, async |_| ()).await?;
        self.set_running(false);
        let statement = prepared.map_err(|error| Interrupted::Failed(Error::query(error)))?;
        check_column(&statement).map_err(Interrupted::Failed)?;
        self.session.statements().insert(sql, &statement);
        Ok(statement)
    }

    /// Starts a query. Postgres answers together with the first rows, so a query that returns none for a long time is
    /// awaited in here.
    pub(crate) async fn query(
        &self,
        statement: &Statement,
        values: &[Value],
        gone: impl Future<Output = ()>,
    ) -> Result<RawRows, Interrupted> {
        // An answer is not the query's end: it runs on if the cancel came before Postgres had started it.
        let end = async |answer: Result<_, _>| {
            if let Ok(rows) = answer {
                cancel::drain(RawRows::new(rows)).await;
            }
        };
        let values = values.iter().map(|value| value as &(dyn ToSql + Sync));
        let query = self.session.sender().query_raw(statement, values);
        self.until_gone(query, gone, end).await?.map(RawRows::new).map_err(|error| {
            // Only an answer of the server proves that nothing runs any more.
            self.set_running(error.as_db_error().is_none());
            Interrupted::Failed(Error::query(error))
        })
    }

    /// Cancels a query whose remaining rows are not wanted.
    pub(crate) async fn cancel(&self, rows: RawRows) {
        // After ReadyForQuery nothing runs, and a cancel could only hit the next query.
        if !rows.is_done() {
            self.cancel_until(cancel::drain(rows)).await;
        }
        self.set_running(false);
    }

    /// Reads the rest of a query that Postgres has ended, up to `ReadyForQuery`.
    pub(crate) async fn finish(&self, rows: RawRows) {
        if !rows.is_done() && timeout(CLEANUP_TIMEOUT, cancel::drain(rows)).await.is_err() {
            self.session.discard();
        }
        self.set_running(false);
    }

    /// Adds to an error that ended the connection whether the server is still there.
    pub(crate) async fn explain(&self, error: Error) -> Error {
        self.session.explain(error).await
    }

    /// Awaits the answer to a request. If the consumer leaves first, Postgres is asked to cancel, and both the answer
    /// and what `end` does with it are still awaited: that is what makes the connection clean.
    async fn until_gone<T>(
        &self,
        request: impl Future<Output = T>,
        gone: impl Future<Output = ()>,
        end: impl AsyncFnOnce(T),
    ) -> Result<T, Interrupted> {
        self.set_running(true);
        let mut request = pin!(request);
        tokio::select! {
            biased;
            answer = &mut request => return Ok(answer),
            () = gone => {}
        }
        self.cancel_until(async { end(request.await).await }).await;
        self.set_running(false);
        Err(Interrupted::Cancelled)
    }

    fn set_running(&self, is_running: bool) {
        self.is_running.store(is_running, Ordering::Relaxed);
    }

    async fn cancel_until(&self, end: impl Future<Output = ()>) {
        let session = &self.session;
        session.unseen_failure().store(true, Ordering::Relaxed);
        let token = session.sender().cancel_token();
        if !cancel::cancel(session.peer(), &token, &self.span, end).await {
            session.discard();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The task was dropped with its runtime, or it panicked: nobody reads the rest.
        if self.is_running.load(Ordering::Relaxed) {
            self.session.discard();
        }
    }
}
