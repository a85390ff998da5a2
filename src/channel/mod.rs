//! The gauged channel: one producer, one consumer, bounded by rows and by payload bytes at once. At any moment it can
//! report which of the two waits for the other.
//!
//! The lock is taken once per chunk. Everything that changes state (rows, bytes, wakers, the end) changes in `sender`
//! and `receiver` under that lock, together with the ledger of times. What observers read is kept in atomics.

mod chunk;
mod clock;
mod format;
mod gauge;
mod ledger;
mod limits;
mod observer;
mod receiver;
mod sender;
#[cfg(feature = "serde")]
mod serialize;
mod shared;
mod stats;
mod verdict;
mod watchdog;

use std::sync::Arc;

pub(crate) use self::chunk::{Chunk, Filling, Payload};
pub(crate) use self::clock::{Clock, Nanos};
pub(crate) use self::format::OneLine;
pub(crate) use self::gauge::Gauge;
pub(crate) use self::ledger::ConsumerState;
use self::ledger::Ledger;
pub(crate) use self::limits::Limits;
pub use self::observer::Observer;
pub(crate) use self::observer::Progress;
pub(crate) use self::receiver::{Ended, Occupancy, Receiver, Taken};
pub(crate) use self::sender::{Closed, Room, Sender};
use self::shared::Shared;
pub use self::stats::{ProducerTime, Stats, StreamTime};
pub use self::verdict::{Shares, Verdict};
pub(crate) use self::watchdog::{Chore, Watchdog};

/// Creates a channel whose consumer runs on the runtime of `watchdog`.
pub(crate) fn bounded<P: Payload, E>(
    limits: Limits,
    clock: Clock,
    watchdog: Arc<Watchdog>,
) -> (Sender<P, E>, Receiver<P, E>) {
    let gauge = Arc::new(Gauge::new(limits.rows, limits.bytes, Ledger::new(clock, watchdog)));
    let shared = Arc::new(Shared::new(limits, gauge));
    (Sender::new(Arc::clone(&shared)), Receiver::new(shared))
}

#[cfg(test)]
mod tests;
