//! From a row's bytes to a value, and what that costs.

use std::ops::Range;
use std::str::Utf8Error;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::channel::{Chunk, Filling, Nanos, Observer};
use crate::error::Error;

/// What a stream can yield: any [`DeserializeOwned`] - your types, `serde_json::Value`, `Option` of them -
/// or [`RawJson`]. Cannot be implemented elsewhere.
pub trait FromJson: Sized + sealed::FromRow {}

impl<T: sealed::FromRow> FromJson for T {}

/// The JSON text of a row, exactly as Postgres sent it. SQL NULL is `null`.
///
/// A `RawJson` keeps the memory of its whole chunk alive: copy the rows that you collect.
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
    /// Returns the text as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the text as a string slice. Each call checks that it is UTF-8.
    ///
    /// # Errors
    ///
    /// Fails if the text is not UTF-8, which is possible only after `client_encoding` was changed from UTF8.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::RawJson;
    ///
    /// fn parse(row: &RawJson) -> Result<serde_json::Value, Box<dyn std::error::Error>> {
    ///     Ok(serde_json::from_str(row.as_str()?)?)
    /// }
    /// ```
    pub fn as_str(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.0)
    }

    /// Returns the text as [`Bytes`], without copying it.
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

    use super::{Bytes, DeserializeOwned, Error, Range, RawJson, Text};

    pub trait FromRow: Sized {
        /// A chunk's data in the form that rows are cut from. `Send` makes a stream `Send` in generic code too.
        type Data: Default + Send;

        fn data(chunk: Vec<u8>) -> Self::Data;

        /// Gives back the memory of data that is done with, if nobody holds a row of it.
        fn memory(data: Self::Data) -> Option<Vec<u8>>;

        fn from_json(data: &Self::Data, row: Range<usize>, number: u64) -> Result<Self, Error>;
    }

    impl<T: DeserializeOwned> FromRow for T {
        type Data = Text;

        fn data(chunk: Vec<u8>) -> Text {
            // Checked once as a whole: that costs a sixth less than serde_json's check string by string.
            String::from_utf8(chunk).map_or_else(|error| Text::Mixed(error.into_bytes()), Text::Whole)
        }

        fn memory(data: Text) -> Option<Vec<u8>> {
            Some(match data {
                Text::Whole(text) => text.into_bytes(),
                Text::Mixed(bytes) => bytes,
            })
        }

        fn from_json(data: &Text, row: Range<usize>, number: u64) -> Result<Self, Error> {
            let text = data.row(row).map_err(|error| Error::decode(number, false, error))?;
            serde_json::from_str(text).map_err(|error| Error::decode(number, text == "null", error))
        }
    }

    impl FromRow for RawJson {
        type Data = Bytes;

        fn data(chunk: Vec<u8>) -> Bytes {
            Bytes::from(chunk)
        }

        fn memory(data: Bytes) -> Option<Vec<u8>> {
            data.is_unique().then(|| data.into())
        }

        fn from_json(data: &Bytes, row: Range<usize>, _: u64) -> Result<Self, Error> {
            Ok(Self(data.slice(row)))
        }
    }
}

/// A chunk's data as text; public only as far as a sealed trait makes it so.
#[derive(Debug)]
#[expect(unnameable_types, reason = "part of what seals FromJson")]
pub enum Text {
    Whole(String),
    /// Some row is not UTF-8; the others must not suffer.
    Mixed(Vec<u8>),
}

impl Default for Text {
    fn default() -> Self {
        Self::Whole(String::new())
    }
}

impl Text {
    #[inline]
    fn row(&self, row: Range<usize>) -> Result<&str, Utf8Error> {
        match self {
            // Rows end between characters where each of them is UTF-8; where two are broken in the middle
            // of one character, the whole may be UTF-8 all the same.
            Self::Whole(text) => {
                text.get(row.clone()).map_or_else(|| std::str::from_utf8(&text.as_bytes()[row]), Ok)
            }
            Self::Mixed(bytes) => std::str::from_utf8(&bytes[row]),
        }
    }
}

