//! The gauged channel: one producer, one consumer, bounded by rows and by payload bytes at once, and at
//! any moment able to tell who waits for whom.
//!
//! A lock is taken once a chunk. All that changes state - rows, bytes, who waits, the end - changes in this
//! file under that lock, together with the ledger of times; what observers read stands in atomics.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::chunk::{Chunk, Filling};
use crate::config::Limits;
use crate::error::Error;
use crate::gauge::Gauge;
use crate::ledger::{Consumer, Ledger, Producer};
use crate::time::{Clock, Nanos};
use crate::watchdog::Watchdog;

/// Makes a channel whose consumer runs on the runtime of `watchdog`.
pub(crate) fn bounded(limits: Limits, clock: Clock, watchdog: Arc<Watchdog>) -> (Sender, Receiver) {
    let gauge = Arc::new(Gauge::new(limits.rows, limits.bytes, Ledger::new(clock, watchdog)));
    let shared = Arc::new(Shared { limits, gauge, state: Mutex::default() });
    (Sender(Arc::clone(&shared)), Receiver { shared, emptied: Filling::default() })
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    gauge: Arc<Gauge>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<Chunk>,
    /// Memory on its way back, so that the two sides do not allocate and free each other's.
    emptied: Filling,
    rows: usize,
    bytes: usize,
    /// The last thing in the channel: how the source ended.
    end: Option<Result<(), Error>>,
    sender_gone: bool,
    receiver_gone: bool,
    /// Of the producer, who waits for room or for the consumer's leaving.
    producer: Option<Waker>,
    /// Of the consumer, who waits for rows.
    consumer: Option<Waker>,
}

impl State {
    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.end.is_none() && !self.sender_gone
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the caller's runs under the lock; a poisoned one is as good as new.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Books that something came into the channel and finds whom to wake.
    fn arrived(&self, state: &mut State) -> Option<Waker> {
        self.gauge.ledger.rows_came();
        state.consumer.take()
    }

