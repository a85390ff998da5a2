//! A chunk: the rows that travel through the channel together.

use bytes::Bytes;

use crate::error::Error;

/// How SQL NULL reads as JSON.
pub(crate) const NULL: &[u8] = b"null";
/// From here on memory is taken to the byte, not by guess and doubling.
const LARGE: usize = 64 * 1024;

/// A row as the source has it.
pub(crate) trait Payload {
    /// The text of its one JSON column; SQL NULL reads as JSON's.
    fn payload(&self) -> Result<&[u8], Error>;
}

/// A chunk that is being filled. The payloads are copied end to end into one allocation: a row must not
/// keep the socket's read buffer alive, and one allocation a chunk is cheaper than one a row.
#[derive(Debug, Default)]
pub(crate) struct Filling {
    data: Vec<u8>,
    ends: Vec<usize>,
}

impl Filling {
    /// Begins a chunk that will probably be like the one before it.
    pub(crate) fn like(previous: &Chunk) -> Self {
        Self {
            data: Vec::with_capacity(previous.bytes().min(LARGE)),
            ends: Vec::with_capacity(previous.rows()),
        }
    }

    pub(crate) fn push(&mut self, payload: &[u8]) {
        if payload.len() > LARGE {
            // No room to spare, or a megabyte would pin two.
            self.data.reserve_exact(payload.len());
        }
        self.data.extend_from_slice(payload);
        self.ends.push(self.data.len());
    }

    pub(crate) fn rows(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn finish(self) -> Chunk {
        Chunk { data: Bytes::from(self.data), ends: self.ends, next: 0 }
    }
}

/// Rows on their way to the consumer, in order.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    data: Bytes,
    /// Where each row ends in `data`.
    ends: Vec<usize>,
    next: usize,
}

impl Chunk {
    /// Rows not yet taken out by `next`.
    pub(crate) fn rows(&self) -> usize {
        self.ends.len() - self.next
    }

    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Takes the next row's bytes.
    pub(crate) fn next(&mut self) -> Option<Row<'_>> {
        let end = *self.ends.get(self.next)?;
        let start = match self.next {
            0 => 0,
            next => self.ends[next - 1],
        };
        self.next += 1;
        Some(Row { chunk: &self.data, start, end })
    }
}

/// One row of a chunk: its JSON text as Postgres sent it.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    chunk: &'a Bytes,
    start: usize,
    end: usize,
}

impl Row<'_> {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.chunk[self.start..self.end]
    }

    /// The bytes without a copy; they keep the whole chunk alive.
    pub(crate) fn to_bytes(&self) -> Bytes {
        self.chunk.slice(self.start..self.end)
    }

    pub(crate) fn is_null(&self) -> bool {
        self.as_bytes() == NULL
    }
}

#[cfg(test)]
impl Payload for Bytes {
    fn payload(&self) -> Result<&[u8], Error> {
        Ok(self)
    }
}

/// A chunk of these rows, for tests.
#[cfg(test)]
pub(crate) fn of(rows: &[&[u8]]) -> Chunk {
    let mut filling = Filling::default();
    for row in rows {
        filling.push(row);
    }
    filling.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_out_as_they_went_in() {
        let mut chunk = of(&[b"1", b"", b"[2, 3]"]);
        assert_eq!((chunk.rows(), chunk.bytes()), (3, 7));
        assert_eq!(chunk.next().map(|row| row.to_bytes()), Some(Bytes::from_static(b"1")));
        assert_eq!(chunk.next().map(|row| row.to_bytes()), Some(Bytes::new()));
        assert_eq!(chunk.rows(), 1);
        assert_eq!(chunk.next().map(|row| row.to_bytes()), Some(Bytes::from_static(b"[2, 3]")));
        assert!(chunk.next().is_none());
    }
}
