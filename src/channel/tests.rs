use std::sync::atomic::Ordering;

use tokio_test::task::spawn;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok};

use super::clock::manual;
use super::*;

const LIMITS: Limits = Limits { rows: 4, bytes: 100, chunk_rows: 2, chunk_bytes: 50 };

fn channel() -> (Sender<Chunk, ()>, Receiver<Chunk, ()>) {
    bounded(LIMITS, Clock::start(), Arc::new(Watchdog::new(Clock::start(), false)))
}

fn rows(count: usize, bytes: usize) -> Chunk {
    Chunk::of(&vec![vec![b'1'; bytes].as_slice(); count])
}

/// Takes a chunk. Returns its number of rows and what waited in the channel before.
fn take(receiver: &mut Receiver<Chunk, ()>) -> (usize, Occupancy) {
    match receiver.try_take() {
        Some(Taken::Chunk { chunk, occupancy, .. }) => (chunk.rows(), occupancy),
        other => panic!("expected a chunk, got {other:?}"),
    }
}

macro_rules! room {
    ($sender:expr, $bytes:expr) => {
        spawn(std::future::poll_fn(|cx| $sender.poll_room(cx, $bytes))).poll()
    };
}

#[test]
fn rows_and_bytes_are_both_bounded() {
    let (mut sender, mut receiver) = channel();
    assert_eq!(assert_ready_ok!(room!(sender, 0)), Room { rows: 4, bytes: 100 });
    sender.send(rows(2, 10));
    assert_eq!(assert_ready_ok!(room!(sender, 80)), Room { rows: 2, bytes: 80 });
    assert_pending!(room!(sender, 81));
    sender.send(rows(2, 1));
    assert_pending!(room!(sender, 1), "the channel holds four rows");
    assert_eq!((receiver.gauge().rows(), receiver.gauge().bytes()), (4, 22));
    assert_eq!(take(&mut receiver), (2, Occupancy { rows: 4, bytes: 22 }));
    assert_eq!(assert_ready_ok!(room!(sender, 1)), Room { rows: 2, bytes: 98 });
}

#[test]
fn a_row_larger_than_the_byte_limit_passes_alone() {
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

#[test]
fn waiting_for_room_ends_when_the_receiver_is_dropped() {
    let (mut sender, receiver) = channel();
    sender.send(rows(4, 1));
    let mut waiting = spawn(std::future::poll_fn(|cx| sender.poll_room(cx, 1)));
    assert_pending!(waiting.poll());
    drop(receiver);
    assert!(waiting.is_woken());
    assert_eq!(assert_ready!(waiting.poll()), Err(Closed));
}

#[test]
fn a_chunk_that_was_taken_occupies_no_room_while_the_consumer_waits_for_the_next() {
    let (mut sender, mut receiver) = channel();
    sender.send(rows(4, 25));
    let mut waiting = spawn(std::future::poll_fn(|cx| sender.poll_room(cx, 100)));
    assert_pending!(waiting.poll());
    let held = receiver.try_take();
    let mut next = spawn(std::future::poll_fn(|cx| receiver.poll_take(cx, 0)));
    assert_pending!(next.poll());
    assert!(waiting.is_woken(), "otherwise both halves would wait forever");
    assert_ready_ok!(waiting.poll());
    drop(held);
}

#[test]
fn a_sender_dropped_without_an_end_is_reported_as_lost() {
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
fn rows_are_taken_before_the_error_that_followed_them() {
    let (mut sender, mut receiver) = channel();
    sender.send(rows(2, 1));
    sender.finish(Err(()));
    take(&mut receiver);
    assert!(matches!(receiver.try_take(), Some(Taken::End(Err(())))));
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

/// Runs `script`, which sets the clock in milliseconds. Returns the times of the consumer and of the producer then, in
/// milliseconds.
fn times_after(
    script: impl FnOnce(&dyn Fn(Nanos), &mut Sender<Chunk, ()>, &mut Receiver<Chunk, ()>),
) -> ([Nanos; 5], [Nanos; 2]) {
    let (clock, now) = manual();
    let watchdog = Arc::new(Watchdog::new(clock.clone(), false));
    let (mut sender, mut receiver) = bounded(LIMITS, clock, watchdog);
    let at = |ms: Nanos| now.store(ms * 1_000_000, Ordering::Relaxed);
    script(&at, &mut sender, &mut receiver);
    let times = receiver.gauge().ledger().read();
    (times.consumer.map(|nanos| nanos / 1_000_000), times.producer.map(|nanos| nanos / 1_000_000))
}

/// Polls the receiver once. Returns whether it was ready.
fn poll_once(receiver: &mut Receiver<Chunk, ()>) -> bool {
    let now = receiver.gauge().ledger().now();
    spawn(std::future::poll_fn(|cx| receiver.poll_take(cx, now))).poll().is_ready()
}

#[test]
fn each_moment_belongs_to_one_state_of_each_half() {
    // Each comment names the consumer's state up to that time.
    let (consumer, producer) = times_after(|at, sender, receiver| {
        at(1); // overlap: not polled yet
        assert!(!poll_once(receiver));
        at(4); // source wait
        sender.send(rows(2, 1));
        at(6); // backlog: woken, and busy elsewhere
        assert!(poll_once(receiver));
        at(11); // overlap: holds rows, and the channel is empty
        sender.send(rows(4, 1));
        assert_pending!(room!(sender, 1));
        at(21); // backlog, while the producer waits for room
        assert!(poll_once(receiver));
        assert_ready_ok!(room!(sender, 1));
        at(22); // overlap
        sender.finish(Ok(()));
        at(30); // backlog: the end waits
    });
    assert_eq!(consumer, [3, 0, 1 + 5 + 1, 2 + 10 + 8, 0]);
    assert_eq!(producer, [11 + 1, 10]);
}

#[test]
fn try_take_of_an_empty_channel_does_not_count_as_waiting() {
    let (consumer, _) = times_after(|at, sender, receiver| {
        assert!(receiver.try_take().is_none());
        at(10);
        sender.send(rows(1, 1));
        at(15);
    });
    assert_eq!(consumer, [0, 0, 10, 5, 0]);
}

#[test]
fn a_pause_is_attributed_to_neither_side() {
    let (consumer, _) = times_after(|at, sender, receiver| {
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
fn times_are_constant_once_the_end_is_taken_or_the_receiver_is_closed() {
    let (consumer, producer) = times_after(|at, sender, receiver| {
        at(5);
        sender.finish(Ok(()));
        at(7);
        assert!(poll_once(receiver));
        at(50);
    });
    assert_eq!((consumer, producer), ([0, 0, 5, 2, 0], [5, 0]));
    let (consumer, producer) = times_after(|at, _, receiver| {
        at(5);
        receiver.close();
        at(50);
    });
    assert_eq!((consumer, producer), ([0, 0, 5, 0, 0], [5, 0]));
}
