//! How many streams have ended, and how: the series of `fraiseql.stream.ended`.

use std::sync::Mutex;

use crate::error::{Error, ErrorKind};
use crate::sync::lock;

/// The kinds of errors that can end a stream once Postgres has accepted it. Their series begin at zero; one
/// that is missing here is counted all the same, from its first error on.
const OF_STREAMS: &[ErrorKind] = &[ErrorKind::Query, ErrorKind::Disconnected, ErrorKind::Lost];
/// The kinds that can refuse a stream, or end it while Postgres is asked.
const OF_REFUSALS: &[ErrorKind] = &[
    ErrorKind::Query,
    ErrorKind::Config,
    ErrorKind::Statement,
    ErrorKind::Disconnected,
    ErrorKind::TransactionAborted,
    ErrorKind::Lost,
];
/// Series of an entity from its first stream on.
#[cfg(feature = "otlp")]
pub(crate) const ENDS: usize = 2 + OF_STREAMS.len();

/// How a stream ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum End<'a> {
    Complete,
    /// The stream was dropped before its end, or its query before Postgres had accepted it.
    Dropped,
    Failed(&'a Error),
}

impl<'a> End<'a> {
    /// The attribute `outcome`.
    pub(super) fn outcome(self) -> &'static str {
        match self {
            Self::Complete => COMPLETE,
            Self::Dropped => DROPPED,
            Self::Failed(_) => FAILED,
        }
    }

    pub(super) fn error(self) -> Option<&'a Error> {
        match self {
            Self::Failed(error) => Some(error),
            Self::Complete | Self::Dropped => None,
        }
    }
}

/// Counts of ended streams. All series that are to be expected are there from the start, at zero, so that the
/// first failure is a change like every other: `increase()` in Prometheus misses a series that begins at one.
#[derive(Debug)]
pub(super) struct Ends(Mutex<Vec<Count>>);

/// One series beside its entity's others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Count {
    pub(super) outcome: &'static str,
    /// The kind of the error, where there is one.
    pub(super) error_type: Option<&'static str>,
    pub(super) streams: u64,
}

const COMPLETE: &str = "complete";
const DROPPED: &str = "dropped";
const FAILED: &str = "failed";

impl Ends {
    /// Of streams that Postgres has accepted.
    pub(super) fn of_streams() -> Self {
        Self::new(&[COMPLETE, DROPPED], OF_STREAMS)
    }

    /// Of those that it has not.
    pub(super) fn of_refusals() -> Self {
        Self::new(&[DROPPED], OF_REFUSALS)
    }

    fn new(outcomes: &[&'static str], kinds: &[ErrorKind]) -> Self {
        let without_error = outcomes.iter().map(|outcome| (*outcome, None));
        let failed = kinds.iter().map(|kind| (FAILED, Some(kind.as_str())));
        let count = |(outcome, error_type)| Count { outcome, error_type, streams: 0 };
        Self(Mutex::new(without_error.chain(failed).map(count).collect()))
    }

    pub(super) fn count(&self, end: End<'_>) {
        let (outcome, error_type) = (end.outcome(), end.error().map(|error| error.kind().as_str()));
        let mut counts = lock(&self.0);
        let same = |count: &&mut Count| (count.outcome, count.error_type) == (outcome, error_type);
        match counts.iter_mut().find(same) {
            Some(count) => count.streams += 1,
            None => counts.push(Count { outcome, error_type, streams: 1 }),
        }
    }

    pub(super) fn counts(&self) -> Vec<Count> {
        lock(&self.0).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_is_not_expected_is_counted_too() {
        let ends = Ends::of_streams();
        let expected = ends.counts().len();
        let error = Error::config("no kind that ends a stream");
        ends.count(End::Failed(&error));
        ends.count(End::Failed(&error));
        ends.count(End::Complete);
        let counts = ends.counts();
        let some = counts.iter().filter(|count| count.streams > 0);
        let some: Vec<_> = some.map(|count| (count.outcome, count.error_type, count.streams)).collect();
        assert_eq!(some, [("complete", None, 1), ("failed", Some("config"), 2)]);
        assert_eq!(counts.len(), expected + 1);
    }
}