/// The chunk in the consumer's hands, row by row.
pub(crate) struct InHand<T: FromJson> {
    data: T::Data,
    ends: Vec<usize>,
    /// The rows that were given out, and where the last of them ends.
    given: usize,
    start: usize,
    /// Rows of the stream up to here.
    rows: u64,
}

impl<T: FromJson> Default for InHand<T> {
    fn default() -> Self {
        Self { data: T::Data::default(), ends: Vec::new(), given: 0, start: 0, rows: 0 }
    }
}

impl<T: FromJson> InHand<T> {
    /// Takes up the chunk that follows.
    pub(crate) fn take(&mut self, chunk: Chunk) {
        (self.data, self.ends) = (T::data(chunk.data), chunk.ends);
        (self.given, self.start) = (0, 0);
    }

    /// Whether all rows of the chunk are given out.
    pub(crate) fn is_used_up(&self) -> bool {
        self.given >= self.ends.len()
    }

    /// How many rows of the stream were given out.
    pub(crate) fn rows_given(&self) -> u64 {
        self.rows
    }

    /// Lets go of a chunk whose rows are all given out; its memory can be used again.
    pub(crate) fn put_down(&mut self) -> Filling {
        self.given = 0;
        let data = T::memory(std::mem::take(&mut self.data));
        Filling::again(data.unwrap_or_default(), std::mem::take(&mut self.ends))
    }

    /// Where the next row lies.
    fn next(&mut self) -> Option<Range<usize>> {
        let end = *self.ends.get(self.given)?;
        self.given += 1;
        self.rows += 1;
        Some(std::mem::replace(&mut self.start, end)..end)
    }

    /// Decodes the row that `next` gave.
    fn decode(&self, row: Range<usize>) -> Result<T, Error> {
        T::from_json(&self.data, row, self.rows - 1)
    }
}

/// Measures decoding by samples: reading the clock twice a row would cost a tenth of a small row.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// The last sample: how long it took to decode so many bytes.
    sample: (Nanos, usize),
    /// Bytes since then, and how many may pass before the next one.
    since: usize,
    every: usize,
    /// Bytes that were decoded and are not accounted for, and how long rows were in hand meanwhile, up to `at`.
    bytes: usize,
    held: Nanos,
    at: Nanos,
    /// Rows since `at`.
    rows: u64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self { sample: (0, 1), since: 0, every: Self::FIRST, bytes: 0, held: 0, at: 0, rows: 0 }
    }
}

impl Sampler {
    /// A row out of so many bytes is measured.
    const EVERY: usize = 8192;
    /// The first one soon, for short streams; not at once where rows are small: the first finds cold caches.
    const FIRST: usize = 512;
    /// Where rows are further apart than this, reading the clock for each is nothing.
    const SLOW: Nanos = 10_000;

    /// A chunk comes to hand.
    pub(crate) fn begin(&mut self, now: Nanos) {
        if self.bytes == 0 {
            // What passed since the last one was waiting.
            self.held = 0;
        }
        (self.at, self.rows) = (now, 0);
    }

    /// It is done with: what comes is waiting.
    pub(crate) fn end(&mut self, stream: &Observer, now: Nanos) {
        self.hold(now);
        if self.sample.0 > 0 {
            self.account(stream);
        }
    }

    /// Decodes the next row of the chunk in hand.
    pub(crate) fn decode<T: FromJson>(
        &mut self,
        stream: &Observer,
        chunk: &mut InHand<T>,
    ) -> Option<Result<T, Error>> {
        let row = chunk.next()?;
        self.since += row.len();
        self.bytes += row.len();
        self.rows += 1;
        if self.since >= self.every {
            return Some(self.measure(stream, chunk, row));
        }
        Some(chunk.decode(row))
    }

