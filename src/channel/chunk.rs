//! A chunk: the rows that travel through the channel together.

/// What a channel carries.
pub(crate) trait Payload {
    /// The memory of a payload that was used up.
    type Memory: Default;

    fn rows(&self) -> usize;
    fn bytes(&self) -> usize;
}

/// From here on memory is taken to the byte, not by guess and doubling.
const LARGE: usize = 64 * 1024;

/// A chunk that is being filled. The payloads are copied end to end into one allocation: a row must not
/// keep the socket's read buffer alive, and one allocation a chunk is cheaper than one a row.
#[derive(Debug, Default)]
pub(crate) struct Filling {
    data: Vec<u8>,
    ends: Vec<usize>,
}

impl Filling {
    /// Uses the memory of a chunk that is done with once more; what is too large to be kept is freed.
    pub(crate) fn again(data: Vec<u8>, ends: Vec<usize>) -> Self {
        Self { data: emptied(data), ends: emptied(ends) }
    }

    /// Makes room for a chunk that will probably be like one of so many rows and bytes.
    pub(crate) fn expect(&mut self, rows: usize, bytes: usize) {
        self.data.reserve(bytes.min(LARGE));
        self.ends.reserve(rows);
    }

    #[inline]
    pub(crate) fn push(&mut self, payload: &[u8]) {
        if payload.len() > LARGE {
            // No room to spare, or a megabyte would pin two.
            self.data.reserve_exact(payload.len());
        }
        self.data.extend_from_slice(payload);
        self.ends.push(self.data.len());
    }

    /// Begins with a row that was set aside before; where it is large, its memory is used on.
    pub(crate) fn adopt(&mut self, row: Vec<u8>) {
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

fn emptied<T>(mut memory: Vec<T>) -> Vec<T> {
    if memory.capacity() * size_of::<T>() > LARGE {
        return Vec::new();
    }
    memory.clear();
    memory
}

/// Rows on their way to the consumer, in order, end to end.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) data: Vec<u8>,
    /// Where each row ends in `data`.
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
    fn rows_lie_end_to_end() {
        let chunk = Chunk::of(&[b"1", b"", b"[2, 3]"]);
        assert_eq!((chunk.rows(), chunk.bytes()), (3, 7));
        assert_eq!(
            (chunk.data.as_slice(), chunk.ends.as_slice()),
            (b"1[2, 3]".as_slice(), [1, 1, 7].as_slice())
        );
    }
}
