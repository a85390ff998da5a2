//! Ways to consume a stream, each as a caller would write it.
//!
//! Each way works on its rows as `Work` says and drops the stream at the work's deadline.

use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use fraiseql_stream::{JsonStream, RawJson, Result};
use futures_util::future::{self, BoxFuture};
use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;
use tokio::task::{block_in_place, spawn_blocking, yield_now};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};

pub(super) type Rows = JsonStream<RawJson>;
pub(super) type Consumer = BoxFuture<'static, ()>;

/// A way to consume, with the name that failures use for it.
#[derive(Clone, Copy)]
pub(super) enum Way {
    /// One stream.
    One(&'static str, fn(Rows, Work) -> Consumer),
    /// Two streams in one task.
    Two(&'static str, fn(Rows, Rows, Work) -> Consumer),
}

impl Way {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::One(name, _) | Self::Two(name, _) => name,
        }
    }

    pub(super) fn streams(self) -> usize {
        match self {
            Self::One(..) => 1,
            Self::Two(..) => 2,
        }
    }

    /// Consumes as many of the streams as the way takes.
    pub(super) fn start(self, mut streams: Vec<Rows>, work: Work) -> Consumer {
        let mut next = || streams.pop().unwrap_or_else(|| panic!("too few streams for {}", self.name()));
        match self {
            Self::One(_, consume) => consume(next(), work),
            Self::Two(_, consume) => consume(next(), next(), work),
        }
    }
}

/// What a consumer does with its rows, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// The time that a row takes; zero for a fast consumer.
    pub(super) each: Duration,
    /// Whether the work blocks its thread, as work on the CPU does.
    pub(super) blocks: bool,
    /// The consumer stops then, even in the middle of a batch.
    pub(super) deadline: Instant,
}

impl Work {
    pub(super) fn has_time_left(&self) -> bool {
        Instant::now() < self.deadline
    }

    /// Works on `rows`.
    async fn on(self, rows: usize) {
        if self.blocks {
            self.block_for(rows);
        } else if !self.each.is_zero() {
            sleep(self.time_for(rows)).await;
        }
    }

    /// Works on `rows` and holds the thread meanwhile.
    fn block_for(self, rows: usize) {
        std::thread::sleep(self.time_for(rows));
    }

    fn time_for(self, rows: usize) -> Duration {
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        (self.each * rows).min(self.deadline.saturating_duration_since(Instant::now()))
    }

    /// The work of one of `workers` that run concurrently. Together they take the same time per row.
    fn shared_by(self, workers: u32) -> Self {
        Self { each: self.each * workers, ..self }
    }
}

fn expect_row(row: Option<Result<RawJson>>) -> RawJson {
    row.unwrap_or_else(|| panic!("the source ended before its consumer"))
        .unwrap_or_else(|error| panic!("{error}"))
}

fn count(batch: Option<Vec<Result<RawJson>>>) -> usize {
    batch.into_iter().flatten().inspect(|row| assert!(row.is_ok(), "{row:?}")).count()
}

pub(super) const NEXT: Way = Way::One("next", |mut rows, work| {
    async move {
        while work.has_time_left() {
            expect_row(rows.next().await);
            work.on(1).await;
        }
    }
    .boxed()
});

/// Takes the next chunk and returns its number of rows.
async fn next_chunk_len(rows: &mut Rows) -> usize {
    let chunk = rows.next_chunk().await.unwrap_or_else(|error| panic!("{error}"));
    chunk.map_or(0, |chunk| chunk.len())
}

pub(super) const NEXT_CHUNK: Way = Way::One("next_chunk", |mut rows, work| {
    async move {
        while work.has_time_left() {
            let count = next_chunk_len(&mut rows).await;
            work.on(count).await;
        }
    }
    .boxed()
});

async fn ready_chunks(rows: Rows, capacity: usize, work: Work) {
    let mut batches = rows.ready_chunks(capacity);
    while work.has_time_left() {
        let count = count(batches.next().await);
        work.on(count).await;
    }
}

