//! `Verdict`: the rule that derives from shares of time the side that sets the pace.

use std::fmt;

use super::format::Percent;
use super::ledger::{ConsumerState, Times};

/// The side that sets the pace of a stream.
///
/// A verdict names a side, not a fault: a stream that runs as fast as your disk writes is `ConsumerBound`, and
/// healthy. The [`Shares`] show how much it matters: a share of up to 10 % can be ignored, a share of up to 50 % costs
/// something, and above 50 % that side determines how fast the stream is.
///
/// # How it is determined
///
/// Every moment of a stream's lifetime, except for pauses, counts towards one of four shares:
///
/// | share | your code | the channel | verdict if it dominates |
/// |---|---|---|---|
/// | backlog | is busy | holds rows, or the end of the stream | [`ConsumerBound`](Self::ConsumerBound) |
/// | source wait | waits for a row | is empty | [`SourceBound`](Self::SourceBound) |
/// | scheduled | is ready to run, but the async runtime is late to run it | | [`RuntimeBound`](Self::RuntimeBound) |
/// | overlap | is busy | is empty: neither side waits | |
///
/// Decoding JSON into `T` counts as your code; [`StreamTime`](crate::StreamTime) shows it separately.
///
/// One of the first three shares dominates if it is above 10 % and at least twice as large as the next largest of
/// them. If none dominates, the verdict is [`Mixed`](Self::Mixed) if the three add up to more than 50 %, and
/// [`Balanced`](Self::Balanced) otherwise.
///
/// When rows arrive, the task that waits for them is woken. If it takes them within 0.5 ms, this time still counts as
/// source wait. If it takes longer, there are two possible causes:
///
/// - **The runtime was late.** This requires evidence: a task that only checks the runtime ran late as well. Only the
///   part of the delay that the evidence covers counts as scheduled. A late runtime cannot read rows from the socket
///   either. If it was late at the end of a wait for rows, that part of the wait counts as scheduled too.
/// - **Your task was busy with something else**: another branch of a `select!`, another future of a `join!`, or the
///   rows that it took before. All delay without evidence against the runtime counts as backlog.
///
/// The 0.5 ms also determine what the histogram `fraiseql_channel_occupancy_rows` records for a poll that had to wait:
/// 0 if the first rows were taken within that time, and otherwise all rows that were in the channel when they were
/// taken.
///
/// # What it cannot know
///
/// - **Who blocks a current-thread runtime.** Code that blocks the only thread delays every task. The order in which
///   tasks run usually shows whether the stream's own task or another one blocks the thread. If it does not, the first
///   two such delays count as scheduled; later ones count as scheduled only while other tasks are known to block the
///   thread for a significant part of the time, and as backlog otherwise. The order proves nothing if something other
///   than rows also wakes the stream's task, such as a timer in a `select!` or a second stream; `ConsumerBound` and
///   `RuntimeBound` may then be confused. The future passed to `block_on` (`main` on a current-thread runtime) has no
///   place in that order, so its ambiguous delays count as scheduled.
/// - **Who blocks a multi-thread runtime, if it happens once or twice.** A block of the stream's own task can also stop
///   the timers of the whole runtime, until another worker takes them over. The first two such blocks may then count as
///   scheduled. A multi-thread runtime with one worker is treated as if it had several.
/// - **What your code awaits while it holds rows.** That time counts as your code's, even if a late runtime delays what
///   it awaits.
/// - **Isolated delays of the runtime.** The runtime is checked every 250 ms, every 10 ms while streams have waits of
///   2 ms or more, and every 2 ms while it is suspected to be late. A delay between two checks may go unnoticed. It
///   counts as backlog if rows had arrived, and as source wait otherwise.
/// - **What is behind the socket.** A slow network looks like a slow database.
///
/// # Examples
///
/// ```
/// use fraiseql_stream::{Shares, Verdict};
///
/// let mut shares = Shares::default();
/// (shares.backlog, shares.source_wait, shares.overlap) = (0.6, 0.3, 0.1);
/// assert_eq!(shares.verdict(), Verdict::ConsumerBound); // twice as large as the source wait
/// (shares.backlog, shares.source_wait, shares.overlap) = (0.5, 0.3, 0.2);
/// assert_eq!(shares.verdict(), Verdict::Mixed);
/// (shares.backlog, shares.source_wait, shares.overlap) = (0.1, 0.0, 0.9);
/// assert_eq!(shares.verdict(), Verdict::Balanced); // not above 10 %
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// Rows wait for your code, or for decoding them: the consumer is slow.
    ConsumerBound,
    /// Your code waits for rows: Postgres or the network is slow.
    SourceBound,
    /// Your code is ready, but the async runtime is late to run it: something blocks its threads, or there is more
    /// work than they can do.
    RuntimeBound,
    /// No side dominates, and backlog, source wait and scheduled add up to more than 50 %. The [`Shares`] show how much
    /// each side contributes.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::{Shares, Verdict};
    ///
    /// let mut shares = Shares::default();
    /// (shares.scheduled, shares.source_wait, shares.overlap) = (0.5, 0.4, 0.1);
    /// assert_eq!(shares.verdict(), Verdict::Mixed);
    /// ```
    Mixed,
    /// No side dominates, and backlog, source wait and scheduled add up to at most 50 %: for at least half of the time
    /// neither side waits.
    Balanced,
}

