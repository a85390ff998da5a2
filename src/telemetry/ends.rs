//! Counts of ended streams by outcome: the series of `fraiseql.stream.ended`.

use std::sync::Mutex;

use crate::error::{Error, ErrorKind};
use crate::sync::lock;

/// The kinds of errors that can end a stream once Postgres has accepted its query. Their series begin at zero. A kind
/// that is missing here is counted too, but its series begins with the first error.
const STREAM_ERRORS: &[ErrorKind] =
    &[ErrorKind::Query, ErrorKind::Statement, ErrorKind::Disconnected, ErrorKind::Lost];
/// The kinds of errors with which a stream can be refused, or end before Postgres has accepted its query.
const REFUSAL_ERRORS: &[ErrorKind] = &[
    ErrorKind::Query,
    ErrorKind::Config,
    ErrorKind::Statement,
    ErrorKind::Disconnected,
    ErrorKind::TransactionAborted,
    ErrorKind::Lost,
];
/// The number of series that an entity has from its first stream on.
#[cfg(feature = "otlp")]
pub(crate) const ENDS: usize = 2 + STREAM_ERRORS.len();

/// How a stream ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End<'a> {
    Complete,
    /// The stream was dropped before its end, or the future of `Query::stream` before Postgres had accepted the query.
    Dropped,
    Failed(&'a Error),
}

impl<'a> End<'a> {
    /// Returns the value of the attribute `outcome`.
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

/// Counts of ended streams. Every expected series is exported from the start, at zero, because `increase()` in
/// Prometheus does not count the first value of a new series.
#[derive(Debug)]
pub(super) struct Ends(Mutex<Vec<Count>>);

/// The count of one outcome.
#[derive(Clone, Copy, Debug)]
pub(super) struct Count {
    pub(super) outcome: &'static str,
    /// The kind of the error, if there is one.
    pub(super) error_type: Option<&'static str>,
    pub(super) streams: u64,
}

const COMPLETE: &str = "complete";
const DROPPED: &str = "dropped";
const FAILED: &str = "failed";

impl Ends {
    /// Creates the counts of streams whose query Postgres has accepted.
    pub(super) fn of_streams() -> Self {
        Self::new(&[COMPLETE, DROPPED], STREAM_ERRORS)
    }

    /// Creates the counts of streams whose query was never accepted.
    pub(super) fn of_refusals() -> Self {
        Self::new(&[DROPPED], REFUSAL_ERRORS)
    }

    fn new(outcomes: &[&'static str], kinds: &[ErrorKind]) -> Self {
        let without_error = outcomes.iter().map(|outcome| (*outcome, None));
        let failed = kinds.iter().map(|kind| (FAILED, Some(kind.as_str())));
        let count = |(outcome, error_type)| Count { outcome, error_type, streams: 0 };
        Self(Mutex::new(without_error.chain(failed).map(count).collect()))
    }

    /// Counts one stream.
    pub(super) fn count(&self, end: End<'_>) {
        let (outcome, error_type) = (end.outcome(), end.error().map(|error| error.kind().as_str()));
        let mut counts = lock(&self.0);
        let same = |count: &&mut Count| (count.outcome, count.error_type) == (outcome, error_type);
        match counts.iter_mut().find(same) {
            Some(count) => count.streams += 1,
            None => counts.push(Count { outcome, error_type, streams: 1 }),
        }
    }

    /// Returns all counts, those of zero included.
    pub(super) fn counts(&self) -> Vec<Count> {
        lock(&self.0).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_of_an_unexpected_kind_is_counted() {
        let ends = Ends::of_streams();
        let expected = ends.counts().len();
        let error = Error::config("this kind cannot end a stream");
        ends.count(End::Failed(&error));
        ends.count(End::Failed(&error));
        ends.count(End::Complete);
        let counts = ends.counts();
        let counted = counts.iter().filter(|count| count.streams > 0);
        let counted: Vec<_> = counted.map(|count| (count.outcome, count.error_type, count.streams)).collect();
        assert_eq!(counted, [("complete", None, 1), ("failed", Some("config"), 2)]);
        assert_eq!(counts.len(), expected + 1);
    }
}
