//! Which side set the pace of a stream, as part of an error.

use crate::channel::{Stats, Verdict};

/// Returns the side that set the pace, with its share and what that means.
pub(super) fn pace(stats: &Stats) -> String {
    format!("{}{}", stats.shares().summary(), meaning(stats.verdict()))
}

/// Returns a clause to append, which is empty if no side dominates.
fn meaning(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::ConsumerBound => ": Postgres waited for your code, not the other way round",
        Verdict::SourceBound => ": your code waited for Postgres",
        Verdict::RuntimeBound => ": your code was ready, but the async runtime was late to run it",
        Verdict::Mixed | Verdict::Balanced => "",
    }
}
