//! `Serialize` for statistics: durations in seconds, verdicts under the names that metrics use.

use serde::ser::{Serialize, SerializeStruct as _, Serializer};

use super::stats::{ProducerTime, Stats, StreamTime};
use super::verdict::{Shares, Verdict};

/// Serializes as a map. Durations are in seconds, and shares are between 0 and 1. `verdict` and `recent_verdict` are
/// the verdicts on `shares` and `recent_shares`, under the names of [`Verdict::as_str`].
///
/// # Examples
///
/// ```no_run
/// # fn example(orders: fraiseql_stream::JsonStream<serde_json::Value>) {
/// let stats = orders.stats();
/// let json = serde_json::to_value(&stats).unwrap();
/// assert_eq!(json["time_seconds"]["source_wait"], stats.time.source_wait.as_secs_f64());
/// assert_eq!(json["verdict"], stats.verdict().as_str());
/// # }
/// ```
impl Serialize for Stats {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_struct("Stats", 18)?;
        map.serialize_field("entity", &*self.entity)?;
        map.serialize_field("elapsed_seconds", &self.elapsed.as_secs_f64())?;
        map.serialize_field("rows", &self.rows)?;
        map.serialize_field("filtered", &self.filtered)?;
        map.serialize_field("failed", &self.failed)?;
        map.serialize_field("bytes", &self.bytes)?;
        map.serialize_field("buffered_rows", &self.buffered_rows)?;
        map.serialize_field("buffered_bytes", &self.buffered_bytes)?;
        map.serialize_field("peak_bytes", &self.peak_bytes)?;
        map.serialize_field("row_limit", &self.row_limit)?;
        map.serialize_field("byte_limit", &self.byte_limit)?;
        map.serialize_field("time_seconds", &self.time)?;
        map.serialize_field("producer_time_seconds", &self.producer_time)?;
        map.serialize_field("backlog_seconds", &self.backlog.as_secs_f64())?;
        map.serialize_field("shares", &self.shares())?;
        map.serialize_field("verdict", &self.verdict())?;
        map.serialize_field("recent_shares", &self.recent())?;
        map.serialize_field("recent_verdict", &self.recent().verdict())?;
        map.end()
    }
}

/// Serializes as a map of durations in seconds.
impl Serialize for StreamTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_struct("StreamTime", 5)?;
        map.serialize_field("source_wait", &self.source_wait.as_secs_f64())?;
        map.serialize_field("scheduled", &self.scheduled.as_secs_f64())?;
        map.serialize_field("decode", &self.decode.as_secs_f64())?;
        map.serialize_field("consumer", &self.consumer.as_secs_f64())?;
        map.serialize_field("paused", &self.paused.as_secs_f64())?;
        map.end()
    }
}

/// Serializes as a map of durations in seconds.
impl Serialize for ProducerTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_struct("ProducerTime", 2)?;
        map.serialize_field("source", &self.source.as_secs_f64())?;
        map.serialize_field("room", &self.room.as_secs_f64())?;
        map.end()
    }
}

/// Serializes as a map of numbers between 0 and 1.
///
/// # Examples
///
/// ```
/// use fraiseql_stream::Shares;
///
/// let mut shares = Shares::default();
/// (shares.backlog, shares.overlap) = (0.75, 0.25);
/// let json = serde_json::to_value(shares).unwrap();
/// assert_eq!(json, serde_json::json!({ "backlog": 0.75, "source_wait": 0.0, "scheduled": 0.0, "overlap": 0.25 }));
/// ```
impl Serialize for Shares {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_struct("Shares", 4)?;
        map.serialize_field("backlog", &self.backlog)?;
        map.serialize_field("source_wait", &self.source_wait)?;
        map.serialize_field("scheduled", &self.scheduled)?;
        map.serialize_field("overlap", &self.overlap)?;
        map.end()
    }
}

/// Serializes as the string that [`Verdict::as_str`] returns.
///
/// # Examples
///
/// ```
/// use fraiseql_stream::Verdict;
///
/// assert_eq!(serde_json::to_value(Verdict::SourceBound).unwrap(), "source_bound");
/// ```
impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use crate::Observer;

    #[test]
    fn stats_serialize_with_times_in_seconds_and_the_verdict() {
        let (observer, now) = Observer::manual("orders");
        now.store(1_500_000_000, std::sync::atomic::Ordering::Relaxed);
        let json = serde_json::to_value(observer.stats()).unwrap();
        assert_eq!(json["entity"], "orders");
        assert_eq!(json["elapsed_seconds"], 1.5);
        assert_eq!(json["time_seconds"]["consumer"], 1.5);
        assert_eq!(json["producer_time_seconds"]["source"], 1.5);
        assert_eq!(json["shares"]["overlap"], 1.0);
        assert_eq!(json["verdict"], "balanced");
        assert_eq!(json.as_object().unwrap().len(), 18);
    }
}
