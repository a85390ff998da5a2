//! Decodes the rows of a chunk, and measures the time that this takes.

mod sampler;

use std::ops::Range;
use std::str::Utf8Error;

use bytes::Bytes;
use serde::de::DeserializeOwned;

pub(crate) use self::sampler::Sampler;
use crate::channel::{Chunk, Filling};
use crate::error::Error;

/// A type that a stream can yield.
///
/// These are [`RawJson`] and all types that implement [`DeserializeOwned`]: your own types, [`serde_json::Value`], and
/// `Option` of them, which accepts null. The trait cannot be implemented directly; implement or derive
/// [`serde::Deserialize`] instead.
///
/// # Examples
///
/// Name it to write code that is generic over the type of the rows:
///
/// ```
/// use fraiseql_stream::{Connection, FromJson, Result};
/// use futures_util::TryStreamExt;
///
/// async fn all<T: FromJson>(db: &mut Connection, entity: &str) -> Result<Vec<T>> {
///     db.query::<T>(entity).stream().await?.try_collect().await
/// }
/// ```
pub trait FromJson: Sized + sealed::FromRow {}

impl<T: sealed::FromRow> FromJson for T {}

/// The JSON text of a row, exactly as Postgres sent it. SQL NULL becomes the text `null`.
///
/// The text is not parsed and not checked to be UTF-8. A `RawJson`, and the [`Bytes`] made of it, keep the memory of a
/// whole chunk alive, so copy the rows that you want to keep. Clones share that memory.
///
/// # Examples
///
/// ```no_run
/// use fraiseql_stream::{Connection, RawJson};
/// use futures_util::TryStreamExt;
/// use tokio::io::AsyncWriteExt;
///
/// # async fn example(mut db: Connection) -> Result<(), Box<dyn std::error::Error>> {
/// let mut out = tokio::io::stdout();
/// let mut orders = db.query::<RawJson>("orders").stream().await?;
/// while let Some(order) = orders.try_next().await? {
///     out.write_all(order.as_bytes()).await?;
///     out.write_all(b"\n").await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawJson(Bytes);

impl RawJson {
    /// Returns the text as bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// use fraiseql_stream::RawJson;
    ///
    /// fn is_null(row: &RawJson) -> bool {
    ///     row.as_bytes() == b"null"
    /// }
    /// ```
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the text as a string slice. Each call checks that it is UTF-8.
    ///
    /// # Errors
    ///
    /// Returns an error if the text is not UTF-8. That is possible only if `client_encoding` was changed from UTF8.
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
    ///
    /// # Examples
    ///
    /// ```
    /// use bytes::Bytes;
    /// use fraiseql_stream::{JsonStream, RawJson, Result};
    /// use futures_util::{Stream, TryStreamExt};
    ///
    /// // The body of a response.
    /// fn body(orders: JsonStream<RawJson>) -> impl Stream<Item = Result<Bytes>> {
    ///     orders.map_ok(RawJson::into_bytes)
    /// }
    /// ```
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

/// Returns the text as bytes, as [`as_bytes`](RawJson::as_bytes) does.
impl AsRef<[u8]> for RawJson {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

mod sealed {
    #![expect(unnameable_types, reason = "this is what seals FromJson")]

    use super::{Bytes, DeserializeOwned, Error, Range, RawJson, Text};

    pub trait FromRow: Sized {
        /// The data of a chunk in the form from which rows are decoded. `Send` makes a stream `Send` in generic code too.
        type Data: Default + Send;

        /// Prepares the data of a chunk.
        fn data(chunk: Vec<u8>) -> Self::Data;

        /// Returns the memory of data that is used up, unless a row of it is still held.
        fn memory(data: Self::Data) -> Option<Vec<u8>>;

        /// Decodes one row, whose number in the stream is `number`.
        fn from_json(data: &Self::Data, row: Range<usize>, number: u64) -> Result<Self, Error>;
    }

    impl<T: DeserializeOwned> FromRow for T {
        type Data = Text;

