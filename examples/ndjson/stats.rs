//! The statistics as a line of JSON (`--stats`).

use std::convert::Infallible;
use std::time::Duration;

use fraiseql_stream::Observer;
use serde_json::json;
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
    let mut line = json!(stream.stats());
    line["ended"] = ended.into();
    line.to_string()
}
