//! The states of a channel's two halves, and `Times`: how long each half was in each of them.

use crate::channel::clock::Nanos;

/// What the consumer does. It is busy in `Overlap` and `Backlog`: the user's code or the decoder holds rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConsumerState {
    /// Waits for rows while the channel is empty.
    SourceWait = 0,
    /// Is ready to run, but the runtime is late to run it.
    Scheduled = 1,
    /// Is busy while the channel is empty.
    Overlap = 2,
    /// Is busy while rows or the end wait in the channel.
    Backlog = 3,
    /// Does not want rows.
    Paused = 4,
    /// Waited for rows that have arrived, and has not taken them yet. This state has no sum of its own: its time is
    /// attributed to the runtime (`Scheduled`) and to the consumer (`Backlog`).
    Woken = 5,
}

/// What the producer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProducerState {
    /// Waits for the source or reads from it.
    Source = 0,
    /// Waits for room in the channel.
    Room = 1,
}

/// The number of consumer states with a sum.
pub(crate) const CONSUMER_STATES: usize = 5;
/// The number of producer states.
pub(crate) const PRODUCER_STATES: usize = 2;

/// The sums of both halves at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    /// The lifetime of the consumer's half.
    pub(crate) at: Nanos,
    pub(crate) consumer: [Nanos; CONSUMER_STATES],
    pub(crate) producer: [Nanos; PRODUCER_STATES],
    /// The part of `Overlap` and `Backlog` that was spent decoding.
    pub(crate) decode: Nanos,
}

impl Times {
    /// Returns the consumer's time in `state`, which must not be `Woken`.
    pub(crate) fn of(&self, state: ConsumerState) -> Nanos {
        self.consumer[state as usize]
    }
}
