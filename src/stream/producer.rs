//! The producer: cuts the rows of a source into chunks, and sends them to the channel while there is room.

use std::task::{Context, Poll};

use super::launch::Handover;
use crate::channel::{Chunk, Closed, Filling, Limits, Payload as _, Room, Sender};
use crate::error::Error;
use crate::postgres::RawRows;

/// A source of rows.
pub(super) trait Source {
    /// Calls `look` with the JSON text of the next row. Returns `None` at the end.
    fn poll_row<V>(
        &mut self,
        cx: &mut Context<'_>,
        look: impl FnOnce(&[u8]) -> V,
    ) -> Poll<Option<Result<V, Error>>>;
}

impl Source for RawRows {
    #[inline]
    fn poll_row<V>(
        &mut self,
        cx: &mut Context<'_>,
        look: impl FnOnce(&[u8]) -> V,
    ) -> Poll<Option<Result<V, Error>>> {
        Self::poll_row(self, cx, look)
    }
}

/// Why not all rows were sent.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The stream was dropped.
    Closed,
    /// The source failed. All rows that precede the error were sent.
    Failed(Error),
}

/// Sends all rows of `source` to the channel. Moves into a task if there is more than one chunk.
///
/// Rows are read only when there is room for them, so that at most one row waits outside of the channel's bounds.
///
/// # Errors
///
/// `Stopped`, after all rows that precede the error were sent, or as soon as the stream is dropped.
pub(super) async fn run(
    sender: &mut Sender<Chunk, Error>,
    source: &mut impl Source,
    handover: &Handover,
) -> Result<(), Stopped> {
    let mut cutter = Cutter::new(sender.limits());
    loop {
        let next = cutter.held.as_ref().map_or(0, Vec::len);
        cutter.room = std::future::poll_fn(|cx| sender.poll_room(cx, next)).await?;
        let cut = std::future::poll_fn(|cx| match cutter.poll_cut(cx, source) {
            Poll::Pending if sender.poll_closed(cx).is_ready() => Poll::Ready(Err(Stopped::Closed)),
            cut => cut.map_err(Stopped::Failed),
        });
        let cut = cut.await;
        if let Some(chunk) = cutter.take() {
            let (rows, bytes) = (chunk.rows(), chunk.bytes());
            cutter.filling = sender.send(chunk);
            cutter.filling.reserve(rows, bytes);
        }
        if cut? {
            return Ok(());
        }
        if !handover.is_in_task() {
            sender.record_move();
            handover.ensure_task().await;
        }
    }
}

impl From<Closed> for Stopped {
    fn from(Closed: Closed) -> Self {
        Self::Closed
    }
}

/// Cuts the rows of a source into chunks.
struct Cutter {
    limits: Limits,
    room: Room,
    filling: Filling,
    /// A row that was read but does not fit.
    held: Option<Vec<u8>>,
}

impl Cutter {
    fn new(limits: Limits) -> Self {
        Self { limits, room: Room { rows: 0, bytes: 0 }, filling: Filling::default(), held: None }
    }

