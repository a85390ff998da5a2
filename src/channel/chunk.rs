//! `Chunk`: rows that pass through the channel as one unit, and `Filling`, which builds it.

/// A unit that a channel carries, which holds rows.
pub(crate) trait Payload {
    /// The memory of a unit that was used up, to be used again by the producer.
    type Memory: Default;

    /// Returns the number of rows in the unit, which counts towards the channel's limit.
    fn rows(&self) -> usize;

    /// Returns the number of payload bytes in the unit, which counts towards the channel's limit.
    fn bytes(&self) -> usize;
}

/// Above this number of bytes, memory is allocated exactly and is not kept for the next chunk.
const LARGE: usize = 64 * 1024;

/// A chunk that is being filled. The rows are copied end to end into one allocation, because a row must not keep the
/// socket's read buffer alive, and one allocation per chunk is cheaper than one per row.
#[derive(Debug, Default)]
pub(crate) struct Filling {
    data: Vec<u8>,
    ends: Vec<usize>,
}

impl Filling {
    /// Starts an empty chunk in the memory of a used one. Memory above `LARGE` is freed instead.
    pub(crate) fn reusing(data: Vec<u8>, ends: Vec<usize>) -> Self {
        Self { data: emptied(data), ends: emptied(ends) }
    }

    /// Reserves memory for a chunk of about `rows` rows and `bytes` bytes.
    pub(crate) fn reserve(&mut self, rows: usize, bytes: usize) {
        self.data.reserve(bytes.min(LARGE));
        self.ends.reserve(rows);
    }

    /// Appends a row.
    #[inline]
    pub(crate) fn push(&mut self, row: &[u8]) {
        if row.len() > LARGE {
            // Amortized growth may allocate twice as much as a large row needs.
            self.data.reserve_exact(row.len());
        }
        self.data.extend_from_slice(row);
        self.ends.push(self.data.len());
    }

    /// Adds the first row of the chunk, which must be empty. A row that does not fit into the chunk's memory is not
    /// copied: its own memory becomes the chunk's.
    pub(crate) fn start_with(&mut self, row: Vec<u8>) {
        self.ends.push(row.len());
        if row.len() <= self.data.capacity() {
            self.data.extend_from_slice(&row);
        } else {
            self.data = row;
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn finish(self) -> Chunk {
        Chunk { data: self.data, ends: self.ends }
    }
}

/// Clears `memory` to be used again, or frees it if it is too large to be kept.
fn emptied<T>(mut memory: Vec<T>) -> Vec<T> {
    if memory.capacity() * size_of::<T>() > LARGE {
        return Vec::new();
    }
    memory.clear();
    memory
}

/// Rows on their way to the consumer, in order, stored end to end.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) data: Vec<u8>,
    /// The offset at which each row ends in `data`.
    pub(crate) ends: Vec<usize>,
}

impl Payload for Chunk {
    type Memory = Filling;

    fn rows(&self) -> usize {
        self.ends.len()
    }

    fn bytes(&self) -> usize {
        self.data.len()
    }
}

#[cfg(test)]
impl Chunk {
    pub(crate) fn of(rows: &[&[u8]]) -> Self {
        let mut filling = Filling::default();
        for row in rows {
            filling.push(row);
        }
        filling.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_stored_end_to_end() {
        let chunk = Chunk::of(&[b"1", b"", b"[2, 3]"]);
        assert_eq!((chunk.rows(), chunk.bytes()), (3, 7));
        assert_eq!(
            (chunk.data.as_slice(), chunk.ends.as_slice()),
            (b"1[2, 3]".as_slice(), [1, 1, 7].as_slice())
        );
    }
}
