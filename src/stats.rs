//! What a stream tells of itself, and the one rule that turns times into a verdict.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::OneLine;
use crate::gauge::Gauge;
use crate::ledger::{Consumer, Producer, Times};
use crate::time::Nanos;

/// Which side sets the pace of a stream.
///
/// It names a side, not a fault: a stream that runs as fast as your disk writes is `ConsumerBound`, and healthy.
/// The [`Shares`] say how much it matters: a share of up to 10 % can be ignored, up to 50 % costs something, and
/// above 50 % that side decides how fast the stream is.
///
/// # How it is found
///
/// Every moment of a stream's life, pauses excepted, counts towards one of four shares:
///
/// | share | your code | the channel | if it dominates |
/// |---|---|---|---|
/// | backlog | is busy | holds rows, or the end of the stream | [`ConsumerBound`](Self::ConsumerBound) |
/// | source wait | waits for a row | is empty | [`SourceBound`](Self::SourceBound) |
/// | scheduled | is ready to run, but the async runtime is late to run it | | [`RuntimeBound`](Self::RuntimeBound) |
/// | overlap | is busy | is empty: nobody waits | |
///
/// One of the first three dominates if it is above 10 % and at least twice as large as the next. If none
/// dominates, the verdict is [`Mixed`](Self::Mixed) if the three add up to more than 50 %, and
/// [`Balanced`](Self::Balanced) otherwise.
///
/// When rows arrive, the task that waits for them is woken. If it takes them within 0.5 ms, that still counts as
/// waiting for the source. If it takes longer, one of two things happened:
///
/// - **The runtime was late.** This takes evidence: a task that does nothing but check the runtime ran late as
///   well. Only the delay that the evidence covers counts as scheduled. A late runtime cannot read rows from the
///   socket either, so the end of a wait for rows counts as scheduled as far as the runtime was late.
/// - **Your task was busy with something else**: another branch of a `select!`, another future of a `join!`, the
///   previous batch. All delay without evidence against the runtime counts as backlog.
///
/// The 0.5 ms also decide what the histogram `fraiseql_channel_occupancy_rows` records for a poll that had to wait:
/// 0 if the first rows were taken within that time, or else everything that was in the channel when they were taken.
///
/// # What it cannot know
///
/// - **Who blocks a current-thread runtime.** Code that blocks the only thread delays every task. Whether the
///   stream's own task or another one blocks it is found out from the order in which tasks run. The first two
///   delays in doubt count as the runtime's. The order proves nothing if something other than rows also wakes the
///   stream's task, such as a timer in a `select!` or a second stream: `ConsumerBound` and `RuntimeBound` may be
///   confused then. The future that is passed to `block_on` (the `main` of a current-thread runtime) has no place in
///   that order: delays in doubt count as the runtime's. A multi-thread runtime with one worker is treated as if it had several.
/// - **What your code awaits while it holds rows.** That time is your code's, even if a late runtime delays what
///   it awaits.
/// - **Isolated delays of the runtime.** The runtime is checked every 250 ms, every 10 ms while streams have waits
///   of 2 ms or more, and every 2 ms while it is suspected to be late. A delay between two checks may go unnoticed:
///   it counts as backlog if rows had arrived, and as source wait otherwise.
/// - **What is behind the socket.** A slow network looks like a slow database.
///
/// # Examples
///
/// ```
/// use fraiseql_stream::Verdict;
/// assert_eq!(Verdict::ConsumerBound.as_str(), "consumer_bound");
/// assert_eq!(Verdict::ConsumerBound.to_string(), "consumer-bound");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// Rows wait for your code: the consumer lags.
    ConsumerBound,
    /// Your code waits for rows: Postgres or the network is slow.
    SourceBound,
    /// Your code is ready and the async runtime is late to run it: something blocks its threads, or there is more
    /// work than they can do.
    RuntimeBound,
    /// Somebody waits for more than half of the time, and no side dominates; the shares say who.
    ///
    /// ```
    /// use fraiseql_stream::{Shares, Verdict};
    ///
    /// let mut shares = Shares::default();
    /// (shares.scheduled, shares.source_wait, shares.overlap) = (0.5, 0.4, 0.1);
    /// assert_eq!(shares.verdict(), Verdict::Mixed);
    /// ```
    Mixed,
    /// No side dominates, and nobody waits for more than half of the time.
    Balanced,
}

