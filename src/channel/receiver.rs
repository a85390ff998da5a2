//! `Receiver`: the consumer's half of the channel.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::chunk::Payload;
use super::clock::Nanos;
use super::gauge::Gauge;
use super::ledger::{ConsumerState, ProducerState};
use super::shared::{Queue, Shared, register, wake};

/// What the consumer takes from the channel.
#[derive(Debug)]
pub(crate) enum Taken<P, E> {
    /// A chunk.
    Chunk {
        chunk: P,
        /// What waited in the channel just before the chunk was taken.
        occupancy: Occupancy,
        /// Whether the consumer was woken for the chunk and did not take it at once.
        came_late: bool,
        at: Nanos,
    },
    /// The source ended, with or without an error. Nothing follows.
    End(Result<(), E>),
    /// The sender was dropped without an end. Nothing follows.
    Lost,
}

/// How full the channel was at a poll batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Occupancy {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

/// How a source ended whose end is still in the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Complete,
    Failed,
}

/// The consumer's half. Dropping it closes the channel.
pub(crate) struct Receiver<P: Payload, E> {
    shared: Arc<Shared<P, E>>,
    /// Returned to the producer with the next take.
    emptied: P::Memory,
}

impl<P: Payload, E> Receiver<P, E> {
    pub(super) fn new(shared: Arc<Shared<P, E>>) -> Self {
        Self { shared, emptied: P::Memory::default() }
    }

    pub(crate) fn gauge(&self) -> &Arc<Gauge> {
        &self.shared.gauge
    }

    /// Gives the memory of a chunk that was used up back to the producer.
    pub(crate) fn give_back(&mut self, emptied: P::Memory) {
        self.emptied = emptied;
    }

    /// Takes the next chunk or the end, or waits for it. `polled` is the time at which the poll began. Must not be
    /// called again once the end was taken.
    pub(crate) fn poll_take(&mut self, cx: &Context<'_>, polled: Nanos) -> Poll<Taken<P, E>> {
        let mut queue = self.shared.lock();
        let Some((taken, producer)) = self.shared.take(&mut queue, &mut self.emptied) else {
            self.shared.ledger().record_empty_poll(polled);
            register(&mut queue.consumer, cx);
            return Poll::Pending;
        };
        drop(queue);
        wake(producer);
        Poll::Ready(taken)
    }

    /// Takes the next chunk or the end if it has arrived. If not, the consumer does not count as waiting.
    pub(crate) fn try_take(&mut self) -> Option<Taken<P, E>> {
        let mut queue = self.shared.lock();
        let (taken, producer) = self.shared.take(&mut queue, &mut self.emptied)?;
        drop(queue);
        wake(producer);
        Some(taken)
    }

    /// Excludes the time until the next take or [`resume`](Self::resume) from the verdict.
    pub(crate) fn pause(&mut self) {
        self.enter(|_| ConsumerState::Paused);
    }

    /// Counts the time until [`resume`](Self::resume) as source wait: the caller waits for Postgres, though not for
    /// rows yet.
    pub(crate) fn wait_for_start(&mut self) {
        self.enter(|_| ConsumerState::SourceWait);
    }

    /// Ends [`pause`](Self::pause) and [`wait_for_start`](Self::wait_for_start): the consumer is busy again.
    pub(crate) fn resume(&mut self) {
        self.enter(Queue::busy_consumer);
    }

    fn enter(&self, next: impl FnOnce(&Queue<P, E>) -> ConsumerState) {
        let queue = self.shared.lock();
        let ledger = self.shared.ledger();
        ledger.enter_consumer(next(&queue), ledger.now());
    }

    /// Records that the caller yields the thread although it could continue.
    pub(crate) fn yield_thread(&mut self) {
        let queue = self.shared.lock();
        self.shared.ledger().record_yield(queue.is_empty());
    }

    /// Drops the waker of the last poll, for a caller that is about to poll again.
    pub(crate) fn forget_waker(&mut self) {
        self.shared.lock().consumer = None;
    }

    /// Returns how the source ended, without taking the end. A failure is returned even if rows precede it; a
    /// complete end only if nothing precedes it.
    pub(crate) fn peek_end(&self) -> Option<Ended> {
        let queue = self.shared.lock();
        match &queue.end {
            Some(Ok(())) if queue.chunks.is_empty() => Some(Ended::Complete),
            Some(Err(_)) => Some(Ended::Failed),
            _ => None,
        }
    }

    /// Closes the channel: drops what waits in it and wakes the producer, which receives `Closed`. The times of both
    /// halves end here.
    pub(crate) fn close(&mut self) {
        let ledger = self.shared.ledger();
        let mut queue = self.shared.lock();
        queue.receiver_gone = true;
        ledger.end_consumer();
        ledger.end_producer();
        let chunks = std::mem::take(&mut queue.chunks);
        (queue.rows, queue.bytes) = (0, 0);
        self.shared.gauge.set_level(0, 0);
        let producer = queue.producer.take();
        drop(queue);
        drop(chunks);
        wake(producer);
    }
}

impl<P: Payload, E> Drop for Receiver<P, E> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<P: Payload, E> Shared<P, E> {
    /// Takes the next chunk or the end, together with the waker of a producer that waits for it. Leaves `emptied` for
    /// the producer.
    fn take(&self, queue: &mut Queue<P, E>, emptied: &mut P::Memory) -> Option<(Taken<P, E>, Option<Waker>)> {
        let ledger = self.ledger();
        let Some(chunk) = queue.chunks.pop_front() else {
            let end = match queue.end.take() {
                Some(end) => Taken::End(end),
                None if queue.sender_gone => Taken::Lost,
                None => return None,
            };
            ledger.end_consumer();
            queue.receiver_gone = true;
            return Some((end, queue.producer.take()));
        };
        let occupancy = Occupancy { rows: queue.rows, bytes: queue.bytes };
        queue.rows -= chunk.rows();
        queue.bytes -= chunk.bytes();
        self.gauge.set_level(queue.rows, queue.bytes);
        queue.emptied = std::mem::take(emptied);
        let at = ledger.now();
        let came_late = ledger.record_take(queue.busy_consumer(), at);
        queue.consumer = None;
        let mut producer = None;
        if ledger.producer_is(ProducerState::Room) {
            producer = queue.producer.take();
            ledger.record_producer_wake(at);
        }
        Some((Taken::Chunk { chunk, occupancy, came_late, at }, producer))
    }
}