    /// Fills the chunk until it is full or no further row is ready. Returns `true` at the end of the source.
    fn poll_cut(&mut self, cx: &mut Context<'_>, source: &mut impl Source) -> Poll<Result<bool, Error>> {
        if let Some(row) = self.held.take() {
            self.filling.start_with(row);
        }
        while self.held.is_none() && !self.is_full() {
            match source.poll_row(cx, |row| self.push(row)) {
                Poll::Ready(Some(pushed)) => pushed?,
                Poll::Ready(None) => return Poll::Ready(Ok(true)),
                // The rows that are ready must not wait for those that are not.
                Poll::Pending if self.filling.rows() > 0 => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(false))
    }

    /// Adds a row, or holds it if it does not fit.
    #[inline]
    fn push(&mut self, row: &[u8]) {
        let most = if self.filling.rows() == 0 {
            self.room.bytes
        } else {
            self.room.bytes.min(self.limits.chunk_bytes)
        };
        if self.filling.bytes() + row.len() <= most {
            self.filling.push(row);
        } else {
            self.held = Some(row.to_vec());
        }
    }

    #[inline]
    fn is_full(&self) -> bool {
        self.filling.rows() >= self.limits.chunk_rows.min(self.room.rows)
            || self.filling.bytes() >= self.limits.chunk_bytes
    }

    /// Returns the chunk, unless it is empty.
    fn take(&mut self) -> Option<Chunk> {
        if self.filling.rows() == 0 {
            return None;
        }
        Some(std::mem::take(&mut self.filling).finish())
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::Arc;

    use futures::Stream;
    use futures::channel::mpsc;
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;
    use crate::channel::{Clock, Receiver, Taken, Watchdog, bounded};

    const LIMITS: Limits = Limits { rows: 8, bytes: 80, chunk_rows: 4, chunk_bytes: 40 };

    fn channel() -> (Sender<Chunk, Error>, Receiver<Chunk, Error>) {
        bounded(LIMITS, Clock::start(), Arc::new(Watchdog::new(Clock::start(), false)))
    }

    type Row = Result<&'static str, Error>;

    /// A source that yields the items of a stream.
    struct StreamSource<S>(S);

    impl<S: Stream<Item = Row> + Unpin> Source for StreamSource<S> {
        fn poll_row<V>(
            &mut self,
            cx: &mut Context<'_>,
            look: impl FnOnce(&[u8]) -> V,
        ) -> Poll<Option<Result<V, Error>>> {
            Pin::new(&mut self.0).poll_next(cx).map(|row| row.map(|row| row.map(|row| look(row.as_bytes()))))
        }
    }

    /// Returns the sizes of the chunks that can be taken now, and whether the end follows them.
    fn chunks(receiver: &mut Receiver<Chunk, Error>) -> (Vec<usize>, bool) {
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
    fn ready_rows_are_sent_in_chunks_without_waiting_for_more() {
        let (mut sender, mut receiver) = channel();
        let in_task = Handover::in_task();
        let (rows, source) = mpsc::unbounded();
        let mut source = StreamSource(source);
        let mut work = task::spawn(run(&mut sender, &mut source, &in_task));
        for _ in 0..6 {
            rows.unbounded_send(Ok("1")).unwrap();
        }
        assert_pending!(work.poll());
        assert_eq!(chunks(&mut receiver), (vec![4, 2], false));
        drop(rows);
        assert!(matches!(assert_ready!(work.poll()), Ok(())));
    }

    #[test]
    fn full_channel_makes_the_source_wait() {
        let (mut sender, mut receiver) = channel();
        let in_task = Handover::in_task();
        let source = futures::stream::iter((0..100).map(|_| Ok("1")));
        let mut source = StreamSource(source);
        let mut work = task::spawn(run(&mut sender, &mut source, &in_task));
        assert_pending!(work.poll());
        assert_eq!(receiver.gauge().rows(), 8, "the channel is full");
        assert_eq!(chunks(&mut receiver), (vec![4, 4], false));
        assert!(work.is_woken());
    }

    #[test]
    fn row_that_does_not_fit_waits_and_keeps_its_place() {
        let (mut sender, mut receiver) = channel();
        let in_task = Handover::in_task();
        let source = futures::stream::iter([
            Ok("1"),
            Ok("22222222222222222222222222222222222222222222222222222222222222222222222222222222222222222"),
            Ok("3"),
        ]);
        let mut source = StreamSource(source);
        let mut work = task::spawn(run(&mut sender, &mut source, &in_task));
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
    fn chunk_is_cut_before_it_exceeds_its_bytes() {
        let (mut sender, mut receiver) = channel();
        let in_task = Handover::in_task();
        let source = futures::stream::iter(["30 bytes, which is not too much"; 2].map(Ok));
        let mut source = StreamSource(source);
        let mut work = task::spawn(run(&mut sender, &mut source, &in_task));
        assert!(matches!(assert_ready!(work.poll()), Ok(())));
        drop(work);
        assert_eq!(chunks(&mut receiver).0, [1, 1]);
    }

    #[test]
    fn rows_before_an_error_are_sent_before_it() {
        let (mut sender, mut receiver) = channel();
        let in_task = Handover::in_task();
        let source = futures::stream::iter([Ok("1"), Ok("2"), Err(Error::lost())]);
        let mut source = StreamSource(source);
        let mut work = task::spawn(run(&mut sender, &mut source, &in_task));
        assert!(matches!(assert_ready!(work.poll()), Err(Stopped::Failed(_))));
        drop(work);
        assert_eq!(chunks(&mut receiver).0, [2]);
    }

    #[test]
    fn dropped_receiver_ends_the_work_while_the_source_is_silent() {
        let (mut sender, receiver) = channel();
        let in_task = Handover::in_task();
        let mut source = StreamSource(futures::stream::pending::<Row>());
        let mut work = task::spawn(run(&mut sender, &mut source, &in_task));
        assert_pending!(work.poll());
        drop(receiver);
        assert!(work.is_woken());
        assert!(matches!(assert_ready!(work.poll()), Err(Stopped::Closed)));
    }
}