impl Verdict {
    /// Returns the name used in metrics, spans and JSON: `consumer_bound`, `source_bound`, `runtime_bound`, `mixed`
    /// or `balanced`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConsumerBound => "consumer_bound",
            Self::SourceBound => "source_bound",
            Self::RuntimeBound => "runtime_bound",
            Self::Mixed => "mixed",
            Self::Balanced => "balanced",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::ConsumerBound => ": Postgres waited for your code, not the other way round",
            Self::SourceBound => ": your code waited for Postgres",
            Self::RuntimeBound => ": your code was ready, but the async runtime was late to run it",
            Self::Mixed | Self::Balanced => "",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConsumerBound => "consumer-bound",
            Self::SourceBound => "source-bound",
            Self::RuntimeBound => "runtime-bound",
            Self::Mixed => "mixed",
            Self::Balanced => "balanced",
        })
    }
}

/// Shares of a stream's time, 0 to 1, by who waited for whom. They add up to 1; time in
/// [`pause`](crate::JsonStream::pause) does not count.
///
/// ```
/// use fraiseql_stream::{Shares, Verdict};
///
/// let mut shares = Shares::default();
/// (shares.backlog, shares.source_wait, shares.overlap) = (0.8, 0.1, 0.1);
/// assert_eq!(shares.verdict(), Verdict::ConsumerBound);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Shares {
    /// The consumer was busy while more rows, or the end, waited in the channel.
    pub backlog: f64,
    /// The consumer waited and the channel was empty.
    pub source_wait: f64,
    /// The consumer was ready to run, but the async runtime was late to run it.
    pub scheduled: f64,
    /// The consumer was busy and the channel was empty: nobody waited.
    pub overlap: f64,
}

impl Shares {
    fn of(times: &Times) -> Self {
        let part = |state| times.of(state) as f64;
        let [backlog, source_wait, scheduled, overlap] = [
            part(Consumer::Backlog),
            part(Consumer::SourceWait),
            part(Consumer::Scheduled),
            part(Consumer::Overlap),
        ];
        let whole = backlog + source_wait + scheduled + overlap;
        if whole == 0.0 {
            return Self::default();
        }
        Self {
            backlog: backlog / whole,
            source_wait: source_wait / whole,
            scheduled: scheduled / whole,
            overlap: overlap / whole,
        }
    }

    /// Returns the verdict on these shares, by the rule described at [`Verdict`]. Without any time, as in
    /// `Shares::default()`, it is `Balanced`.
    pub fn verdict(&self) -> Verdict {
        let [(side, largest), (_, next), (_, least)] = self.sides();
        if largest > 0.1 && largest >= 2.0 * next {
            side.verdict()
        } else if largest + next + least > 0.5 {
            Verdict::Mixed
        } else {
            Verdict::Balanced
        }
    }

    /// Returns the share that the verdict is based on: that of the side it names, the sum of the three waits for
    /// `Mixed`, and `overlap` for `Balanced`.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::{Shares, Verdict};
    ///
    /// let mut shares = Shares::default();
    /// (shares.backlog, shares.source_wait, shares.overlap) = (0.8, 0.1, 0.1);
    /// assert_eq!(shares.verdict(), Verdict::ConsumerBound);
    /// assert_eq!(shares.of_verdict(), 0.8);
    /// ```
    pub fn of_verdict(&self) -> f64 {
        match self.verdict() {
            Verdict::ConsumerBound => self.backlog,
            Verdict::SourceBound => self.source_wait,
            Verdict::RuntimeBound => self.scheduled,
            Verdict::Mixed => self.backlog + self.source_wait + self.scheduled,
            Verdict::Balanced => self.overlap,
        }
    }

    /// The sides that can set the pace, by their shares in descending order.
    fn sides(&self) -> [(Side, f64); 3] {
        let mut sides = [
            (Side::Consumer, self.backlog),
            (Side::Source, self.source_wait),
            (Side::Runtime, self.scheduled),
        ];
        sides.sort_by(|a, b| b.1.total_cmp(&a.1));
        sides
    }

