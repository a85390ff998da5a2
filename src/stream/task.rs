//! `Task`: the work behind a stream, from preparing the statement to the last row, or to the clean-up if the stream is
//! dropped.

use tokio::sync::oneshot;
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};

use super::launch::{Handover, Launch, Work};
use super::producer::{self, Stopped};
use crate::channel::{Chunk, Receiver, Sender};
use crate::error::{Error, ErrorKind, Result};
use crate::postgres::{self, Interrupted, Lease, RawRows, Value};

/// The work behind a stream.
pub(super) struct Task {
    pub(super) lease: Lease,
    pub(super) text: String,
    pub(super) sender: Sender<Chunk, Error>,
    pub(super) handover: Handover,
}

/// Launches a task whose statement Postgres has to prepare first. Returns once it is prepared and the values are encoded
/// for its parameters.
pub(super) async fn launch_unprepared(
    task: Task,
    launch: impl FnOnce(Work) -> Launch,
    receiver: &mut Receiver<Chunk, Error>,
    values: &[&(dyn ToSql + Sync)],
) -> Result<Launch> {
    let (types, mut prepared) = oneshot::channel();
    let (bind, bound) = oneshot::channel();
    let launch = launch(Box::pin(task.prepare_and_query(types, bound)));
    receiver.wait_for_start();
    let prepared = std::future::poll_fn(|cx| {
        launch.poll(cx);
        std::pin::Pin::new(&mut prepared).poll(cx)
    });
    let types = prepared.await.unwrap_or_else(|_| Err(Error::lost()));
    receiver.resume();
    let values = postgres::encode(values, &types?)?;
    // If the task has ended and cannot receive them, the first item of the stream is the reason.
    let _ = bind.send(values);
    Ok(launch)
}

impl Task {
    /// Prepares the statement, sends the types of its parameters, receives their values, and runs the statement.
    async fn prepare_and_query(
        mut self,
        types: oneshot::Sender<Result<Vec<Type>>>,
        values: oneshot::Receiver<Vec<Value>>,
    ) {
        let statement = match self.prepare().await {
            Ok(statement) => statement,
            Err(Interrupted::Failed(error)) => {
                self.lease.record_failure(&error);
                // If the receiver is gone, the future that would return the error was dropped.
                let _ = types.send(Err(error));
                return;
            }
            Err(Interrupted::Cancelled) => return,
        };
        let _ = types.send(Ok(statement.params().to_vec()));
        if let Ok(values) = values.await {
            self.query(statement, values).await;
        }
    }

    async fn prepare(&mut self) -> Result<Statement, Interrupted> {
        let dropped = dropped(&mut self.sender, &self.handover);
        let prepared = self.lease.prepare(&self.text, dropped).await;
        match self.explained(prepared).await {
            // It is not this statement that is gone, but one with which the client looks up types.
            Err(Interrupted::Failed(error)) if error.is_stale_statement() => {
                Err(Interrupted::Failed(error.with_note(
                    "DISCARD or DEALLOCATE has removed a statement of the client itself; connect again",
                )))
            }
            prepared => prepared,
        }
    }

    /// Runs a prepared statement.
    pub(super) async fn query(mut self, statement: Statement, values: Vec<Value>) {
        let rows = match self.begin(&statement, &values).await {
            Err(Interrupted::Failed(error)) if error.is_stale_statement() => {
                self.begin_again(&statement, &values, error).await
            }
            rows => rows,
        };
        match rows {
            Ok(rows) => self.produce(rows).await,
            Err(Interrupted::Failed(error)) => {
                self.lease.record_failure(&error);
                self.sender.finish(Err(error));
            }
            Err(Interrupted::Cancelled) => {}
        }
        // A statement that is not cached is closed here, after the query and before the next one starts.
        drop(statement);
    }

    async fn begin(&mut self, statement: &Statement, values: &[Value]) -> Result<RawRows, Interrupted> {
        let dropped = dropped(&mut self.sender, &self.handover);
        let rows = self.lease.query(statement, values, dropped).await;
        self.explained(rows).await
    }

    /// Prepares a statement again that the server no longer accepts, after a change of the schema or `DISCARD ALL`, and
    /// runs it. Fails inside a transaction, which the error `stale` has aborted.
    async fn begin_again(
        &mut self,
        before: &Statement,
        values: &[Value],
        stale: Error,
    ) -> Result<RawRows, Interrupted> {
        self.lease.forget(&self.text);
        let note = match self.prepare().await {
            Ok(statement) if statement.params() == before.params() => {
                return self.begin(&statement, values).await;
            }
            Ok(_) => "the types of its parameters have changed; run the query again",
            Err(Interrupted::Failed(error))
                if error.sqlstate() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) =>
            {
                if stale.sqlstate() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME) {
                    "it was deallocated; do not run DEALLOCATE or DISCARD inside a transaction with streams"
                } else {
                    "the schema changed after the statement was prepared; run the transaction again"
                }
            }
            Err(other) => return Err(other),
        };
        Err(Interrupted::Failed(stale.with_note(note)))
    }

    /// Sends the rows to the channel, and leaves the connection clean.
    async fn produce(&mut self, mut rows: RawRows) {
        let Err(stopped) = producer::run(&mut self.sender, &mut rows, &self.handover).await else {
            self.sender.finish(Ok(()));
            return self.lease.finish(rows).await;
        };
        // Only an error of the server ends the query.
        let mut is_ended = false;
        if let Stopped::Failed(error) = stopped {
            is_ended = error.sqlstate().is_some();
            self.lease.record_failure(&error);
            self.sender.finish(Err(self.explain(error).await));
        }
        self.handover.ensure_task().await;
        if is_ended {
            self.lease.finish(rows).await;
        } else {
            self.lease.cancel(rows).await;
        }
    }

    /// Applies `explain` to an error.
    async fn explained<T>(&self, answer: Result<T, Interrupted>) -> Result<T, Interrupted> {
        match answer {
            Err(Interrupted::Failed(error)) => Err(Interrupted::Failed(self.explain(error).await)),
            other => other,
        }
    }

    /// Adds to an error that ended the connection whether the server still answers.
    async fn explain(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::Disconnected {
            self.handover.ensure_task().await;
        }
        self.lease.explain(error).await
    }
}

/// Waits until the stream is dropped, and then until the work runs in a task, where the query can be cancelled.
async fn dropped(sender: &mut Sender<Chunk, Error>, handover: &Handover) {
    std::future::poll_fn(|cx| sender.poll_closed(cx)).await;
    handover.ensure_task().await;
}