        fn data(chunk: Vec<u8>) -> Text {
            // Checking the chunk once as a whole costs a sixth less than serde_json's check of each string.
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

/// The data of a chunk as text. It is public only because the sealed trait is.
#[derive(Debug)]
#[expect(unnameable_types, reason = "part of what seals FromJson")]
pub enum Text {
    Whole(String),
    /// The data is not UTF-8 as a whole, so each row is checked by itself.
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
            // Two rows with one half of a character each make valid UTF-8 together, but `get` finds no boundary
            // between them, and the check of the row reports the error.
            Self::Whole(text) => {
                text.get(row.clone()).map_or_else(|| std::str::from_utf8(&text.as_bytes()[row]), Ok)
            }
            Self::Mixed(bytes) => std::str::from_utf8(&bytes[row]),
        }
    }
}

/// The chunk whose rows are decoded at present.
pub(crate) struct CurrentChunk<T: FromJson> {
    data: T::Data,
    /// Where each row ends in `data`.
    ends: Vec<usize>,
    /// The number of rows of this chunk that were read.
    read: usize,
    /// Where the next row starts.
    start: usize,
    /// The number of rows of the stream that were read.
    stream_rows: u64,
}

impl<T: FromJson> Default for CurrentChunk<T> {
    fn default() -> Self {
        Self { data: T::Data::default(), ends: Vec::new(), read: 0, start: 0, stream_rows: 0 }
    }
}

impl<T: FromJson> CurrentChunk<T> {
    /// Replaces the chunk by the next one.
    pub(crate) fn replace(&mut self, chunk: Chunk) {
        (self.data, self.ends) = (T::data(chunk.data), chunk.ends);
        (self.read, self.start) = (0, 0);
    }

    /// Returns whether all rows of the chunk were read.
    pub(crate) fn is_used_up(&self) -> bool {
        self.read >= self.ends.len()
    }

    /// Returns the number of rows of the stream that were read.
    pub(crate) fn stream_rows(&self) -> u64 {
        self.stream_rows
    }

    /// Removes a chunk whose rows were all read, and returns its memory for reuse.
    pub(crate) fn recycle(&mut self) -> Filling {
        self.read = 0;
        let data = T::memory(std::mem::take(&mut self.data));
        Filling::reusing(data.unwrap_or_default(), std::mem::take(&mut self.ends))
    }

    /// Returns the range of the next row.
    fn next(&mut self) -> Option<Range<usize>> {
        let end = *self.ends.get(self.read)?;
        self.read += 1;
        self.stream_rows += 1;
        Some(std::mem::replace(&mut self.start, end)..end)
    }

    /// Decodes the row that `next` returned last.
    fn decode(&self, row: Range<usize>) -> Result<T, Error> {
        T::from_json(&self.data, row, self.stream_rows - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode<T: FromJson>(rows: &[&[u8]]) -> Vec<Result<T, Error>> {
        let mut chunk = CurrentChunk::<T>::default();
        chunk.replace(Chunk::of(rows));
        std::iter::from_fn(|| chunk.next().map(|row| chunk.decode(row))).collect()
    }

    #[test]
    fn rows_keep_their_order_and_text() {
        let raw = decode::<RawJson>(&[b"1", b"", b"[2,  3]"]);
        let bytes: Vec<_> = raw.into_iter().map(|row| row.unwrap().into_bytes()).collect();
        assert_eq!(bytes, ["1", "", "[2,  3]"]);
        assert_eq!(decode::<u8>(&[b"1", b"2"]).into_iter().map(Result::unwrap).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn row_that_is_not_utf8_affects_no_other() {
        let rows = decode::<String>(&[b"\"a\"", b"\"\xff\"", b"\"b\""]);
        let ok: Vec<_> = rows.iter().map(Result::is_ok).collect();
        assert_eq!(ok, [true, false, true]);
        // Each row has one half of a character.
        let halves = decode::<String>(&[b"\"\xc3", b"\xa4\""]);
        assert!(halves.iter().all(Result::is_err));
    }
}