pub(super) const READY_CHUNKS_1000: Way =
    Way::One("ready_chunks(1000)", |rows, work| ready_chunks(rows, 1_000, work).boxed());

pub(super) const READY_CHUNKS_5000: Way =
    Way::One("ready_chunks(5000)", |rows, work| ready_chunks(rows, 5_000, work).boxed());

pub(super) const CHUNKS: Way = Way::One("chunks(100)", |rows, work| {
    async move {
        let mut batches = rows.chunks(100);
        while work.has_time_left() {
            let count = count(batches.next().await);
            work.on(count).await;
        }
    }
    .boxed()
});

pub(super) const CHUNKS_TIMEOUT: Way = Way::One("chunks_timeout(100, 20 ms)", |rows, work| {
    async move {
        let limit = Duration::from_millis(20);
        let mut batches = pin!(tokio_stream::StreamExt::chunks_timeout(rows, 100, limit));
        while work.has_time_left() {
            let count = count(batches.next().await);
            work.on(count).await;
        }
    }
    .boxed()
});

/// The pattern in the documentation of `next_ready`.
pub(super) const NEXT_THEN_READY: Way = Way::One("next, then next_ready until empty", |mut rows, work| {
    async move {
        while work.has_time_left() {
            expect_row(rows.next().await);
            let mut taken = 1;
            while let Poll::Ready(Some(row)) = rows.next_ready() {
                expect_row(Some(row));
                taken += 1;
            }
            work.on(taken).await;
        }
    }
    .boxed()
});

pub(super) const SELECT_FLUSH: Way = Way::One("select! with a flush every 20 ms", |mut rows, work| {
    async move {
        let mut flush = interval(Duration::from_millis(20));
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut held = 0;
        while work.has_time_left() {
            tokio::select! {
                row = rows.next() => {
                    expect_row(row);
                    held += 1;
                }
                _ = flush.tick() => work.on(std::mem::take(&mut held)).await,
            }
        }
    }
    .boxed()
});

/// Sends the rows that are ready, then waits for the client, as an HTTP server does with a response body.
pub(super) const RESPONSE_BODY: Way = Way::One("a response body", |mut rows, work| {
    async move {
        while work.has_time_left() {
            let sent = future::poll_fn(|cx| poll_ready_rows(&mut rows, cx)).await;
            work.on(sent).await;
        }
    }
    .boxed()
});

fn poll_ready_rows(rows: &mut Rows, cx: &mut Context<'_>) -> Poll<usize> {
    let mut ready = 0;
    while let Poll::Ready(row) = rows.poll_next_unpin(cx) {
        expect_row(row);
        ready += 1;
    }
    if ready > 0 { Poll::Ready(ready) } else { Poll::Pending }
}

pub(super) const TIMEOUT_AT: Way = Way::One("timeout_at for each row", |mut rows, work| {
    async move {
        while work.has_time_left() {
            let timeout = Instant::now() + Duration::from_millis(3);
            if let Ok(row) = timeout_at(timeout, rows.next()).await {
                expect_row(row);
                work.on(1).await;
            }
        }
    }
    .boxed()
});

pub(super) const BUFFER_UNORDERED: Way = Way::One("buffer_unordered(8)", |rows, work| {
    async move {
        let work = work.shared_by(8);
        let jobs = rows.map(|row| async move {
            expect_row(Some(row));
            work.on(1).await;
        });
        let mut done = pin!(jobs.buffer_unordered(8));
        while work.has_time_left() {
            done.next().await;
        }
    }
    .boxed()
});

pub(super) const FOR_EACH_CONCURRENT: Way = Way::One("try_for_each_concurrent(4)", |rows, work| {
    async move {
        let work = work.shared_by(4);
        let rows = rows.map(|row| Ok(expect_row(Some(row))));
        let all = rows.try_for_each_concurrent(4, |_| async move {
            work.on(1).await;
            if work.has_time_left() { Ok(()) } else { Err("enough") }
        });
        assert_eq!(all.await, Err("enough"), "the source ended before its consumer");
    }
    .boxed()
});

