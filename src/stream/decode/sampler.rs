//! `Sampler`: measures the time that decoding takes.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{CurrentChunk, FromJson};
use crate::channel::{Nanos, Observer};
use crate::error::Error;

/// Estimates decoding time from samples: reading the clock twice per row would cost a tenth of decoding a small one.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// The last sample: a decoding time and the number of bytes decoded in it.
    sample: (Nanos, usize),
    /// The number of bytes decoded since that sample.
    since: usize,
    /// The number of bytes after which the next sample is taken.
    interval: usize,
    /// The number of bytes that were decoded and whose time is not recorded yet.
    bytes: usize,
    /// The time for which the consumer had a chunk while it decoded them, up to `at`.
    held: Nanos,
    at: Nanos,
    /// The number of rows since `at`.
    rows: u64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self { sample: (0, 1), since: 0, interval: Self::FIRST_INTERVAL, bytes: 0, held: 0, at: 0, rows: 0 }
    }
}

impl Sampler {
    /// The number of bytes between two samples.
    const INTERVAL: usize = 8192;
    /// The number of bytes before the first sample. It is small so that short streams have one, but not 0, because a
    /// small first row finds cold caches.
    const FIRST_INTERVAL: usize = 512;
    /// The time per row above which reading the clock for each row costs next to nothing.
    const SLOW_ROW: Nanos = 10_000;

    /// Records that the consumer took a chunk.
    pub(crate) fn begin(&mut self, now: Nanos) {
        if self.bytes == 0 {
            // The time since the previous chunk was spent waiting.
            self.held = 0;
        }
        (self.at, self.rows) = (now, 0);
    }

    /// Records that the chunk is used up, and that the consumer waits from here on.
    pub(crate) fn end(&mut self, stream: &Observer, now: Nanos) {
        self.hold(now);
        if self.sample.0 > 0 {
            self.record(stream);
        }
    }

    /// Decodes the next row of the chunk. Returns `None` if all of them were read.
    pub(crate) fn decode<T: FromJson>(
        &mut self,
        stream: &Observer,
        chunk: &mut CurrentChunk<T>,
    ) -> Option<Result<T, Error>> {
        let row = chunk.next()?;
        self.since += row.len();
        self.bytes += row.len();
        self.rows += 1;
        if self.since >= self.interval {
            return Some(self.measure(stream, chunk, row));
        }
        Some(chunk.decode(row))
    }

    /// Decodes a row and takes a sample.
    #[cold]
    fn measure<T: FromJson>(
        &mut self,
        stream: &Observer,
        chunk: &CurrentChunk<T>,
        row: Range<usize>,
    ) -> Result<T, Error> {
        let (gauge, size) = (&stream.gauge, row.len().max(1));
        let start = gauge.now();
        let value = chunk.decode(row);
        let end = gauge.now();
        stream.progress.last_row.store(end, Ordering::Relaxed);
        let is_slow = end.saturating_sub(self.at) / self.rows > Self::SLOW_ROW;
        (self.since, self.interval) = (0, if is_slow { 0 } else { Self::INTERVAL });
        self.sample = (end - start, size);
        self.hold(end);
        self.record(stream);
        value
    }

    /// Adds the time up to `now` to `held`.
    fn hold(&mut self, now: Nanos) {
        self.held += now.saturating_sub(self.at);
        (self.at, self.rows) = (now, 0);
    }

    /// Records the decoding time of all bytes since the last record, in proportion to the last sample. It is at most the
    /// time that has passed, because the thread may have lost its core during the sample.
    fn record(&mut self, stream: &Observer) {
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
    use crate::channel::Chunk;

    thread_local! {
        static HAND: RefCell<Arc<AtomicU64>> = RefCell::default();
    }

    /// A JSON number that takes its value in nanoseconds to decode.
    struct Slow;

    impl<'de> Deserialize<'de> for Slow {
        fn deserialize<D: Deserializer<'de>>(number: D) -> Result<Self, D::Error> {
            let nanos = u64::deserialize(number)?;
            HAND.with_borrow(|hand| hand.fetch_add(nanos, Ordering::Relaxed));
            Ok(Self)
        }
    }

    /// Decodes the rows of one chunk, and returns the decoding time that is recorded.
    fn decode_time(rows: &[&[u8]]) -> Nanos {
        let (stream, hand) = Observer::manual("t");
        HAND.set(hand);
        let (mut sampler, mut chunk) = (Sampler::default(), CurrentChunk::<Slow>::default());
        chunk.replace(Chunk::of(rows));
        while let Some(row) = sampler.decode(&stream, &mut chunk) {
            row.unwrap();
        }
        sampler.end(&stream, stream.gauge.now());
        stream.gauge.decode_time()
    }

    #[test]
    fn recorded_time_is_at_most_the_time_that_has_passed() {
        let long = format!("{:>1$}", 3_000, Sampler::FIRST_INTERVAL - 5);
        // As if the thread lost its core during the sample.
        assert_eq!(decode_time(&[long.as_bytes(), b"50000"]), 53_000);
    }

    #[test]
    fn decoding_of_a_short_stream_is_recorded() {
        let row = format!("{:>100}", 200);
        assert_eq!(decode_time(&[row.as_bytes(); 20]), 20 * 200);
    }
}
