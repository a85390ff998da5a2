//! Cancels a query, from opening the socket of the cancel request to reading the last row.
//!
//! A cancel request names a backend, not a query. Postgres acts on the request before it closes the socket. The next
//! query may therefore be sent only when the sockets of all requests are closed and the query has ended.

use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_postgres::{CancelToken, NoTls};
use tracing::{Instrument, record_all, warn};

use super::connect::Peer;
use super::rows::RawRows;
use crate::error::{Error, ErrorKind, io_cause};
use crate::telemetry::{QuerySpan, SCOPE};

/// The time after which the query of a dropped stream must have ended. If it has not, the connection is closed.
pub(super) const CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);
/// The time after which a second cancel request is sent. Doubles with every request.
const CANCEL_RETRY_INTERVAL: Duration = Duration::from_millis(25);

/// Asks Postgres to cancel until `end` resolves, which it must do when nothing runs any more. Opens a span of its own
/// below that of the query. Returns `false` if the connection must be closed.
pub(super) async fn request_until(
    peer: &Peer,
    token: &CancelToken,
    query: &QuerySpan,
    end: impl Future<Output = ()>,
) -> bool {
    let span = query.open_cancel();
    let requests = send_requests(peer, token, end);
    let (error_type, why) = match timeout(CLEANUP_TIMEOUT, requests).instrument(span.clone()).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => (ErrorKind::Disconnected.as_str(), error.to_string()),
        Err(_) => ("timeout", format!("it did not end within {} s", CLEANUP_TIMEOUT.as_secs())),
    };
    record_all!(
        span,
        otel.status_code = "error",
        otel.status_description = &*why,
        error.type = error_type,
    );
    let _in_span = span.enter();
    warn!(
        name: "fraiseql.cancel.failed",
        target: SCOPE,
        "cannot cancel the query of a dropped stream: {why}; its connection is closed"
    );
    false
}

/// Sends cancel requests until `end` resolves. One is not enough, because a backend that has not started the query yet
/// ignores it.
///
/// # Errors
///
/// An I/O error if a request may still be under way and could cancel the next query.
async fn send_requests(peer: &Peer, token: &CancelToken, end: impl Future<Output = ()>) -> io::Result<()> {
    let mut end = pin!(end);
    let mut retry_interval = CANCEL_RETRY_INTERVAL;
    loop {
        let socket = tokio::select! {
            biased;
            () = &mut end => return Ok(()),
            socket = CancelSocket::open(peer) => socket,
        };
        // If the socket could not be opened, nothing was sent, and the next attempt may succeed.
        if let Ok(socket) = socket {
            // Awaited even if `end` resolves meanwhile, because the request could reach the next query.
            socket.send(token).await?;
        }
        if timeout(retry_interval, &mut end).await.is_ok() {
            return Ok(());
        }
        retry_interval *= 2;
    }
}

/// An open socket for one cancel request.
enum CancelSocket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl CancelSocket {
    /// Connects to the address to which the query was sent. Sends nothing yet.
    async fn open(peer: &Peer) -> io::Result<Self> {
        Ok(match peer {
            Peer::Tcp { addr, .. } => Self::Tcp(TcpStream::connect(addr).await?),
            #[cfg(unix)]
            Peer::Unix { .. } => Self::Unix(UnixStream::connect(peer.to_string()).await?),
        })
    }

    /// Sends the request and waits until Postgres has acted on it: the server signals the backend before it closes the
    /// socket.
    async fn send(self, token: &CancelToken) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => cancel_on(socket, token).await,
            #[cfg(unix)]
            Self::Unix(socket) => cancel_on(socket, token).await,
        }
    }
}

async fn cancel_on<S>(mut socket: S, token: &CancelToken) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    match send_cancel(&mut socket, token).await {
        // These also mean that the server has closed the socket, so nothing is under way any more.
        Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected) => Ok(()),
        other => other,
    }
}

async fn send_cancel<S>(socket: &mut S, token: &CancelToken) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let kind = |error: &tokio_postgres::Error| io_cause(error).map_or(io::ErrorKind::Other, io::Error::kind);
    let sent = token.cancel_query_raw(&mut *socket, NoTls).await;
    sent.map_err(|error| io::Error::new(kind(&error), error))?;
    let mut rest = [0; 64];
    while socket.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Reads and discards the remaining rows of a query.
pub(super) async fn drain(mut rows: RawRows) {
    let mut next = async || std::future::poll_fn(|cx| rows.poll_row(cx, |_| ())).await;
    // A lost connection repeats its error and never ends.
    let is_lost = |error: &Error| error.kind() == ErrorKind::Disconnected;
    while next().await.is_some_and(|row| !row.as_ref().is_err_and(is_lost)) {}
}
