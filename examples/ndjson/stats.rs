//! `--stats`: how the stream does, as a line of JSON.

use std::convert::Infallible;
use std::time::Duration;

use fraiseql_stream::{Observer, Shares, Stats};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::sink::Sink;

/// Tells every second, whatever the stream and its consumer are doing.
pub(crate) async fn every_second(stream: &Observer, errors: &mut Sink) -> Infallible {
    let second = Duration::from_secs(1);
    let mut seconds = interval_at(Instant::now() + second, second);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        seconds.tick().await;
        errors.line(line(stream).as_bytes());
        // Nobody is left to be told that nobody reads this.
        let _ = errors.flush().await;
    }
}

pub(crate) fn line(stream: &Observer) -> String {
    // Asked first: an end that is told is an end whose figures are final.
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