    /// The verdict with its share, as in `source-bound 61 %` or `mixed: runtime 61 %, source 38 %`.
    fn summary(&self) -> String {
        let verdict = self.verdict();
        if verdict != Verdict::Mixed {
            return format!("{verdict} {}", Percent(self.of_verdict()));
        }
        let sides = self
            .sides()
            .map(|(side, share)| (share > 0.1).then(|| format!("{} {}", side.as_str(), Percent(share))));
        format!("{verdict}: {}", sides.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

#[derive(Clone, Copy)]
enum Side {
    Consumer,
    Source,
    Runtime,
}

impl Side {
    fn verdict(self) -> Verdict {
        match self {
            Self::Consumer => Verdict::ConsumerBound,
            Self::Source => Verdict::SourceBound,
            Self::Runtime => Verdict::RuntimeBound,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Consumer => "consumer",
            Self::Source => "source",
            Self::Runtime => "runtime",
        }
    }
}

/// The consumer's half of a stream's life, cut into states that add up to [`Stats::elapsed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamTime {
    /// Polled, and nothing was there.
    pub source_wait: Duration,
    /// Your code was ready to run, but the async runtime was late to run it.
    pub scheduled: Duration,
    /// Turning JSON into `T`. Sampled; what it gains here it loses in `consumer`.
    pub decode: Duration,
    /// Your code held the rows.
    pub consumer: Duration,
    /// Between [`pause`](crate::JsonStream::pause) and the next poll.
    pub paused: Duration,
}

/// The producer's half, cut into states that add up to the time from the query's start to its last row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProducerTime {
    /// Waiting for Postgres or reading from it.
    pub source: Duration,
    /// Waiting for room in the channel: so long was Postgres held back.
    pub room: Duration,
}

/// A stream's statistics at one moment. Taking them neither waits nor disturbs the stream.
///
/// ```no_run
/// # async fn example(stream: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let stats = stream.stats();
/// println!("{stats}"); // orders: 214,332 rows, 61.0 MB in 12.4 s; consumer-bound 81 % (...)
/// println!("{} rows wait, {:?}", stats.buffered_rows, stats.verdict());
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// The relation, as it was given to `query`.
    pub entity: Arc<str>,
    /// The stream's life so far; it stands still once the stream has ended.
    pub elapsed: Duration,
    /// Rows given to your code.
    pub rows: u64,
    /// Rows that `where_rust` kept back.
    pub filtered: u64,
    /// Rows that did not decode.
    pub failed: u64,
    /// Payload bytes received.
    pub bytes: u64,
    /// Rows that wait in the channel now.
    pub buffered_rows: usize,
    /// Payload bytes that wait in the channel now.
    pub buffered_bytes: usize,
    /// The most payload bytes that ever waited at once.
    pub peak_bytes: usize,
    /// The most rows that may wait.
    pub row_limit: usize,
    /// The most payload bytes that may wait (`max_memory`).
    pub byte_limit: usize,
    /// Where the consumer's time went.
    pub time: StreamTime,
    /// Where the producer's time went.
    pub producer_time: ProducerTime,
    /// The time in which the consumer was busy while rows, or the end, waited for it.
    pub backlog: Duration,
    shares: Shares,
    recent: Shares,
}

impl Stats {
    /// Who set the pace since the stream began.
    pub fn verdict(&self) -> Verdict {
        self.shares.verdict()
    }

    /// The shares behind [`verdict`](Self::verdict).
    pub fn shares(&self) -> Shares {
        self.shares
    }

    /// The shares of the last ten seconds of the stream's life; `recent().verdict()` is who sets the pace now.
    pub fn recent(&self) -> Shares {
        self.recent
    }

    /// How far the stream got, as in `after 1,234 rows in 5.0 s`.
    pub(crate) fn progress(&self) -> String {
        format!("after {} rows in {}", Grouped(self.rows), Seconds(self.elapsed))
    }

    /// [`progress`](Self::progress) and which side set the pace.
    pub(crate) fn summary(&self) -> String {
        format!("{}; {}{}", self.progress(), self.shares.summary(), self.verdict().advice())
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let part = |time: Duration| Percent(time.as_secs_f64() / whole);
        write!(
            OneLine(f),
            "{}: {} rows, {} in {}; {} (your code {}, decoding {}), peak {} of {}",
            self.entity,
            Grouped(self.rows),
            Bytes(self.bytes),
            Seconds(self.elapsed),
            self.shares.summary(),
            part(self.time.consumer),
            part(self.time.decode),
            Bytes(self.peak_bytes as u64),
            Bytes(self.byte_limit as u64),
        )
    }
}

struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (i, digit) in digits.char_indices() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} B", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", amount / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", amount / 1e6),
            _ => write!(f, "{:.1} GB", amount / 1e9),
        }
    }
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 1.0 { write!(f, "{:.0} ms", seconds * 1e3) } else { write!(f, "{seconds:.1} s") }
    }
}

struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} %", self.0 * 100.0)
    }
}

/// Rows by what became of them. One writer, the stream; read by all.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) yielded: AtomicU64,
    pub(crate) filtered: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// When a row was last seen to be given out, in nanoseconds of the stream's life.
    pub(crate) last_row: AtomicU64,
}

impl Progress {
    /// Adds one without the cost of an atomic addition: the stream alone writes.
    pub(crate) fn count(counter: &AtomicU64) {
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// Looks at a stream from elsewhere: another task, a status page, a health check. Cheap to clone; it
/// keeps working, and stands still, after the stream has ended.
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
    /// The stream's statistics now.
    pub fn stats(&self) -> Stats {
        let gauge = &self.gauge;
        let times = gauge.ledger.read();
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
                source: Duration::from_nanos(times.producer[Producer::Source as usize]),
                room: Duration::from_nanos(times.producer[Producer::Room as usize]),
            },
            backlog: Duration::from_nanos(times.of(Consumer::Backlog)),
            shares: Shares::of(&times),
            recent: Shares::of(&since(&times, gauge.ledger.read_window_start())),
        }
    }

    /// Whether the stream is over: its end was reached, or it was dropped.
    pub fn is_ended(&self) -> bool {
        self.gauge.ledger.is_ended()
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").field("stats", &self.stats()).finish()
    }
}

impl StreamTime {
    fn of(times: &Times) -> Self {
        let held = times.of(Consumer::Overlap) + times.of(Consumer::Backlog);
        Self {
            source_wait: Duration::from_nanos(times.of(Consumer::SourceWait)),
            scheduled: Duration::from_nanos(times.of(Consumer::Scheduled)),
            decode: Duration::from_nanos(times.decode),
            consumer: Duration::from_nanos(held - times.decode),
            paused: Duration::from_nanos(times.of(Consumer::Paused)),
        }
    }
}

fn since(now: &Times, then: [Nanos; 5]) -> Times {
    Times { consumer: std::array::from_fn(|i| now.consumer[i].saturating_sub(then[i])), ..*now }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(backlog: f64, source_wait: f64, scheduled: f64) -> Verdict {
        let overlap = 1.0 - backlog - source_wait - scheduled;
        Shares { backlog, source_wait, scheduled, overlap }.verdict()
    }

    #[test]
    fn the_verdict_takes_a_tenth_and_twice_the_next() {
        assert_eq!(verdict(0.11, 0.05, 0.0), Verdict::ConsumerBound);
        assert_eq!(verdict(0.10, 0.0, 0.0), Verdict::Balanced);
        assert_eq!(verdict(0.3, 0.6, 0.1), Verdict::SourceBound);
        assert_eq!(verdict(0.3, 0.5, 0.2), Verdict::Mixed);
        assert_eq!(verdict(0.2, 0.3, 0.0), Verdict::Balanced);
        assert_eq!(verdict(0.1, 0.2, 0.5), Verdict::RuntimeBound);
        assert_eq!(Shares::default().verdict(), Verdict::Balanced);
    }

    #[test]
    fn statistics_are_one_line_whatever_the_entity_is_named() {
        let (clock, _) = crate::time::manual();
        let watchdog = Arc::new(crate::watchdog::Watchdog::new(clock.clone(), false));
        let gauge = Arc::new(Gauge::new(1, 1, crate::ledger::Ledger::new(clock, watchdog)));
        let observer = Observer { entity: "a\nb".into(), gauge, progress: Arc::default() };
        assert!(observer.stats().to_string().starts_with("a\\nb: 0 rows"), "{}", observer.stats());
    }

    #[test]
    fn a_mixed_verdict_names_the_sides_with_their_shares() {
        let shares = Shares { backlog: 0.01, source_wait: 0.38, scheduled: 0.61, overlap: 0.0 };
        assert_eq!(shares.summary(), "mixed: runtime 61 %, source 38 %");
        let shares = Shares { backlog: 0.01, source_wait: 0.88, scheduled: 0.11, overlap: 0.0 };
        assert_eq!(shares.summary(), "source-bound 88 %");
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(Grouped(7).to_string(), "7");
        assert_eq!(Grouped(100_213).to_string(), "100,213");
        assert_eq!(Bytes(61_000_000).to_string(), "61.0 MB");
        assert_eq!(Seconds(Duration::from_millis(12_400)).to_string(), "12.4 s");
    }
}
