//! `Verdict`: the rule that turns shares of time into the side that sets the pace.

use std::fmt;

use super::format::Percent;
use super::ledger::{ConsumerState, Times};

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

    pub(super) fn advice(self) -> &'static str {
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
    pub(super) fn of(times: &Times) -> Self {
        let part = |state| times.of(state) as f64;
        let [backlog, source_wait, scheduled, overlap] = [
            part(ConsumerState::Backlog),
            part(ConsumerState::SourceWait),
            part(ConsumerState::Scheduled),
            part(ConsumerState::Overlap),
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
    /// assert_eq!(shares.dominant(), 0.8);
    /// ```
    pub fn dominant(&self) -> f64 {
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
    pub(super) fn summary(&self) -> String {
        let verdict = self.verdict();
        if verdict != Verdict::Mixed {
            return format!("{verdict} {}", Percent(self.dominant()));
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
    fn a_mixed_verdict_names_the_sides_with_their_shares() {
        let shares = Shares { backlog: 0.01, source_wait: 0.38, scheduled: 0.61, overlap: 0.0 };
        assert_eq!(shares.summary(), "mixed: runtime 61 %, source 38 %");
        let shares = Shares { backlog: 0.01, source_wait: 0.88, scheduled: 0.11, overlap: 0.0 };
        assert_eq!(shares.summary(), "source-bound 88 %");
    }
}
