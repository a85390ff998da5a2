//! `Limits`: how much of a stream may be in memory.

/// The row limit of a channel with chunks of at most this size. The documented thresholds of the occupancy histogram
/// (10, 50, 200 and 240 rows) refer to it.
const CHANNEL_ROWS: usize = 256;
/// The defaults.
const CHUNK_ROWS: usize = 128;
const MEMORY: usize = 16 * 1024 * 1024;
/// The byte limit does not cover the chunk that the consumer holds. A chunk of an eighth of the limit keeps that small.
const CHUNKS_IN_MEMORY: usize = 8;

/// The limits of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The maximum number of rows in the channel.
    pub(crate) rows: usize,
    /// The maximum number of payload bytes in the channel. A single larger row passes alone.
    pub(crate) bytes: usize,
    /// The maximum number of rows in a chunk.
    pub(crate) chunk_rows: usize,
    /// The number of payload bytes from which on a chunk is not filled further.
    pub(crate) chunk_bytes: usize,
}

impl Limits {
    /// Returns the limits for a chunk size and a memory limit, or their defaults.
    ///
    /// # Errors
    /// A text for the user if a value is 0.
    pub(crate) fn new(chunk_size: Option<usize>, max_memory: Option<usize>) -> Result<Self, &'static str> {
        let chunk_rows = chunk_size.unwrap_or(CHUNK_ROWS);
        let bytes = max_memory.unwrap_or(MEMORY);
        if chunk_rows == 0 {
            return Err("invalid chunk_size 0: a chunk holds at least 1 row; set it to 1 or more");
        }
        if bytes == 0 {
            return Err("invalid max_memory 0: the channel holds at least 1 byte; set it to 1 or more");
        }
        Ok(Self {
            rows: chunk_rows.max(CHANNEL_ROWS),
            bytes,
            chunk_rows,
            chunk_bytes: (bytes / CHUNKS_IN_MEMORY).max(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_limit_is_256_unless_chunks_are_larger() {
        let row_limit = |chunk_size| Limits::new(Some(chunk_size), None).unwrap().rows;
        assert_eq!([1, 64, 256, 1000].map(row_limit), [256, 256, 256, 1000]);
    }

    #[test]
    fn a_limit_of_zero_is_refused() {
        let error = |chunk_size, max_memory| Limits::new(chunk_size, max_memory).unwrap_err();
        assert!(error(Some(0), None).starts_with("invalid chunk_size 0"));
        assert!(error(None, Some(0)).starts_with("invalid max_memory 0"));
    }
}
