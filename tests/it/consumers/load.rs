//! Consumers under a statement timeout, and more consumers than the runtime has threads for.

use std::time::{Duration, Instant};

use fraiseql_stream::{Error, ErrorKind, RawJson, Stats, Verdict};
use futures_util::StreamExt;
use tokio::task::JoinSet;

use super::sources;
use super::table::{BOTH, Flavor};
use super::ways::Rows;
use crate::server::{SOON, connect, within};

/// Consumes batches at 0.3 ms per row until the stream fails. Returns the error.
async fn consume_batches_until_error(rows: Rows) -> Error {
    let mut batches = rows.ready_chunks(1_000);
    loop {
        let batch = batches.next().await.expect("the stream ended without an error");
        let work = Duration::from_micros(300) * u32::try_from(batch.len()).unwrap();
        if let Some(error) = batch.into_iter().find_map(Result::err) {
            return error;
        }
        tokio::time::sleep(work).await;
    }
}

#[test]
fn statement_timeout_of_a_slow_batching_consumer_is_consumer_bound() {
    // The Unix socket buffers little, so the error arrives soon after the timeout.
    let url = format!("{} options='-c statement_timeout=1000'", sources::socket());
    for flavor in BOTH {
        let error = flavor.runtime().block_on(async {
            let rows = connect(&url).await.into_query("fast").stream().await.unwrap();
            within(SOON, consume_batches_until_error(rows)).await
        });
        let text = error.to_string();
        assert_eq!((error.kind(), error.sqlstate().unwrap().code()), (ErrorKind::Query, "57014"), "{text}");
        let stats = error.stats().unwrap();
        assert_eq!(stats.verdict(), Verdict::ConsumerBound, "{flavor}: {text}, {stats:?}");
        assert!(text.contains("consumer-bound") && !text.contains("runtime"), "{flavor}: {text}");
    }
}

/// Spends 20 us of CPU time on each row until `until`.
async fn spin_for_each(mut rows: Rows, until: Instant) -> Stats {
    while Instant::now() < until {
        rows.next().await.unwrap().unwrap();
        let started = Instant::now();
        while started.elapsed() < Duration::from_micros(20) {
            std::hint::spin_loop();
        }
    }
    rows.stats()
}

#[test]
fn fifty_waiting_streams_on_two_threads_are_not_balanced() {
    let runtime = Flavor::MultiThread.runtime();
    let all: Vec<Stats> = runtime.block_on(async {
        let mut connecting = JoinSet::new();
        for _ in 0..50 {
            connecting.spawn(async { connect(&sources::url()).await.into_query::<RawJson>("fast") });
        }
        let queries = connecting.join_all().await;
        let until = Instant::now() + Duration::from_millis(1_200);
        let mut consumers = JoinSet::new();
        for query in queries {
            consumers.spawn(async move { spin_for_each(query.stream().await.unwrap(), until).await });
        }
        within(SOON, consumers.join_all()).await
    });
    let waits = |stats: &Stats| {
        let shares = stats.shares();
        shares.backlog + shares.source_wait + shares.scheduled > 0.5
    };
    let waiting: Vec<_> = all.iter().filter(|stats| waits(stats)).collect();
    assert!(waiting.len() > 25, "fifty streams share two threads, but only {} of them wait", waiting.len());
    // Their statistics mention the runtime, and most of them wait for a thread longer than for anything else.
    let unnamed = waiting.iter().find(|stats| !stats.to_string().contains("runtime"));
    assert!(unnamed.is_none(), "{unnamed:?}");
    let short_of_threads = waiting.iter().filter(|stats| {
        let shares = stats.shares();
        shares.scheduled > shares.backlog.max(shares.source_wait)
    });
    assert!(short_of_threads.count() * 2 > waiting.len(), "{waiting:?}");
}
