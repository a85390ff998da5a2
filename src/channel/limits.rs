//! How much of a stream may be in memory, refused when it makes no sense.

/// The channel's rows, and the scale of the thresholds 10, 50, 200 and 240.
const CHANNEL_ROWS: usize = 256;
const CHUNK_ROWS: usize = 128;
const MEMORY: usize = 16 * 1024 * 1024;
/// A chunk in the consumer's hands is beyond the budget; an eighth keeps that small.
const CHUNKS_IN_MEMORY: usize = 8;

/// The bounds of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Most rows in the channel.
    pub(crate) rows: usize,
    /// Most payload bytes in the channel; one larger row passes alone.
    pub(crate) bytes: usize,
    /// Most rows of one chunk.
    pub(crate) chunk_rows: usize,
    /// A chunk with so many bytes is not filled further.
    pub(crate) chunk_bytes: usize,
}

impl Limits {
    pub(crate) fn new(chunk_size: Option<usize>, max_memory: Option<usize>) -> Result<Self, &'static str> {
        let chunk_rows = chunk_size.unwrap_or(CHUNK_ROWS);
        let bytes = max_memory.unwrap_or(MEMORY);
        if chunk_rows == 0 {
            return Err("chunk_size is 0: a chunk holds at least 1 row");
        }
        if bytes == 0 {
            return Err("max_memory is 0: give the bytes that rows may take while they wait");
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
    fn the_channel_keeps_the_scale_of_256_rows_whatever_the_chunk() {
        let limits = |chunk| Limits::new(Some(chunk), None).map(|limits| limits.rows).unwrap();
        assert_eq!((limits(1), limits(64), limits(256), limits(1000)), (256, 256, 256, 1000));
    }

    #[test]
    fn nothing_is_not_a_limit() {
        let text = |chunk, memory| Limits::new(chunk, memory).unwrap_err().to_string();
        assert!(text(Some(0), None).starts_with("chunk_size is 0"));
        assert!(text(None, Some(0)).starts_with("max_memory is 0"));
    }
}
