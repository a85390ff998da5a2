//! The gauged channel: one producer, one consumer, bounded by rows and by payload bytes at once, and at
//! any moment able to tell who waits for whom.
//!
//! A lock is taken once a chunk. All that changes state - rows, bytes, who waits, the end - changes in this
//! file under that lock, together with the ledger of times; what observers read stands in atomics.

mod chunk;
mod clock;
mod format;
mod gauge;
mod ledger;
mod limits;
mod observer;
#[cfg(feature = "serde")]
mod serialize;
mod stats;
mod verdict;
mod watchdog;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

pub(crate) use self::chunk::{Chunk, Filling, Payload};
pub(crate) use self::clock::{Clock, Nanos};
pub(crate) use self::format::OneLine;
pub(crate) use self::gauge::Gauge;
pub(crate) use self::ledger::ConsumerState;
use self::ledger::{Ledger, ProducerState};
pub(crate) use self::limits::Limits;
pub use self::observer::Observer;
pub(crate) use self::observer::Progress;
pub use self::stats::{ProducerTime, Stats, StreamTime};
pub use self::verdict::{Shares, Verdict};
pub(crate) use self::watchdog::{Chore, Watchdog};
use crate::sync::lock;

/// Makes a channel whose consumer runs on the runtime of `watchdog`.
pub(crate) fn bounded<P: Payload, E>(
    limits: Limits,
    clock: Clock,
    watchdog: Arc<Watchdog>,
) -> (Sender<P, E>, Receiver<P, E>) {
    let gauge = Arc::new(Gauge::new(limits.rows, limits.bytes, Ledger::new(clock, watchdog)));
    let shared = Arc::new(Shared { limits, gauge, state: Mutex::new(State::new()) });
    (Sender(Arc::clone(&shared)), Receiver { shared, emptied: P::Memory::default() })
}

struct Shared<P: Payload, E> {
    limits: Limits,
    gauge: Arc<Gauge>,
    state: Mutex<State<P, E>>,
}

struct State<P: Payload, E> {
    chunks: VecDeque<P>,
    /// Memory on its way back, so that the two sides do not allocate and free each other's.
    emptied: P::Memory,
    rows: usize,
    bytes: usize,
    /// The last thing in the channel: how the source ended.
    end: Option<Result<(), E>>,
    sender_gone: bool,
    receiver_gone: bool,
    /// Of the producer, who waits for room or for the consumer's leaving.
    producer: Option<Waker>,
    /// Of the consumer, who waits for rows.
    consumer: Option<Waker>,
}

impl<P: Payload, E> State<P, E> {
    fn new() -> Self {
        Self {
            chunks: VecDeque::new(),
            emptied: P::Memory::default(),
            rows: 0,
            bytes: 0,
            end: None,
            sender_gone: false,
            receiver_gone: false,
            producer: None,
            consumer: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.end.is_none() && !self.sender_gone
    }
}

impl<P: Payload, E> Shared<P, E> {
    fn lock(&self) -> MutexGuard<'_, State<P, E>> {
        lock(&self.state)
    }

    /// Books that something came into the channel and finds whom to wake.
    fn arrived(&self, state: &mut State<P, E>) -> Option<Waker> {
        self.gauge.ledger.rows_arrived();
        state.consumer.take()
    }

    /// What is next, and the producer if that makes room for it.
    fn take(&self, state: &mut State<P, E>, emptied: &mut P::Memory) -> Option<(Taken<P, E>, Option<Waker>)> {
        let gauge = &self.gauge;
        let ledger = &gauge.ledger;
        let Some(chunk) = state.chunks.pop_front() else {
            let end = match state.end.take() {
                Some(end) => Taken::End(end),
                None if state.sender_gone => Taken::Lost,
                None => return None,
            };
            ledger.end_consumer();
            state.receiver_gone = true;
            return Some((end, state.producer.take()));
        };
        let occupancy = Occupancy { rows: state.rows, bytes: state.bytes };
        state.rows -= chunk.rows();
        state.bytes -= chunk.bytes();
        gauge.hold(state.rows, state.bytes);
        state.emptied = std::mem::take(emptied);
        let at = ledger.now();
        let came_late = ledger.take(busy(state), at);
        state.consumer = None;
        let mut producer = None;
        if ledger.producer_is(ProducerState::Room) {
            producer = state.producer.take();
            ledger.wake_producer(at);
        }
        Some((Taken::Chunk { chunk, occupancy, came_late, at }, producer))
    }
}

fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The consumer has gone; nothing more is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// What fits into the channel now. It only grows until the sender itself sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

/// The producer's end. Dropping it without `finish` tells the consumer that the producer was lost.
pub(crate) struct Sender<P: Payload, E>(Arc<Shared<P, E>>);

impl<P: Payload, E> Sender<P, E> {
    pub(crate) fn limits(&self) -> Limits {
        self.0.limits
    }

    /// Waits until a row of `bytes` fits. A row larger than the whole budget waits for an empty channel.
    pub(crate) fn poll_room(&mut self, cx: &Context<'_>, bytes: usize) -> Poll<Result<Room, Closed>> {
        let Limits { rows: row_limit, bytes: byte_limit, .. } = self.0.limits;
        let ledger = &self.0.gauge.ledger;
        let mut state = self.0.lock();
        ledger.producer_runs();
        if state.receiver_gone {
            return Poll::Ready(Err(Closed));
        }
        let room = Room { rows: row_limit - state.rows, bytes: byte_limit.saturating_sub(state.bytes) };
        let alone = state.chunks.is_empty();
        if alone || (room.rows > 0 && room.bytes >= bytes.max(1)) {
            if ledger.producer_is(ProducerState::Room) {
                ledger.enter_producer(ProducerState::Source, ledger.now());
            }
            return Poll::Ready(Ok(Room {
                bytes: if alone { room.bytes.max(bytes) } else { room.bytes },
                ..room
            }));
        }
        if ledger.producer_is(ProducerState::Source) {
            ledger.enter_producer(ProducerState::Room, ledger.now());
        }
        register(&mut state.producer, cx);
        Poll::Pending
    }

    /// The producer is about to move into a task, which the consumer's thread has to run.
    pub(crate) fn leave(&mut self) {
        let state = self.0.lock();
        let ledger = &self.0.gauge.ledger;
        ledger.wake_producer(ledger.now());
        drop(state);
    }

    /// Sends a chunk that fits the room seen before; gives memory for the next one.
    pub(crate) fn send(&mut self, chunk: P) -> P::Memory {
        let (rows, bytes) = (chunk.rows(), chunk.bytes());
        let gauge = &self.0.gauge;
        let mut state = self.0.lock();
        if state.receiver_gone {
            return P::Memory::default();
        }
        state.rows += rows;
        state.bytes += bytes;
        state.chunks.push_back(chunk);
        gauge.hold(state.rows, state.bytes);
        gauge.received(bytes);
        let emptied = std::mem::take(&mut state.emptied);
        let consumer = self.0.arrived(&mut state);
        drop(state);
        wake(consumer);
        emptied
    }

    /// Puts the end mark behind the last row. The producer's life ends with it.
    pub(crate) fn finish(&mut self, end: Result<(), E>) {
        let ledger = &self.0.gauge.ledger;
        let mut state = self.0.lock();
        if state.end.is_none() && !state.receiver_gone {
            ledger.end_producer();
            state.end = Some(end);
            let consumer = self.0.arrived(&mut state);
            drop(state);
            wake(consumer);
        }
    }

    /// Waits until the consumer has gone, or has taken the end.
    pub(crate) fn poll_closed(&mut self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.0.lock();
        if state.receiver_gone {
            return Poll::Ready(());
        }
        register(&mut state.producer, cx);
        Poll::Pending
    }
}

impl<P: Payload, E> Drop for Sender<P, E> {
    fn drop(&mut self) {
        let ledger = &self.0.gauge.ledger;
        let mut state = self.0.lock();
        state.sender_gone = true;
        ledger.end_producer();
        let consumer = if state.end.is_none() { self.0.arrived(&mut state) } else { None };
        drop(state);
        wake(consumer);
    }
}

/// What the consumer takes out.
#[derive(Debug)]
pub(crate) enum Taken<P, E> {
    /// A chunk, and what waited in the channel just before it was taken; `came_late` if the consumer let it wait
    /// although it had been woken.
    Chunk { chunk: P, occupancy: Occupancy, came_late: bool, at: Nanos },
    /// The source ended, well or with an error. Nothing follows.
    End(Result<(), E>),
    /// The producer vanished without an end mark. Nothing follows.
    Lost,
}

