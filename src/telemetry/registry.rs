//! The live streams of all entities, and what the ended ones have added up to. Observable instruments read
//! from here: their callbacks cannot be taken back, so there is one set of them, and streams come and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opentelemetry::KeyValue;

use crate::ledger::Consumer;
use crate::stats::Observer;
use crate::time::Nanos;

/// Beyond so many, entities share the series of `OTHER`.
const MOST_ENTITIES: usize = 1_000;
const OTHER: &str = "_OTHER";

pub(super) const STATES: [&str; 5] = ["source_wait", "scheduled", "decode", "consumer", "paused"];
const DECODE: usize = 2;
const CONSUMER: usize = 3;
pub(super) const OUTCOMES: [&str; 3] = ["yielded", "filtered", "failed"];

#[derive(Debug, Default)]
pub(super) struct Registry {
    entities: Mutex<HashMap<Arc<str>, Arc<Entity>>>,
    full: AtomicBool,
}

/// One value of the attribute `entity`.
#[derive(Debug)]
pub(super) struct Entity {
    pub(super) attribute: KeyValue,
    streams: Mutex<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    live: Vec<Tracked>,
    /// Of the streams that have ended.
    ended: Totals,
    /// What was told last.
    told: [Nanos; 5],
}

#[derive(Debug)]
struct Tracked {
    stream: Observer,
    /// The rows given out at the last look, and when that was.
    seen: (u64, Nanos),
}

/// Sums that only grow, over the streams of one entity.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    /// In the order of `STATES`.
    pub(super) time: [Nanos; 5],
    /// Source and room.
    pub(super) producer: [Nanos; 2],
    pub(super) backlog: Nanos,
    /// In the order of `OUTCOMES`.
    pub(super) rows: [u64; 3],
    pub(super) bytes: u64,
}

/// What the live streams of one entity hold at this moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Levels {
    pub(super) streams: usize,
    pub(super) rows: usize,
    pub(super) row_limit: usize,
    pub(super) bytes: usize,
    pub(super) byte_limit: usize,
    /// The longest time since a row, or since the start, over the live streams.
    pub(super) since_last_row: Nanos,
}

impl Totals {
    fn of(stream: &Observer) -> Self {
        let times = stream.gauge.ledger.read();
        let busy = times.of(Consumer::Overlap) + times.of(Consumer::Backlog);
        let progress = &stream.progress;
        Self {
            time: [
                times.of(Consumer::SourceWait),
                times.of(Consumer::Scheduled),
                times.decode,
                busy - times.decode,
                times.of(Consumer::Paused),
            ],
            producer: times.producer,
            backlog: times.of(Consumer::Backlog),
            rows: [&progress.yielded, &progress.filtered, &progress.failed]
                .map(|rows| rows.load(Ordering::Relaxed)),
            bytes: stream.gauge.received_bytes(),
        }
    }

    fn add(&mut self, more: &Self) {
        let add =
            |sums: &mut [u64], more: &[u64]| sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        add(&mut self.time, &more.time);
        add(&mut self.producer, &more.producer);
        add(&mut self.rows, &more.rows);
        self.backlog += more.backlog;
        self.bytes += more.bytes;
    }
}

impl Registry {
    /// The series of an entity; an entity once seen stays, so that no series vanishes.
    pub(super) fn entity(&self, name: &Arc<str>) -> Arc<Entity> {
        let mut entities = lock(&self.entities);
        if let Some(entity) = entities.get(name) {
            return Arc::clone(entity);
        }
        let name = if entities.len() < MOST_ENTITIES { Arc::clone(name) } else { self.overflow() };
        let entity = || {
            Arc::new(Entity {
                attribute: KeyValue::new("entity", Arc::clone(&name)),
                streams: Mutex::default(),
            })
        };
        Arc::clone(entities.entry(Arc::clone(&name)).or_insert_with(entity))
    }

