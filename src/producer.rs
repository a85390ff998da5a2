//! The producer: raw rows from any source, cut into chunks, sent as far as there is room.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use futures_core::Stream;

use crate::channel::{Closed, Room, Sender};
use crate::chunk::{Chunk, Filling, Payload};
use crate::config::Limits;
use crate::error::Error;

/// Moves all rows of `source` into the channel; returns when the source has ended, or has failed, and all
/// that came before is in the channel. `Closed` says that the consumer left first.
///
/// Room is asked for before rows are read, so what is read can always be sent and at most one row waits
/// outside of the channel's bounds.
pub(crate) async fn run<S, R>(sender: &mut Sender, source: S) -> Result<Result<(), Error>, Closed>
where
    S: Stream<Item = Result<R, Error>>,
    R: Payload,
{
    let mut source = pin!(source);
    let mut cutter = Cutter::new(sender.gauge().limits);
    loop {
        let next = cutter.held_bytes();
        cutter.room = std::future::poll_fn(|cx| sender.poll_room(cx, next)).await?;
        let cut = std::future::poll_fn(|cx| match cutter.poll_cut(cx, source.as_mut()) {
            Poll::Pending if sender.poll_closed(cx).is_ready() => Poll::Ready(Err(Closed)),
            cut => cut.map(Ok),
        });
        let cut = cut.await?;
        if let Some(chunk) = cutter.take() {
            sender.send(chunk);
        }
        match cut {
            Ok(false) => {}
            Ok(true) => return Ok(Ok(())),
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// Cuts a stream of rows into chunks.
struct Cutter<R> {
    limits: Limits,
    room: Room,
    filling: Filling,
    /// A row that was read and did not fit.
    held: Option<R>,
}

impl<R: Payload> Cutter<R> {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            room: Room { rows: 0, bytes: 0 },
            filling: Filling::default(),
            held: None,
        }
    }

    fn held_bytes(&self) -> usize {
        self.held
            .as_ref()
            .and_then(|row| row.payload().ok())
            .map_or(0, <[u8]>::len)
    }

    /// Fills the chunk until it is full or the source has nothing ready; true at the end of the source.
    fn poll_cut<S>(
        &mut self,
        cx: &mut Context<'_>,
        mut source: Pin<&mut S>,
    ) -> Poll<Result<bool, Error>>
    where
        S: Stream<Item = Result<R, Error>>,
    {
        if let Some(row) = self.held.take() {
            self.filling.push(row.payload()?);
        }
        while !self.is_full() {
            match source.as_mut().poll_next(cx) {
                Poll::Ready(Some(row)) => {
                    if let Some(row) = self.push(row?)? {
                        self.held = Some(row);
                        break;
                    }
                }
                Poll::Ready(None) => return Poll::Ready(Ok(true)),
                // What is there must not wait for what is not.
                Poll::Pending if self.filling.rows() > 0 => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(false))
    }

    /// Adds a row, or gives it back if it does not fit.
    fn push(&mut self, row: R) -> Result<Option<R>, Error> {
        let payload = row.payload()?;
        if self.filling.bytes() + payload.len() > self.room.bytes {
            return Ok(Some(row));
        }
        self.filling.push(payload);
        Ok(None)
    }

    fn is_full(&self) -> bool {
        self.filling.rows() >= self.limits.chunk_rows.min(self.room.rows)
            || self.filling.bytes() >= self.limits.chunk_bytes
    }

    fn take(&mut self) -> Option<Chunk> {
        if self.filling.rows() == 0 {
            return None;
        }
        let chunk = std::mem::take(&mut self.filling).finish();
        self.filling = Filling::like(&chunk);
        Some(chunk)
    }
}