    #[cold]
    fn measure<T: FromJson>(
        &mut self,
        stream: &Observer,
        chunk: &InHand<T>,
        row: Range<usize>,
    ) -> Result<T, Error> {
        let (gauge, size) = (&stream.gauge, row.len().max(1));
        let start = gauge.now();
        let value = chunk.decode(row);
        let end = gauge.now();
        stream.progress.last_row.store(end, Ordering::Relaxed);
        let is_slow = end.saturating_sub(self.at) / self.rows > Self::SLOW;
        (self.since, self.every) = (0, if is_slow { 0 } else { Self::EVERY });
        self.sample = (end - start, size);
        self.hold(end);
        self.account(stream);
        value
    }

    fn hold(&mut self, now: Nanos) {
        self.held += now.saturating_sub(self.at);
        (self.at, self.rows) = (now, 0);
    }

    /// The last sample stands for all bytes not accounted for, but for no more time than has passed: where the
    /// thread lost its core in the row that was measured, it does not.
    fn account(&mut self, stream: &Observer) {
        let (spent, size) = self.sample;
        let spent = u128::from(spent) * self.bytes as u128 / size as u128;
        stream.gauge.record_decode(u64::try_from(spent).unwrap_or(u64::MAX).min(self.held));
        (self.bytes, self.held) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use serde::{Deserialize, Deserializer};

    use super::*;

    fn decode<T: FromJson>(rows: &[&[u8]]) -> Vec<Result<T, Error>> {
        let mut in_hand = InHand::<T>::default();
        in_hand.take(Chunk::of(rows));
        std::iter::from_fn(|| in_hand.next().map(|row| in_hand.decode(row))).collect()
    }

    #[test]
    fn rows_come_out_as_they_went_in() {
        let raw = decode::<RawJson>(&[b"1", b"", b"[2,  3]"]);
        let bytes: Vec<_> = raw.into_iter().map(|row| row.unwrap().into_bytes()).collect();
        assert_eq!(bytes, ["1", "", "[2,  3]"]);
        assert_eq!(decode::<u8>(&[b"1", b"2"]).into_iter().map(Result::unwrap).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_row_that_is_not_utf8_spoils_no_other() {
        let rows = decode::<String>(&[b"\"a\"", b"\"\xff\"", b"\"b\""]);
        let ok: Vec<_> = rows.iter().map(Result::is_ok).collect();
        assert_eq!(ok, [true, false, true]);
        // Two halves of one character.
        let halves = decode::<String>(&[b"\"\xc3", b"\xa4\""]);
        assert!(halves.iter().all(Result::is_err));
    }

    thread_local! {
        static HAND: RefCell<Arc<AtomicU64>> = RefCell::default();
    }

    /// A number that takes as many nanoseconds to decode.
    struct Slow;

    impl<'de> Deserialize<'de> for Slow {
        fn deserialize<D: Deserializer<'de>>(number: D) -> Result<Self, D::Error> {
            let nanos = u64::deserialize(number)?;
            HAND.with_borrow(|hand| hand.fetch_add(nanos, Ordering::Relaxed));
            Ok(Self)
        }
    }

    /// Decodes the rows of one chunk; how many nanoseconds are put down to it.
    fn decoding(rows: &[&[u8]]) -> Nanos {
        let (stream, hand) = Observer::manual("t");
        HAND.set(hand);
        let (mut sampler, mut in_hand) = (Sampler::default(), InHand::<Slow>::default());
        in_hand.take(Chunk::of(rows));
        while let Some(row) = sampler.decode(&stream, &mut in_hand) {
            row.unwrap();
        }
        sampler.end(&stream, stream.gauge.now());
        stream.gauge.decode_time()
    }

    #[test]
    fn a_sample_stands_for_no_more_time_than_has_passed() {
        let long = format!("{:>1$}", 3_000, Sampler::FIRST - 5);
        // The thread loses its core in the midst of the row that is measured.
        assert_eq!(decoding(&[long.as_bytes(), b"50000"]), 53_000);
    }

    #[test]
    fn a_short_stream_has_its_decoding_too() {
        let row = format!("{:>100}", 200);
        assert_eq!(decoding(&[row.as_bytes(); 20]), 20 * 200);
    }
}