    fn overflow(&self) -> Arc<str> {
        if !self.full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "more than {MOST_ENTITIES} entities are streamed: in metrics, further ones count as entity={OTHER:?}"
            );
        }
        Arc::from(OTHER)
    }

    pub(super) fn totals(&self, mut tell: impl FnMut(&KeyValue, &Totals)) {
        for entity in self.all() {
            tell(&entity.attribute, &entity.totals());
        }
    }

    pub(super) fn levels(&self, mut tell: impl FnMut(&KeyValue, &Levels)) {
        for entity in self.all() {
            tell(&entity.attribute, &entity.levels());
        }
    }

    /// A copy of the list, so that no stream waits for an exporter.
    fn all(&self) -> Vec<Arc<Entity>> {
        lock(&self.entities).values().cloned().collect()
    }
}

impl Entity {
    fn totals(&self) -> Totals {
        let mut streams = lock(&self.streams);
        let mut sum = streams.ended;
        for tracked in &streams.live {
            sum.add(&Totals::of(&tracked.stream));
        }
        sum.time = onwards(&streams.told, sum.time);
        streams.told = sum.time;
        sum
    }

    fn levels(&self) -> Levels {
        let mut levels = Levels::default();
        for tracked in &mut lock(&self.streams).live {
            let gauge = &tracked.stream.gauge;
            levels.streams += 1;
            levels.rows += gauge.rows();
            levels.row_limit = levels.row_limit.saturating_add(gauge.row_limit);
            levels.bytes += gauge.bytes();
            levels.byte_limit = levels.byte_limit.saturating_add(gauge.byte_limit);
            levels.since_last_row = levels.since_last_row.max(tracked.since_last_row());
        }
        levels
    }
}

/// The times of `STATES` now, none of them below what was told before: decoding is sampled, and a sample moves
/// moments from `consumer` to `decode`. Their sum, the time in which rows were held, is exact all the same.
fn onwards(told: &[Nanos; 5], now: [Nanos; 5]) -> [Nanos; 5] {
    let mut times: [Nanos; 5] = std::array::from_fn(|state| now[state].max(told[state]));
    let held = (now[DECODE] + now[CONSUMER]).max(told[DECODE] + told[CONSUMER]);
    times[DECODE] = now[DECODE].clamp(told[DECODE], held - told[CONSUMER]);
    times[CONSUMER] = held - times[DECODE];
    times
}

impl Tracked {
    /// The stream notes the time of a row only now and then; rows given out since the last look count as
    /// given out now.
    fn since_last_row(&mut self) -> Nanos {
        let (progress, now) = (&self.stream.progress, self.stream.gauge.ledger.now());
        let rows = progress.yielded.load(Ordering::Relaxed);
        if rows != self.seen.0 {
            self.seen = (rows, now);
        }
        now.saturating_sub(self.seen.1.max(progress.last_row.load(Ordering::Relaxed)))
    }
}

/// A stream's membership among the live ones; dropped, it is folded into the entity's totals.
#[derive(Debug)]
pub(super) struct Live {
    entity: Arc<Entity>,
    stream: Observer,
}

impl Live {
    pub(super) fn new(entity: Arc<Entity>, stream: Observer) -> Self {
        let tracked = Tracked { stream: stream.clone(), seen: (0, 0) };
        lock(&entity.streams).live.push(tracked);
        Self { entity, stream }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let mut streams = lock(&self.entity.streams);
        streams.live.retain(|tracked| !Arc::ptr_eq(&tracked.stream.gauge, &self.stream.gauge));
        streams.ended.add(&Totals::of(&self.stream));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_sample_of_decoding_takes_nothing_back_and_changes_no_sum() {
        // By the last look all was the consumer's; now a sample says that 30 of it were decoding.
        assert_eq!(onwards(&[5, 0, 10, 50, 0], [6, 1, 40, 25, 2]), [6, 1, 15, 50, 2]);
        assert_eq!(onwards(&[5, 0, 10, 50, 0], [6, 1, 40, 55, 2]), [6, 1, 40, 55, 2]);
    }
}
