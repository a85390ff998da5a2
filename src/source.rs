//! The seam between what reads from Postgres and the producer.

use std::task::{Context, Poll};

use crate::error::Error;

/// Where rows come from. A row is lent, not given: it need not outlive the look at it, and no handle to it
/// is moved around.
pub(crate) trait Source {
    /// Lends the next row's JSON text to `look`; SQL NULL reads as JSON's. `None` at the end.
    fn poll_row<V>(
        &mut self,
        cx: &mut Context<'_>,
        look: impl FnOnce(&[u8]) -> V,
    ) -> Poll<Option<Result<V, Error>>>;
}
