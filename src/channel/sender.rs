//! `Sender`: the producer's half of the channel.

use std::sync::Arc;
use std::task::{Context, Poll};

use super::chunk::Payload;
use super::ledger::ProducerState;
use super::limits::Limits;
use super::shared::{Shared, register, wake};

/// The error of a sender whose receiver is closed: no more rows are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// What fits into the channel now. It does not shrink until the sender sends a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

/// The producer's half. If it is dropped without [`finish`](Self::finish), the consumer takes
/// [`Taken::Lost`](super::Taken::Lost) after the last chunk.
pub(crate) struct Sender<P: Payload, E>(Arc<Shared<P, E>>);

impl<P: Payload, E> Sender<P, E> {
    pub(super) fn new(shared: Arc<Shared<P, E>>) -> Self {
        Self(shared)
    }

    pub(crate) fn limits(&self) -> Limits {
        self.0.limits
    }

    /// Waits until a row of `bytes` fits. A row that exceeds the byte limit waits until the channel is empty, and
    /// then fits alone.
    ///
    /// # Errors
    /// `Closed` if the receiver is closed.
    pub(crate) fn poll_room(&mut self, cx: &Context<'_>, bytes: usize) -> Poll<Result<Room, Closed>> {
        let Limits { rows: row_limit, bytes: byte_limit, .. } = self.0.limits;
        let ledger = self.0.ledger();
        let mut queue = self.0.lock();
        ledger.record_producer_run();
        if queue.receiver_gone {
            return Poll::Ready(Err(Closed));
        }
        let room = Room { rows: row_limit - queue.rows, bytes: byte_limit.saturating_sub(queue.bytes) };
        let is_empty = queue.chunks.is_empty();
        if is_empty || (room.rows > 0 && room.bytes >= bytes.max(1)) {
            if ledger.producer_is(ProducerState::Room) {
                ledger.enter_producer(ProducerState::Source, ledger.now());
            }
            return Poll::Ready(Ok(Room {
                bytes: if is_empty { room.bytes.max(bytes) } else { room.bytes },
                ..room
            }));
        }
        if ledger.producer_is(ProducerState::Source) {
            ledger.enter_producer(ProducerState::Room, ledger.now());
        }
        register(&mut queue.producer, cx);
        Poll::Pending
    }

    /// Records that the producer is about to move into a task, which the consumer's thread has to run.
    pub(crate) fn record_move(&mut self) {
        let queue = self.0.lock();
        let ledger = self.0.ledger();
        ledger.record_producer_wake(ledger.now());
        drop(queue);
    }

    /// Sends a chunk, which must fit the room last returned by [`poll_room`](Self::poll_room). Returns memory for
    /// the next chunk. If the receiver is closed, the chunk is dropped.
    pub(crate) fn send(&mut self, chunk: P) -> P::Memory {
        let (rows, bytes) = (chunk.rows(), chunk.bytes());
        let gauge = &self.0.gauge;
        let mut queue = self.0.lock();
        if queue.receiver_gone {
            return P::Memory::default();
        }
        queue.rows += rows;
        queue.bytes += bytes;
        queue.chunks.push_back(chunk);
        gauge.set_level(queue.rows, queue.bytes);
        gauge.count_received(bytes);
        let emptied = std::mem::take(&mut queue.emptied);
        let consumer = self.0.record_arrival(&mut queue);
        drop(queue);
        wake(consumer);
        emptied
    }

    /// Sends how the source ended, which the consumer takes after the last chunk. Does nothing if an end was sent
    /// before or if the receiver is closed.
    pub(crate) fn finish(&mut self, end: Result<(), E>) {
        let ledger = self.0.ledger();
        let mut queue = self.0.lock();
        if queue.end.is_none() && !queue.receiver_gone {
            ledger.end_producer();
            queue.end = Some(end);
            let consumer = self.0.record_arrival(&mut queue);
            drop(queue);
            wake(consumer);
        }
    }

    /// Waits until the receiver is closed or the consumer has taken the end.
    pub(crate) fn poll_closed(&mut self, cx: &Context<'_>) -> Poll<()> {
        let mut queue = self.0.lock();
        if queue.receiver_gone {
            return Poll::Ready(());
        }
        register(&mut queue.producer, cx);
        Poll::Pending
    }
}

impl<P: Payload, E> Drop for Sender<P, E> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.sender_gone = true;
        self.0.ledger().end_producer();
        let consumer = if queue.end.is_none() { self.0.record_arrival(&mut queue) } else { None };
        drop(queue);
        wake(consumer);
    }
}
