//! `Shared`: what the two halves of a channel have in common.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Waker};

use super::chunk::Payload;
use super::gauge::Gauge;
use super::ledger::{ConsumerState, Ledger};
use super::limits::Limits;
use crate::sync::lock;

/// The channel itself, which both halves hold.
pub(super) struct Shared<P: Payload, E> {
    pub(super) limits: Limits,
    pub(super) gauge: Arc<Gauge>,
    queue: Mutex<Queue<P, E>>,
}

/// What waits in the channel, and who waits for it.
pub(super) struct Queue<P: Payload, E> {
    pub(super) chunks: VecDeque<P>,
    /// The memory of a chunk that was used up, on its way back to the producer. It spares each half from freeing
    /// memory that the other half allocated.
    pub(super) emptied: P::Memory,
    pub(super) rows: usize,
    pub(super) bytes: usize,
    /// How the source ended. Taken after the last chunk.
    pub(super) end: Option<Result<(), E>>,
    pub(super) sender_gone: bool,
    pub(super) receiver_gone: bool,
    /// Of the producer, which waits for room or for the receiver to close.
    pub(super) producer: Option<Waker>,
    /// Of the consumer, which waits for rows.
    pub(super) consumer: Option<Waker>,
}

impl<P: Payload, E> Shared<P, E> {
    pub(super) fn new(limits: Limits, gauge: Arc<Gauge>) -> Self {
        Self { limits, gauge, queue: Mutex::new(Queue::new()) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Queue<P, E>> {
        lock(&self.queue)
    }

    pub(super) fn ledger(&self) -> &Ledger {
        self.gauge.ledger()
    }

    /// Records that rows or the end arrived in the channel. Returns the waker of a waiting consumer.
    pub(super) fn record_arrival(&self, queue: &mut Queue<P, E>) -> Option<Waker> {
        self.ledger().record_arrival();
        queue.consumer.take()
    }
}

impl<P: Payload, E> Queue<P, E> {
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

    /// Returns whether there is nothing to take: neither rows nor an end.
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.end.is_none() && !self.sender_gone
    }

    /// Returns the state of a consumer that holds rows while this queue is as it is.
    pub(super) fn busy_consumer(&self) -> ConsumerState {
        if self.is_empty() { ConsumerState::Overlap } else { ConsumerState::Backlog }
    }
}

/// Stores the waker of the current task in `slot`.
pub(super) fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

/// Wakes a task, if there is one. Call after the lock is released.
pub(super) fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
