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
        Self { limits, room: Room { rows: 0, bytes: 0 }, filling: Filling::default(), held: None }
    }

    fn held_bytes(&self) -> usize {
        self.held.as_ref().and_then(|row| row.payload().ok()).map_or(0, <[u8]>::len)
    }

    /// Fills the chunk until it is full or the source has nothing ready; true at the end of the source.
    fn poll_cut<S>(&mut self, cx: &mut Context<'_>, mut source: Pin<&mut S>) -> Poll<Result<bool, Error>>
    where
        S: Stream<Item = Result<R, Error>>,
    {
        if let Some(row) = self.held.take() {
            self.filling.push(row.payload()?);
        }
        while self.held.is_none() && !self.is_full() {
            match source.as_mut().poll_next(cx) {
                Poll::Ready(Some(row)) => self.push(row?)?,
                Poll::Ready(None) => return Poll::Ready(Ok(true)),
                // What is there must not wait for what is not.
                Poll::Pending if self.filling.rows() > 0 => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(false))
    }

    /// Adds a row, or holds it if it does not fit.
    fn push(&mut self, row: R) -> Result<(), Error> {
        let payload = row.payload()?;
        if self.filling.bytes() + payload.len() <= self.room.bytes {
            self.filling.push(payload);
        } else {
            self.held = Some(row);
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::channel::mpsc;
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;
    use crate::channel::{Receiver, Taken, bounded};
    use crate::time::Clock;

    const LIMITS: Limits = Limits { rows: 8, bytes: 80, chunk_rows: 4, chunk_bytes: 40 };

    fn channel() -> (Sender, Receiver) {
        bounded(LIMITS, Clock::start())
    }

    fn row(text: &'static str) -> Result<Bytes, Error> {
        Ok(Bytes::from_static(text.as_bytes()))
    }

    /// The sizes of the chunks that can be taken now, and whether the end was among them.
    fn chunks(receiver: &mut Receiver) -> (Vec<usize>, bool) {
        let mut sizes = Vec::new();
        loop {
            match receiver.try_take() {
                Some(Taken::Chunk { chunk, .. }) => sizes.push(chunk.rows()),
                Some(_) => return (sizes, true),
                None => return (sizes, false),
            }
        }
    }

    #[test]
    fn rows_are_cut_into_chunks_and_what_is_ready_does_not_wait() {
        let (mut sender, mut receiver) = channel();
        let (rows, source) = mpsc::unbounded();
        let mut work = task::spawn(run(&mut sender, source));
        for _ in 0..6 {
            rows.unbounded_send(row("1")).unwrap();
        }
        assert_pending!(work.poll());
        assert_eq!(chunks(&mut receiver), (vec![4, 2], false));
        drop(rows);
        assert!(matches!(assert_ready!(work.poll()), Ok(Ok(()))));
    }

    #[test]
    fn a_full_channel_makes_the_source_wait() {
        let (mut sender, mut receiver) = channel();
        let source = futures::stream::iter((0..100).map(|_| row("1")));
        let mut work = task::spawn(run(&mut sender, source));
        assert_pending!(work.poll());
        assert_eq!(receiver.gauge().rows(), 8, "full to the row");
        assert_eq!(chunks(&mut receiver), (vec![4, 4], false));
        assert!(work.is_woken());
    }

    #[test]
    fn a_row_that_does_not_fit_waits_and_keeps_its_place() {
        let (mut sender, mut receiver) = channel();
        let source = futures::stream::iter([
            row("1"),
            row("22222222222222222222222222222222222222222222222222222222222222222222222222222222222222222"),
            row("3"),
        ]);
        let mut work = task::spawn(run(&mut sender, source));
        let mut seen = Vec::new();
        for _ in 0..3 {
            let _ = work.poll();
            while let Some(Taken::Chunk { chunk, .. }) = receiver.try_take() {
                seen.extend(chunk.data);
            }
        }
        seen.dedup();
        assert_eq!(seen, b"123");
    }

    #[test]
    fn rows_before_an_error_are_sent_before_it() {
        let (mut sender, mut receiver) = channel();
        let source = futures::stream::iter([row("1"), row("2"), Err(Error::lost())]);
        let mut work = task::spawn(run(&mut sender, source));
        assert!(matches!(assert_ready!(work.poll()), Ok(Err(_))));
        drop(work);
        assert_eq!(chunks(&mut receiver).0, [2]);
    }

    #[test]
    fn a_consumer_that_leaves_ends_the_work_also_while_the_source_is_silent() {
        let (mut sender, receiver) = channel();
        let mut work = task::spawn(run(&mut sender, futures::stream::pending::<Result<Bytes, Error>>()));
        assert_pending!(work.poll());
        drop(receiver);
        assert!(work.is_woken());
        assert!(matches!(assert_ready!(work.poll()), Err(Closed)));
    }
}