    /// What is next, and the producer if that makes room for it.
    fn take(&self, state: &mut State, emptied: &mut Filling) -> Option<(Taken, Option<Waker>)> {
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
        if ledger.producer_is(Producer::Room) {
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
#[derive(Debug)]
pub(crate) struct Sender(Arc<Shared>);

impl Sender {
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
            if ledger.producer_is(Producer::Room) {
                ledger.producer(Producer::Source, ledger.now());
            }
            return Poll::Ready(Ok(Room {
                bytes: if alone { room.bytes.max(bytes) } else { room.bytes },
                ..room
            }));
        }
        if ledger.producer_is(Producer::Source) {
            ledger.producer(Producer::Room, ledger.now());
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
    pub(crate) fn send(&mut self, chunk: Chunk) -> Filling {
        let (rows, bytes) = (chunk.rows(), chunk.bytes());
        let gauge = &self.0.gauge;
        let mut state = self.0.lock();
        if state.receiver_gone {
            return Filling::default();
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
    pub(crate) fn finish(&mut self, end: Result<(), Error>) {
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

impl Drop for Sender {
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
pub(crate) enum Taken {
    /// A chunk, and what waited in the channel just before it was taken; `came_late` if the consumer let it wait
    /// although it had been woken.
    Chunk { chunk: Chunk, occupancy: Occupancy, came_late: bool, at: Nanos },
    /// The source ended, well or with an error. Nothing follows.
    End(Result<(), Error>),
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
#[derive(Debug)]
pub(crate) struct Receiver {
    shared: Arc<Shared>,
    /// Goes back with the next take.
    emptied: Filling,
}

impl Receiver {
    pub(crate) fn gauge(&self) -> &Arc<Gauge> {
        &self.shared.gauge
    }

    /// Gives back the memory of a chunk.
    pub(crate) fn give_back(&mut self, emptied: Filling) {
        self.emptied = emptied;
    }

    /// Takes what is next, or waits for it; the poll began at `polled`. Once the end was taken, it must not be called again.
    pub(crate) fn poll_take(&mut self, cx: &Context<'_>, polled: Nanos) -> Poll<Taken> {
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
    pub(crate) fn try_take(&mut self) -> Option<Taken> {
        let mut state = self.shared.lock();
        let (taken, producer) = self.shared.take(&mut state, &mut self.emptied)?;
        drop(state);
        wake(producer);
        Some(taken)
    }

    /// The time from here to the next take or `resume` is the caller's wish, nobody's slowness.
    pub(crate) fn pause(&mut self) {
        self.enter(|_| Consumer::Paused);
    }

    /// The caller waits for Postgres, though not for rows yet, from here to `resume`.
    pub(crate) fn wait_for_start(&mut self) {
        self.enter(|_| Consumer::SourceWait);
    }

    /// The caller goes on.
    pub(crate) fn resume(&mut self) {
        self.enter(busy);
    }

    fn enter(&self, next: impl FnOnce(&State) -> Consumer) {
        let state = self.shared.lock();
        let ledger = &self.shared.gauge.ledger;
        ledger.consumer(next(&state), ledger.now());
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
            Some(Ok(())) if state.chunks.is_empty() => Some(Ended::Well),
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
    Well,
    Failed,
}

/// The consumer has rows in its hands: does anything wait behind them?
fn busy(state: &State) -> Consumer {
    if state.is_empty() { Consumer::Overlap } else { Consumer::Backlog }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use tokio_test::task::spawn;
    use tokio_test::{assert_pending, assert_ready, assert_ready_ok};

    use super::*;
    use crate::chunk;
    use crate::time::manual;

    const LIMITS: Limits = Limits { rows: 4, bytes: 100, chunk_rows: 2, chunk_bytes: 50 };

    fn channel() -> (Sender, Receiver) {
        bounded(LIMITS, Clock::start(), Arc::new(Watchdog::new(Clock::start(), false)))
    }

    fn rows(count: usize, bytes: usize) -> Chunk {
        chunk::of(&vec![vec![b'1'; bytes].as_slice(); count])
    }

    /// Takes what must be a chunk.
    fn take(receiver: &mut Receiver) -> (usize, Occupancy) {
        match receiver.try_take() {
            Some(Taken::Chunk { chunk, occupancy, .. }) => (chunk.rows(), occupancy),
            other => panic!("no chunk but {other:?}"),
        }
    }

    macro_rules! room {
        ($sender:expr, $bytes:expr) => {
            spawn(std::future::poll_fn(|cx| $sender.poll_room(cx, $bytes))).poll()
        };
    }

    #[test]
    fn rows_and_bytes_are_bounded_at_once() {
        let (mut sender, mut receiver) = channel();
        assert_eq!(assert_ready_ok!(room!(sender, 0)), Room { rows: 4, bytes: 100 });
        sender.send(rows(2, 10));
        assert_eq!(assert_ready_ok!(room!(sender, 80)), Room { rows: 2, bytes: 80 });
        assert_pending!(room!(sender, 81));
        sender.send(rows(2, 1));
        assert_pending!(room!(sender, 1), "four rows are in it");
        assert_eq!((receiver.gauge().rows(), receiver.gauge().bytes()), (4, 22));
        assert_eq!(take(&mut receiver), (2, Occupancy { rows: 4, bytes: 22 }));
        assert_eq!(assert_ready_ok!(room!(sender, 1)), Room { rows: 2, bytes: 98 });
    }

    #[test]
    fn a_row_larger_than_the_whole_budget_passes_alone() {
        let (mut sender, mut receiver) = channel();
        sender.send(rows(1, 1));
        assert_pending!(room!(sender, 1_000));
        take(&mut receiver);
        assert!(assert_ready_ok!(room!(sender, 1_000)).bytes >= 1_000);
        sender.send(rows(1, 1_000));
        assert_pending!(room!(sender, 1));
        assert_eq!(take(&mut receiver).0, 1);
        assert_eq!(receiver.gauge().peak_bytes(), 1_000);
    }

    // The first trap of channels bounded by bytes.
    #[test]
    fn waiting_for_room_ends_when_the_consumer_leaves() {
        let (mut sender, receiver) = channel();
        sender.send(rows(4, 1));
        let mut waiting = spawn(std::future::poll_fn(|cx| sender.poll_room(cx, 1)));
        assert_pending!(waiting.poll());
        drop(receiver);
        assert!(waiting.is_woken());
        assert_eq!(assert_ready!(waiting.poll()), Err(Closed));
    }

    // The second.
    #[test]
    fn a_chunk_that_was_taken_holds_no_room_while_the_consumer_waits_for_the_next() {
        let (mut sender, mut receiver) = channel();
        sender.send(rows(4, 25));
        let mut waiting = spawn(std::future::poll_fn(|cx| sender.poll_room(cx, 100)));
        assert_pending!(waiting.poll());
        let in_hand = receiver.try_take();
        let mut next = spawn(std::future::poll_fn(|cx| receiver.poll_take(cx, 0)));
        assert_pending!(next.poll());
        assert!(waiting.is_woken(), "both would wait for ever");
        assert_ready_ok!(waiting.poll());
        drop(in_hand);
    }

    // The third.
    #[test]
    fn a_producer_that_vanishes_is_not_an_end() {
        let (mut sender, mut receiver) = channel();
        sender.send(rows(1, 1));
        drop(sender);
        take(&mut receiver);
        assert!(matches!(receiver.try_take(), Some(Taken::Lost)));

        let (mut sender, mut receiver) = channel();
        sender.finish(Ok(()));
        drop(sender);
        assert!(matches!(receiver.try_take(), Some(Taken::End(Ok(())))));
    }

    #[test]
    fn rows_come_before_the_error_that_followed_them() {
        let (mut sender, mut receiver) = channel();
        sender.send(rows(2, 1));
        sender.finish(Err(Error::lost()));
        take(&mut receiver);
        assert!(matches!(receiver.try_take(), Some(Taken::End(Err(_)))));
    }

    #[test]
    fn a_waiting_consumer_is_woken_by_rows_and_by_the_end() {
        let (mut sender, mut receiver) = channel();
        let mut next = spawn(std::future::poll_fn(|cx| receiver.poll_take(cx, 0)));
        assert_pending!(next.poll());
        sender.send(rows(1, 1));
        assert!(next.is_woken());
        assert!(matches!(assert_ready!(next.poll()), Taken::Chunk { .. }));
        assert_pending!(next.poll());
        sender.finish(Ok(()));
        assert!(next.is_woken());
        assert!(matches!(assert_ready!(next.poll()), Taken::End(Ok(()))));
    }

    /// Runs `script` with a clock moved by hand and gives what the ledger holds then, in milliseconds.
    fn ledger(script: impl FnOnce(&dyn Fn(Nanos), &mut Sender, &mut Receiver)) -> ([Nanos; 5], [Nanos; 2]) {
        let (clock, hand) = manual();
        let watchdog = Arc::new(Watchdog::new(clock.clone(), false));
        let (mut sender, mut receiver) = bounded(LIMITS, clock, watchdog);
        let at = |ms: Nanos| hand.store(ms * 1_000_000, Ordering::Relaxed);
        script(&at, &mut sender, &mut receiver);
        let times = receiver.gauge().ledger.read();
        (times.consumer.map(|nanos| nanos / 1_000_000), times.producer.map(|nanos| nanos / 1_000_000))
    }

    fn poll_once(receiver: &mut Receiver) -> bool {
        let now = receiver.gauge().ledger.now();
        spawn(std::future::poll_fn(|cx| receiver.poll_take(cx, now))).poll().is_ready()
    }

    #[test]
    fn each_moment_belongs_to_one_state_of_each_half() {
        let (consumer, producer) = ledger(|at, sender, receiver| {
            at(1); // overlap: not polled yet
            assert!(!poll_once(receiver));
            at(4); // source wait
            sender.send(rows(2, 1));
            at(6); // backlog: woken, and busy elsewhere
            assert!(poll_once(receiver));
            at(11); // overlap: rows in hand, channel empty
            sender.send(rows(4, 1));
            assert_pending!(room!(sender, 1));
            at(21); // backlog, and the producer waits for room
            assert!(poll_once(receiver));
            assert_ready_ok!(room!(sender, 1));
            at(22); // overlap
            sender.finish(Ok(()));
            at(30); // backlog: the end mark waits
        });
        assert_eq!(consumer, [3, 0, 1 + 5 + 1, 2 + 10 + 8, 0]);
        assert_eq!(producer, [11 + 1, 10]);
    }

    #[test]
    fn looking_is_not_waiting() {
        let (consumer, _) = ledger(|at, sender, receiver| {
            assert!(receiver.try_take().is_none());
            at(10);
            sender.send(rows(1, 1));
            at(15);
        });
        assert_eq!(consumer, [0, 0, 10, 5, 0]);
    }

    #[test]
    fn a_pause_is_nobodys_time() {
        let (consumer, _) = ledger(|at, sender, receiver| {
            receiver.pause();
            at(10);
            sender.send(rows(1, 1));
            at(20);
            receiver.resume();
            at(23);
        });
        assert_eq!(consumer, [0, 0, 0, 3, 20]);
    }

    #[test]
    fn times_stand_still_once_the_end_is_taken_or_the_consumer_leaves() {
        let (consumer, producer) = ledger(|at, sender, receiver| {
            at(5);
            sender.finish(Ok(()));
            at(7);
            assert!(poll_once(receiver));
            at(50);
        });
        assert_eq!((consumer, producer), ([0, 0, 5, 2, 0], [5, 0]));
        let (consumer, producer) = ledger(|at, _, receiver| {
            at(5);
            receiver.close();
            at(50);
        });
        assert_eq!((consumer, producer), ([0, 0, 5, 0, 0], [5, 0]));
    }
}
