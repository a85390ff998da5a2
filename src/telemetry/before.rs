//! Spans of what happens before a query has its own: connecting, and waiting for the connection.

use std::pin::pin;
use std::task::Poll;

use tokio_postgres::error::SqlState;
use tracing::field::Empty;
use tracing::{Instrument, Span, info_span, record_all};

use super::SCOPE;
use super::database::Database;
use crate::error::{Error, Recorded};

/// Opens the span of connecting, as a child of the caller's current span.
pub(crate) fn connect_span() -> Span {
    info_span!(
        target: SCOPE,
        "connect",
        otel.kind = "client",
        otel.status_code = Empty,
        otel.status_description = Empty,
        db.system.name = "postgresql",
        db.namespace = Empty,
        db.response.status_code = Empty,
        server.address = Empty,
        server.port = Empty,
        error.type = Empty,
    )
}

/// Records which database the connection is to.
pub(crate) fn record_connected(span: &Span, database: &Database) {
    record_all!(
        span,
        db.namespace = database.namespace(None).as_deref(),
        server.address = database.address,
        server.port = database.port.map(i64::from),
    );
}

/// Records why there is no connection.
pub(crate) fn record_error(span: &Span, error: &Error) {
    record_all!(
        span,
        otel.status_code = "error",
        otel.status_description = Recorded(error).to_string(),
        db.response.status_code = error.sqlstate().map(SqlState::code),
        error.type = error.type_name(),
    );
}

/// Awaits a stream's turn on its connection, in a span if the turn is not ready at once.
pub(crate) async fn wait_in_span<T>(
    entity: &str,
    database: &Database,
    turn: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut turn = pin!(turn);
    if let Poll::Ready(turn) = std::future::poll_fn(|cx| Poll::Ready(turn.as_mut().poll(cx))).await {
        return turn;
    }
    let span = info_span!(
        target: SCOPE,
        "wait_for_connection",
        otel.status_code = Empty,
        otel.status_description = Empty,
        db.system.name = "postgresql",
        db.collection.name = entity,
        db.response.status_code = Empty,
        server.address = database.address,
        server.port = database.port.map(i64::from),
        error.type = Empty,
    );
    let turn = turn.instrument(span.clone()).await;
    turn.inspect_err(|error| record_error(&span, error))
}
