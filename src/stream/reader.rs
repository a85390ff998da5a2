//! `Reader`: takes chunks from the channel, decodes their rows into `T`, and records where the consumer's time goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use super::decode::{CurrentChunk, FromJson, Sampler};
use super::launch::Launch;
use crate::channel::{Chunk, Ended, Nanos, Observer, Occupancy, Payload as _, Progress, Receiver, Taken};
use crate::error::{Error, Result};
use crate::telemetry::{End, PollBatch, Recorder};

/// A condition on decoded rows.
pub(crate) type Predicate<T> = Box<dyn FnMut(&T) -> bool + Send>;

/// The consumer's half of a stream.
pub(crate) struct Reader<T: FromJson> {
    receiver: Receiver<Chunk, Error>,
    chunk: CurrentChunk<T>,
    ended: bool,
    predicate: Option<Predicate<T>>,
    sampler: Sampler,
    pub(crate) observer: Observer,
    recorder: Recorder,
    producing: Producing,
    unseen_failure: Arc<AtomicBool>,
    limit: Option<u64>,
    /// The error that follows the rows last returned by `next_chunk`.
    held: Option<Error>,
    /// The time at which the poll began that waits for a chunk.
    polled: Option<Nanos>,
    /// Whether that poll found the channel empty.
    waited: bool,
    paused: bool,
}

/// Where rows are produced.
enum Producing {
    /// In the polls of this reader.
    ByPolls(Launch),
    /// In a task.
    InTask {
        /// Keeps the heartbeat alive.
        _launch: Launch,
    },
    /// Nowhere, because the stream has ended.
    Ended,
}

/// What a query passes to its stream.
pub(crate) struct Parts<T> {
    pub(crate) receiver: Receiver<Chunk, Error>,
    pub(crate) predicate: Option<Predicate<T>>,
    pub(crate) observer: Observer,
    pub(crate) recorder: Recorder,
    pub(crate) unseen_failure: Arc<AtomicBool>,
    /// The limit of the query, if it has one.
    pub(crate) limit: Option<u64>,
    pub(crate) launch: Launch,
}

impl<T: FromJson> Reader<T> {
    /// Creates the reader of a query that was started.
    pub(crate) fn new(parts: Parts<T>) -> Self {
        Self {
            receiver: parts.receiver,
            chunk: CurrentChunk::default(),
            ended: false,
            predicate: parts.predicate,
            sampler: Sampler::default(),
            observer: parts.observer,
            recorder: parts.recorder,
            producing: Producing::ByPolls(parts.launch),
            unseen_failure: parts.unseen_failure,
            limit: parts.limit,
            held: None,
            polled: None,
            waited: false,
            paused: false,
        }
    }

