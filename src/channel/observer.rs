//! `Observer`: reads the statistics of a stream from outside of it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::gauge::Gauge;
use super::ledger::{ConsumerState, ProducerState};
use super::stats::{ProducerTime, Stats, StreamTime};
use super::verdict::Shares;

/// Counts of rows by what became of them. Written by the stream alone; read by every observer.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) yielded: AtomicU64,
    pub(crate) filtered: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// When rows were last seen to be taken or returned, in nanoseconds since the stream was started. Not updated for
    /// every row.
    pub(crate) last_row: AtomicU64,
}

impl Progress {
    /// Adds one, without the cost of an atomic addition: the stream is the only writer.
    pub(crate) fn count(counter: &AtomicU64) {
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// A handle that reads the statistics of a stream from another place: a task, a status page, a health check.
///
/// It is cheap to clone and does not keep the stream alive. After the stream has ended or has been dropped, the observer
/// keeps returning the final statistics.
///
/// # Examples
///
/// ```no_run
/// # async fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let observer = stream.observer();
/// tokio::spawn(async move {
///     while !observer.is_ended() {
///         println!("{}", observer.stats());
///         tokio::time::sleep(std::time::Duration::from_secs(1)).await;
///     }
/// });
/// # }
/// ```
#[derive(Clone)]
pub struct Observer {
    pub(crate) entity: Arc<str>,
    pub(crate) gauge: Arc<Gauge>,
    pub(crate) progress: Arc<Progress>,
}

impl Observer {
    /// Returns the stream's statistics at this moment. It neither waits for the stream nor slows it down.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(observer: fraiseql_stream::Observer) {
    /// let stats = observer.stats();
    /// println!("{} of {} rows wait in the channel", stats.buffered_rows, stats.row_limit);
    /// # }
    /// ```
    pub fn stats(&self) -> Stats {
        let gauge = &self.gauge;
        let times = gauge.times();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            entity: Arc::clone(&self.entity),
            elapsed: Duration::from_nanos(times.at),
            rows: count(&self.progress.yielded),
            filtered: count(&self.progress.filtered),
            failed: count(&self.progress.failed),
            bytes: gauge.received_bytes(),
            buffered_rows: gauge.rows(),
            buffered_bytes: gauge.bytes(),
            peak_bytes: gauge.peak_bytes(),
            row_limit: gauge.row_limit,
            byte_limit: gauge.byte_limit,
            time: StreamTime::of(&times),
            producer_time: ProducerTime {
                source: Duration::from_nanos(times.producer[ProducerState::Source as usize]),
                room: Duration::from_nanos(times.producer[ProducerState::Room as usize]),
            },
            backlog: Duration::from_nanos(times.of(ConsumerState::Backlog)),
            shares: Shares::of(&times),
            recent: Shares::of(&gauge.recent_times(&times)),
        }
    }

    /// Returns whether the stream has ended: it returned `None` or the error that ended it, or it was dropped.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
    /// let observer = stream.observer();
    /// assert!(!observer.is_ended());
    /// drop(stream);
    /// assert!(observer.is_ended());
    /// # }
    /// ```
    pub fn is_ended(&self) -> bool {
        self.gauge.is_ended()
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").field("stats", &self.stats()).finish()
    }
}

#[cfg(test)]
impl Observer {
    /// Returns the observer of a stream whose clock shows the value of the returned atomic.
    pub(crate) fn manual(entity: &str) -> (Self, Arc<AtomicU64>) {
        use super::{clock, ledger::Ledger, watchdog::Watchdog};

        let (clock, now) = clock::manual();
        let watchdog = Arc::new(Watchdog::new(clock.clone(), false));
        let gauge = Arc::new(Gauge::new(256, 1 << 20, Ledger::new(clock, watchdog)));
        (Self { entity: entity.into(), gauge, progress: Arc::default() }, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_are_one_line_even_if_the_entity_has_a_line_break() {
        let (observer, _) = Observer::manual("a\nb");
        assert!(observer.stats().to_string().starts_with("a\\nb: 0 rows"), "{}", observer.stats());
    }
}