pub(super) const MERGED: Way = Way::Two("two streams merged by select", |one, other, work| {
    async move {
        let mut rows = stream::select(one, other);
        while work.has_time_left() {
            expect_row(rows.next().await);
            work.on(1).await;
        }
    }
    .boxed()
});

pub(super) const JOINED: Way = Way::Two("two streams joined by join!", |one, other, work| {
    let read = move |mut rows: Rows| async move {
        while work.has_time_left() {
            expect_row(rows.next().await);
            work.on(1).await;
        }
    };
    async move {
        tokio::join!(read(one), read(other));
    }
    .boxed()
});

pub(super) const JOINED_READY_CHUNKS: Way =
    Way::Two("two ready_chunks(1000) joined by join!", |one, other, work| {
        async move {
            tokio::join!(ready_chunks(one, 1_000, work), ready_chunks(other, 1_000, work));
        }
        .boxed()
    });

/// Works alongside the stream instead of on its rows. Each burst takes as long as 50 rows.
pub(super) const JOINED_WITH_CPU_WORK: Way = Way::One("join! with bursts of CPU work", |mut rows, work| {
    async move {
        let read = async {
            while work.has_time_left() {
                expect_row(rows.next().await);
            }
        };
        let bursts = async {
            while work.has_time_left() {
                work.block_for(50);
                yield_now().await;
            }
        };
        tokio::join!(read, bursts);
    }
    .boxed()
});

pub(super) const MPSC: Way = Way::One("a worker task behind mpsc::channel(16)", |mut rows, work| {
    async move {
        let (sender, mut receiver) = mpsc::channel(16);
        let worker = tokio::spawn(async move {
            while let Some(row) = receiver.recv().await {
                work.on(1).await;
                drop(row);
            }
        });
        while work.has_time_left() {
            let row = expect_row(rows.next().await);
            sender.send(row).await.unwrap_or_else(|error| panic!("{error}"));
        }
        drop((rows, sender));
        worker.await.unwrap_or_else(|error| panic!("{error}"));
    }
    .boxed()
});

pub(super) const SPAWN_BLOCKING: Way = Way::One("spawn_blocking per ready_chunks(1000)", |rows, work| {
    async move {
        let mut batches = rows.ready_chunks(1_000);
        while work.has_time_left() {
            let count = count(batches.next().await);
            spawn_blocking(move || work.block_for(count)).await.unwrap_or_else(|error| panic!("{error}"));
        }
    }
    .boxed()
});

pub(super) const BLOCK_IN_PLACE: Way = Way::One("block_in_place per ready_chunks(1000)", |rows, work| {
    async move {
        let mut batches = rows.ready_chunks(1_000);
        while work.has_time_left() {
            let count = count(batches.next().await);
            block_in_place(|| work.block_for(count));
        }
    }
    .boxed()
});

/// What a consumer does when it finds no row.
async fn other_work() {
    sleep(Duration::from_millis(1)).await;
}

pub(super) const NEXT_READY: Way = Way::One("next_ready between other work", |mut rows, work| {
    async move {
        while work.has_time_left() {
            match rows.next_ready() {
                Poll::Ready(row) => {
                    expect_row(row);
                    work.on(1).await;
                }
                Poll::Pending => other_work().await,
            }
        }
    }
    .boxed()
});

pub(super) const POLL_IMMEDIATE: Way = Way::One("poll_immediate between other work", |mut rows, work| {
    async move {
        while work.has_time_left() {
            match future::poll_immediate(rows.next()).await {
                Some(row) => {
                    expect_row(row);
                    work.on(1).await;
                }
                None => other_work().await,
            }
        }
    }
    .boxed()
});

pub(super) const NOW_OR_NEVER: Way = Way::One("now_or_never between other work", |mut rows, work| {
    async move {
        while work.has_time_left() {
            match rows.next().now_or_never() {
                Some(row) => {
                    expect_row(row);
                    work.on(1).await;
                }
                None => other_work().await,
            }
        }
    }
    .boxed()
});