impl Verdict {
    /// Returns the name used in metrics, spans and JSON: `consumer_bound`, `source_bound`, `runtime_bound`, `mixed`
    /// or `balanced`. `Display` writes the same names with a hyphen, for people.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::Verdict;
    ///
    /// assert_eq!(Verdict::ConsumerBound.as_str(), "consumer_bound");
    /// assert_eq!(Verdict::ConsumerBound.to_string(), "consumer-bound");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConsumerBound => "consumer_bound",
            Self::SourceBound => "source_bound",
            Self::RuntimeBound => "runtime_bound",
            Self::Mixed => "mixed",
            Self::Balanced => "balanced",
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

/// Shares of a stream's time, each between 0 and 1, by which side waited for which.
///
/// They add up to 1, or are all 0 as long as no time was counted. Time in [`pause`](crate::JsonStream::pause) is not
/// counted.
///
/// # Examples
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
    /// The share of time in which the consumer was busy while rows, or the end of the stream, waited in the channel.
    pub backlog: f64,
    /// The share of time in which the consumer waited for rows and the channel was empty.
    pub source_wait: f64,
    /// The share of time in which the consumer was ready to run, but the async runtime was late to run it.
    pub scheduled: f64,
    /// The share of time in which the consumer was busy and the channel was empty: neither side waited.
    pub overlap: f64,
}

impl Shares {
    pub(super) fn of(times: &Times) -> Self {
        let time = |state| times.of(state) as f64;
        let [backlog, source_wait, scheduled, overlap] = [
            time(ConsumerState::Backlog),
            time(ConsumerState::SourceWait),
            time(ConsumerState::Scheduled),
            time(ConsumerState::Overlap),
        ];
        let total = backlog + source_wait + scheduled + overlap;
        if total == 0.0 {
            return Self::default();
        }
        Self {
            backlog: backlog / total,
            source_wait: source_wait / total,
            scheduled: scheduled / total,
            overlap: overlap / total,
        }
    }

    /// Returns the verdict on these shares, by the rule described at [`Verdict`]. If all shares are 0, as in
    /// `Shares::default()`, it is `Balanced`.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::{Shares, Verdict};
    ///
    /// let mut shares = Shares::default();
    /// assert_eq!(shares.verdict(), Verdict::Balanced);
    /// (shares.scheduled, shares.overlap) = (0.2, 0.8);
    /// assert_eq!(shares.verdict(), Verdict::RuntimeBound);
    /// ```
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

    /// Returns the share on which the verdict is based: the share of the side that it names, the sum of the first three
    /// shares (all but `overlap`) for `Mixed`, and `overlap` for `Balanced`.
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

    /// Returns the sides that can set the pace with their shares, largest share first.
    fn sides(&self) -> [(Side, f64); 3] {
        let mut sides = [
            (Side::Consumer, self.backlog),
            (Side::Source, self.source_wait),
            (Side::Runtime, self.scheduled),
        ];
        sides.sort_by(|a, b| b.1.total_cmp(&a.1));
        sides
    }

    /// Returns the verdict with its share, as in `source-bound 61 %` or `mixed: runtime 61 %, source 38 %`.
    pub(crate) fn summary(&self) -> String {
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

/// A side that can set the pace.
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
    fn a_side_dominates_above_10_percent_and_from_twice_the_next_share() {
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
