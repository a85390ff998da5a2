//! The log record of a failed stream.

use super::SCOPE;
use crate::error::{Error, Recorded};

/// Logs the error of a stream, in the current span. A stream that fails has exactly one such record.
pub(super) fn log_failure(entity: &str, error: &Error) {
    tracing::error!(
        name: "fraiseql.stream.failed",
        target: SCOPE,
        entity,
        error.type = error.type_name(),
        "{}",
        Recorded(error),
    );
}