/// How full the channel was at a poll batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Occupancy {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

/// The consumer's end. Dropping it tells the producer to stop.
pub(crate) struct Receiver<P: Payload, E> {
    shared: Arc<Shared<P, E>>,
    /// Goes back with the next take.
    emptied: P::Memory,
}

impl<P: Payload, E> Receiver<P, E> {
    pub(crate) fn gauge(&self) -> &Arc<Gauge> {
        &self.shared.gauge
    }

    /// Gives back the memory of a chunk.
    pub(crate) fn give_back(&mut self, emptied: P::Memory) {
        self.emptied = emptied;
    }

    /// Takes what is next, or waits for it; the poll began at `polled`. Once the end was taken, it must not be called again.
    pub(crate) fn poll_take(&mut self, cx: &Context<'_>, polled: Nanos) -> Poll<Taken<P, E>> {
        let mut state = self.shared.lock();
        let Some((taken, producer)) = self.shared.take(&mut state, &mut self.emptied) else {
            self.shared.gauge.ledger.wait(polled);
            register(&mut state.consumer, cx);
            return Poll::Pending;
        };
        drop(state);
        wake(producer);
        Poll::Ready(taken)
    }

    /// Takes what is there. Looking is not waiting: an empty channel changes no state.
    pub(crate) fn try_take(&mut self) -> Option<Taken<P, E>> {
        let mut state = self.shared.lock();
        let (taken, producer) = self.shared.take(&mut state, &mut self.emptied)?;
        drop(state);
        wake(producer);
        Some(taken)
    }

    /// The time from here to the next take or `resume` is the caller's wish, nobody's slowness.
    pub(crate) fn pause(&mut self) {
        self.enter(|_| ConsumerState::Paused);
    }

    /// The caller waits for Postgres, though not for rows yet, from here to `resume`.
    pub(crate) fn wait_for_start(&mut self) {
        self.enter(|_| ConsumerState::SourceWait);
    }

    /// The caller goes on.
    pub(crate) fn resume(&mut self) {
        self.enter(busy);
    }

    fn enter(&self, next: impl FnOnce(&State<P, E>) -> ConsumerState) {
        let state = self.shared.lock();
        let ledger = &self.shared.gauge.ledger;
        ledger.enter_consumer(next(&state), ledger.now());
    }

    /// The caller yields although it could continue.
    pub(crate) fn yield_thread(&mut self) {
        let state = self.shared.lock();
        self.shared.gauge.ledger.yield_thread(state.is_empty());
    }

    /// Forgets whom to wake, for a caller that is about to look again.
    pub(crate) fn forget_waker(&mut self) {
        self.shared.lock().consumer = None;
    }

    /// Returns how the source ended, if rows need not be taken first to know it: a good end is one only when
    /// nothing lies before it.
    pub(crate) fn peek_end(&self) -> Option<Ended> {
        let state = self.shared.lock();
        match &state.end {
            Some(Ok(())) if state.chunks.is_empty() => Some(Ended::Complete),
            Some(Err(_)) => Some(Ended::Failed),
            _ => None,
        }
    }

    /// Lets the producer know that nothing more is wanted, and drops what waits. Both lives end here.
    pub(crate) fn close(&mut self) {
        let Gauge { ledger, .. } = &*self.shared.gauge;
        let mut state = self.shared.lock();
        state.receiver_gone = true;
        ledger.end_consumer();
        ledger.end_producer();
        let rows = std::mem::take(&mut state.chunks);
        (state.rows, state.bytes) = (0, 0);
        self.shared.gauge.hold(state.rows, state.bytes);
        let producer = state.producer.take();
        drop(state);
        drop(rows);
        wake(producer);
    }
}

/// How a source ended whose end was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Complete,
    Failed,
}

/// The consumer has rows in its hands: does anything wait behind them?
fn busy<P: Payload, E>(state: &State<P, E>) -> ConsumerState {
    if state.is_empty() { ConsumerState::Overlap } else { ConsumerState::Backlog }
}

impl<P: Payload, E> Drop for Receiver<P, E> {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