    /// Returns the next row if it has arrived. Does not count as waiting.
    pub(crate) fn next_ready(&mut self) -> Poll<Option<Result<T>>> {
        self.resume();
        loop {
            if let Some(row) = self.next_buffered() {
                return Poll::Ready(Some(row));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            self.leave_to_task();
            let Some(taken) = self.receiver.try_take() else { return Poll::Pending };
            self.begin_poll();
            if let Some(error) = self.accept(taken) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }

    /// Returns the next row, or waits for it.
    pub(crate) fn poll_row(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        self.resume();
        loop {
            if let Some(row) = self.next_buffered() {
                return Poll::Ready(Some(row));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            // Even if rows are always ready, other tasks must be able to run.
            let Poll::Ready(budget) = tokio::task::coop::poll_proceed(cx) else {
                self.receiver.yield_thread();
                return Poll::Pending;
            };
            let taken = ready!(self.poll_take(cx));
            budget.made_progress();
            if let Some(error) = self.accept(taken) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }

    /// Returns the rest of the current chunk, or waits for the next one. An error that precedes its rows is returned
    /// first.
    pub(crate) async fn next_chunk(&mut self) -> Result<Option<Vec<T>>> {
        let Some(first) = std::future::poll_fn(|cx| self.poll_row(cx)).await.transpose()? else {
            return Ok(None);
        };
        let mut rows = vec![first];
        while let Some(row) = self.next_in_chunk() {
            match row {
                Ok(row) => rows.push(row),
                Err(error) => {
                    self.held = Some(error);
                    break;
                }
            }
        }
        Ok(Some(rows))
    }

    /// Takes all remaining chunks without decoding them.
    pub(crate) async fn drain(&mut self) -> Result<()> {
        self.resume();
        self.held = None;
        while !self.ended {
            let taken = std::future::poll_fn(|cx| self.poll_take(cx)).await;
            if let Some(error) = self.accept(taken) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Declares that the consumer pauses on purpose.
    pub(crate) fn pause(&mut self) {
        self.leave_to_task();
        // A poll that still waits ends here, so that its time does not include the pause.
        (self.polled, self.waited, self.paused) = (None, false, true);
        self.receiver.pause();
    }

    /// Ends a pause, if there is one.
    pub(crate) fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.receiver.resume();
        }
    }

    /// Ends the stream, at its end or before.
    pub(crate) fn end(&mut self) {
        let is_complete = self.is_complete();
        // Closing stops the clocks, so that the times are final when they are recorded.
        self.receiver.close();
        self.recorder.ended(if is_complete { End::Complete } else { End::Dropped });
        self.ended = true;
        self.producing = Producing::Ended;
    }

    /// Returns whether the last row was read. If the query has a limit, its end need not have arrived yet.
    fn is_complete(&self) -> bool {
        let is_last = match self.receiver.peek_end() {
            Some(end) => end == Ended::Complete,
            None => self.limit.is_some_and(|limit| self.chunk.stream_rows() >= limit),
        };
        is_last && self.held.is_none() && self.chunk.is_used_up()
    }

    /// Takes the next chunk or the end, or waits for it.
    fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<Taken<Chunk, Error>> {
        let polled = self.begin_poll();
        if matches!(self.producing, Producing::ByPolls(_)) {
            self.produce(cx);
        }
        let taken = self.receiver.poll_take(cx, polled);
        self.waited |= taken.is_pending();
        taken
    }

    /// Produces rows within this poll.
    #[cold]
    fn produce(&mut self, cx: &mut Context<'_>) {
        if self.waited {
            // This task produces the rows itself, so their arrival must not wake it.
            self.receiver.forget_waker();
        }
        if let Producing::ByPolls(launch) = &self.producing
            && !launch.poll(cx)
        {
            self.leave_to_task();
        }
    }

    /// Moves production into a task, where it does not depend on the polls of this reader.
    fn leave_to_task(&mut self) {
        self.producing = match std::mem::replace(&mut self.producing, Producing::Ended) {
            Producing::ByPolls(launch) => {
                launch.hand_over();
                Producing::InTask { _launch: launch }
            }
            other => other,
        };
    }

    /// Begins a poll for the next chunk, unless one is under way. Returns the time at which it began.
    fn begin_poll(&mut self) -> Nanos {
        if let Some(polled) = self.polled {
            return polled;
        }
        let now = self.observer.gauge.now();
        self.sampler.end(&self.observer, now);
        self.receiver.give_back(self.chunk.recycle());
        self.recorder.polled(now);
        self.polled = Some(now);
        now
    }

    /// Makes a chunk the current one, or ends the stream. Returns the error that ended it, if there is one.
    fn accept(&mut self, taken: Taken<Chunk, Error>) -> Option<Error> {
        let end = match taken {
            Taken::Chunk { chunk, occupancy, came_late, at } => {
                // A consumer that takes rows as soon as it is woken for them had found the channel empty.
                let found_none = std::mem::take(&mut self.waited) && !came_late;
                self.take_chunk(chunk, (occupancy, found_none), at);
                return None;
            }
            Taken::End(end) => end,
            Taken::Lost => Err(Error::lost()),
        };
        self.ended = true;
        self.producing = Producing::Ended;
        let end =
            end.map_err(|error| error.of_entity(&self.observer.entity).with_stats(self.observer.stats()));
        self.recorder.ended(end.as_ref().map_or_else(End::Failed, |()| End::Complete));
        let error = end.err();
        if error.as_ref().is_some_and(|error| error.sqlstate().is_some()) {
            self.unseen_failure.store(false, Ordering::Relaxed);
        }
        error
    }

    fn take_chunk(&mut self, chunk: Chunk, (occupancy, found_none): (Occupancy, bool), now: Nanos) {
        let polled = self.polled.take().unwrap_or(now);
        let found = if found_none { Occupancy::default() } else { occupancy };
        if found_none {
            self.observer.gauge.record_wait(now.saturating_sub(polled));
        }
        let batch = PollBatch {
            rows: chunk.rows(),
            bytes: chunk.bytes(),
            rows_before: found.rows,
            bytes_before: found.bytes,
            rows_after: occupancy.rows - chunk.rows(),
            polled,
        };
        self.recorder.taken(now, &batch);
        self.observer.progress.last_row.store(now, Ordering::Relaxed);
        self.sampler.begin(now);
        self.chunk.replace(chunk);
    }

    /// Returns the next item that does not need the channel.
    #[inline]
    fn next_buffered(&mut self) -> Option<Result<T>> {
        if let Some(error) = self.held.take() {
            return Some(Err(error));
        }
        self.next_in_chunk()
    }

    /// Returns the next row of the current chunk that the predicate accepts, or an error of decoding.
    fn next_in_chunk(&mut self) -> Option<Result<T>> {
        loop {
            let value = self.sampler.decode(&self.observer, &mut self.chunk)?;
            let progress = &self.observer.progress;
            match value {
                Ok(value) if self.predicate.as_mut().is_some_and(|keep| !keep(&value)) => {
                    Progress::count(&progress.filtered);
                }
                Ok(value) => {
                    Progress::count(&progress.yielded);
                    return Some(Ok(value));
                }
                Err(error) => {
                    Progress::count(&progress.failed);
                    return Some(Err(error.of_entity(&self.observer.entity)));
                }
            }
        }
    }
}

impl<T: FromJson> Drop for Reader<T> {
    fn drop(&mut self) {
        self.end();
    }
}

// No field is pinned.
impl<T: FromJson> Unpin for Reader<T> {}
