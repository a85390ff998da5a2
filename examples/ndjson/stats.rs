//! The statistics as a line of JSON (`--stats`).

use std::convert::Infallible;
use std::time::Duration;

use fraiseql_stream::{Observer, Shares, Stats};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::sink::Sink;

/// Writes statistics every second, whatever the stream and its consumer are doing.
pub(crate) async fn write_every_second(stream: &Observer, errors: &mut Sink) -> Infallible {
    let second = Duration::from_secs(1);
    let mut seconds = interval_at(Instant::now() + second, second);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        seconds.tick().await;
        errors.line(line(stream).as_bytes());
        // If standard error is closed, there is nowhere to report it.
        let _ = errors.flush().await;
    }
}

pub(crate) fn line(stream: &Observer) -> String {
    // Read first, so that `ended: true` guarantees final figures.
    let ended = stream.is_ended();
    let stats = stream.stats();
    json!({
        "entity": &*stats.entity,
        "ended": ended,
        "elapsed_seconds": stats.elapsed.as_secs_f64(),
        "rows": stats.rows,
        "bytes": stats.bytes,
        "buffered_rows": stats.buffered_rows,
        "buffered_bytes": stats.buffered_bytes,
        "peak_bytes": stats.peak_bytes,
        "row_limit": stats.row_limit,
        "byte_limit": stats.byte_limit,
        "time": time(&stats),
        "producer_time": {
            "source": stats.producer_time.source.as_secs_f64(),
            "room": stats.producer_time.room.as_secs_f64(),
        },
        "backlog_seconds": stats.backlog.as_secs_f64(),
        "shares": shares(&stats.shares()),
        "verdict": stats.verdict().as_str(),
        "recent_shares": shares(&stats.recent()),
        "recent_verdict": stats.recent().verdict().as_str(),
    })
    .to_string()
}

fn time(stats: &Stats) -> Value {
    json!({
        "source_wait": stats.time.source_wait.as_secs_f64(),
        "scheduled": stats.time.scheduled.as_secs_f64(),
        "decode": stats.time.decode.as_secs_f64(),
        "consumer": stats.time.consumer.as_secs_f64(),
        "paused": stats.time.paused.as_secs_f64(),
    })
}

fn shares(shares: &Shares) -> Value {
    json!({
        "backlog": shares.backlog,
        "source_wait": shares.source_wait,
        "scheduled": shares.scheduled,
        "overlap": shares.overlap,
    })
}
