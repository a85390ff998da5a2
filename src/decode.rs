//! From a row's bytes to a value, and what that costs.

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::chunk::Row;
use crate::error::Error;
use crate::stats::Observer;
use crate::time::Nanos;

/// What a stream can yield: any [`DeserializeOwned`] - your types, `serde_json::Value`, `Option` of them -
/// or [`RawJson`]. Cannot be implemented elsewhere.
pub trait FromJson: Sized + sealed::FromRow {}

impl<T: sealed::FromRow> FromJson for T {}

/// The text of a row's JSON, byte by byte as Postgres sent it; SQL NULL is `null`.
///
/// Keeping one keeps its whole chunk in memory: copy what you collect.
///
/// ```
/// use fraiseql_stream::RawJson;
///
/// fn length(row: &RawJson) -> usize {
///     row.as_bytes().len()
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawJson(Bytes);

impl RawJson {
    /// The text, in UTF-8.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text without a copy.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

impl AsRef<[u8]> for RawJson {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

mod sealed {
    #![expect(unnameable_types, reason = "this is what seals FromJson")]

    use super::{DeserializeOwned, Error, RawJson, Row};

    pub trait FromRow: Sized {
        #[expect(private_interfaces, reason = "the trait is sealed: nobody else calls this")]
        fn from_json(row: &Row<'_>, number: u64) -> Result<Self, Error>;
    }

    impl<T: DeserializeOwned> FromRow for T {
        #[expect(private_interfaces, reason = "the trait is sealed: nobody else calls this")]
        fn from_json(row: &Row<'_>, number: u64) -> Result<Self, Error> {
            // Checked once as a whole: that costs a sixth less than serde_json's check string by string.
            let text =
                std::str::from_utf8(row.as_bytes()).map_err(|error| Error::decode(number, false, error))?;
            serde_json::from_str(text).map_err(|error| Error::decode(number, row.is_null(), error))
        }
    }

    impl FromRow for RawJson {
        #[expect(private_interfaces, reason = "the trait is sealed: nobody else calls this")]
        fn from_json(row: &Row<'_>, _: u64) -> Result<Self, Error> {
            Ok(Self(row.to_bytes()))
        }
    }
}

/// Measures decoding by samples: reading the clock twice a row would cost a tenth of a small row.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Bytes decoded since the last sample.
    bytes: usize,
    /// The next row is measured.
    due: bool,
    /// When a sample was last taken.
    at: Nanos,
    rows: u64,
}

impl Sampler {
    /// A row out of so many bytes is measured.
    const EVERY: usize = 4096;
    /// Where rows are further apart than this, reading the clock for each is nothing.
    const SLOW: Nanos = 10_000;

    /// A chunk begins.
    pub(crate) fn begin(&mut self, now: Nanos) {
        self.at = now;
        self.rows = 0;
    }

    pub(crate) fn decode<V>(
        &mut self,
        stream: &Observer,
        row: &Row<'_>,
        decode: impl FnOnce(&Row<'_>) -> V,
    ) -> V {
        let size = row.as_bytes().len().max(1);
        self.bytes += size;
        self.rows += 1;
        if !self.due && self.bytes < Self::EVERY {
            return decode(row);
        }
        let ledger = &stream.gauge.ledger;
        let start = ledger.now();
        let value = decode(row);
        let end = ledger.now();
        // The sample stands for all bytes since the one before.
        let spent = u128::from(end - start) * self.bytes as u128 / size as u128;
        ledger.decoded(u64::try_from(spent).unwrap_or(u64::MAX));
        stream.progress.last_row.store(end, std::sync::atomic::Ordering::Relaxed);
        self.due = end.saturating_sub(self.at) / self.rows > Self::SLOW;
        (self.bytes, self.at, self.rows) = (0, end, 0);
        value
    }
}
