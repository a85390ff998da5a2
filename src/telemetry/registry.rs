//! The live streams of all entities, and what the ended ones have added up to. Observable instruments read
//! from here: their callbacks cannot be taken back, so there is one set of them, and streams come and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use opentelemetry::KeyValue;

use super::database::Database;
use super::ends::{Count, End, Ends};
use crate::channel::{ConsumerState, Nanos, Observer};
use crate::sync::lock;

/// Beyond so many, entities share the series of `OTHER`.
pub(crate) const MOST_ENTITIES: usize = 1_000;
const OTHER: &str = "_OTHER";
/// Stands for the entity in the metrics of a stream that never began: Postgres or this library refused the
/// query, or its future was dropped before Postgres had accepted it. Nothing vouches for such a name, which may
/// be a guess of whoever calls the service, and a series that has begun never ends. Spans have the real name.
pub(super) const REFUSED: &str = "_REFUSED";
/// An entity keeps the attributes of this many databases, so that they are not made for every stream.
const MOST_DATABASES: usize = 8;

pub(super) const STATES: [&str; 5] = ["source_wait", "scheduled", "decode", "consumer", "paused"];
pub(super) const OUTCOMES: [&str; 3] = ["yielded", "filtered", "failed"];

#[derive(Debug)]
pub(super) struct Registry {
    entities: Mutex<HashMap<Arc<str>, Arc<Entity>>>,
    /// Of the streams that Postgres has not accepted.
    refused: Ends,
    overflow_is_logged: AtomicBool,
}

/// One value of the attribute `entity`.
#[derive(Debug)]
pub(super) struct Entity {
    pub(super) attribute: KeyValue,
    streams: Mutex<Streams>,
    ends: Ends,
    /// The databases that it was streamed from last.
    databases: Mutex<Vec<Known>>,
}

/// A database, with the attributes that the entity's `db.client` metrics have there.
#[derive(Debug)]
struct Known {
    database: Arc<Database>,
    attributes: Arc<[KeyValue]>,
}

#[derive(Debug, Default)]
struct Streams {
    live: Vec<Tracked>,
    /// Of the streams that have ended.
    ended: Totals,
    /// The times, and the backlog, that were observed last.
    observed: ([Nanos; 5], Nanos),
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
        let times = stream.gauge.settled_times();
        let busy = times.of(ConsumerState::Overlap) + times.of(ConsumerState::Backlog);
        let progress = &stream.progress;
        Self {
            time: [
                times.of(ConsumerState::SourceWait),
                times.of(ConsumerState::Scheduled),
                times.decode,
                busy - times.decode,
                times.of(ConsumerState::Paused),
            ],
            producer: times.producer,
            backlog: times.of(ConsumerState::Backlog),
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

impl Default for Registry {
    fn default() -> Self {
        Self {
            entities: Mutex::default(),
            refused: Ends::of_refusals(),
            overflow_is_logged: AtomicBool::new(false),
        }
    }
}

impl Registry {
    /// The series of an entity that Postgres has accepted. They begin here and stay, so that none vanishes.
    pub(super) fn entity(&self, name: &Arc<str>) -> Arc<Entity> {
        let mut entities = lock(&self.entities);
        if let Some(entity) = entities.get(name) {
            return Arc::clone(entity);
        }
        let is_full = entities.len() >= MOST_ENTITIES;
        // A relation may have the reserved name.
        let name = if is_full || **name == *REFUSED { Arc::from(OTHER) } else { Arc::clone(name) };
        let entity = entities.entry(name).or_insert_with_key(|name| Arc::new(Entity::new(name)));
        let entity = Arc::clone(entity);
        drop(entities);
        if is_full && !self.overflow_is_logged.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "more than {MOST_ENTITIES} entities are streamed: in metrics, further ones count as entity={OTHER:?}"
            );
        }
        entity
    }

    /// A stream has ended that Postgres has not accepted.
    pub(super) fn refused(&self, end: End<'_>) {
        self.refused.count(end);
    }

    pub(super) fn totals(&self, mut observe: impl FnMut(&KeyValue, &Totals)) {
        for entity in self.all() {
            observe(&entity.attribute, &entity.totals());
        }
    }

    pub(super) fn levels(&self, mut observe: impl FnMut(&KeyValue, &Levels)) {
        for entity in self.all() {
            observe(&entity.attribute, &entity.levels());
        }
    }

    pub(super) fn ends(&self, mut observe: impl FnMut(&KeyValue, &Count)) {
        let mut observe_all = |entity: &KeyValue, ends: &Ends| {
            ends.counts().iter().for_each(|count| observe(entity, count));
        };
        observe_all(&KeyValue::new("entity", REFUSED), &self.refused);
        for entity in self.all() {
            observe_all(&entity.attribute, &entity.ends);
        }
    }

    /// A copy of the list, so that no stream waits for an exporter.
    fn all(&self) -> Vec<Arc<Entity>> {
        lock(&self.entities).values().cloned().collect()
    }
}

impl Entity {
    fn new(name: &Arc<str>) -> Self {
        Self {
            attribute: KeyValue::new("entity", Arc::clone(name)),
            streams: Mutex::default(),
            ends: Ends::of_streams(),
            databases: Mutex::default(),
        }
    }

    /// The attributes of its `db.client` metrics; `schema` is that of the stream's own entity.
    fn attributes(&self, database: &Arc<Database>, schema: Option<&str>) -> Arc<[KeyValue]> {
        let mut databases = lock(&self.databases);
        if let Some(known) = databases.iter().find(|known| known.database == *database) {
            return Arc::clone(&known.attributes);
        }
        let entity = &self.attribute.value;
        // A value that many names share must not be multiplied by their schemas.
        let schema = schema.filter(|_| entity.as_str() != OTHER);
        let attributes = database.attributes(entity, schema);
        if databases.len() == MOST_DATABASES {
            databases.remove(0);
        }
        databases.push(Known { database: Arc::clone(database), attributes: Arc::clone(&attributes) });
        attributes
    }

    fn totals(&self) -> Totals {
        let mut streams = lock(&self.streams);
        let mut sum = streams.ended;
        for tracked in &streams.live {
            sum.add(&Totals::of(&tracked.stream));
        }
        sum.time = clamp_monotonic(&streams.observed.0, sum.time);
        sum.backlog = sum.backlog.max(streams.observed.1);
        streams.observed = (sum.time, sum.backlog);
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

/// The times of `STATES` now, none of them below what was observed before. What time is put down to can change as
/// more is known: decoding is sampled, and whose fault a wait was shows at its end. The sum is exact all the same.
fn clamp_monotonic(before: &[Nanos; 5], now: [Nanos; 5]) -> [Nanos; 5] {
    let mut times: [Nanos; 5] = std::array::from_fn(|state| now[state].max(before[state]));
    let sum = |times: &[Nanos; 5]| times.iter().sum::<Nanos>();
    let mut excess = sum(&times) - sum(&now).max(sum(before));
    let mut states = [0, 1, 2, 3, 4];
    states.sort_by_key(|state| std::cmp::Reverse(times[*state] - before[*state]));
    for state in states {
        let taken = excess.min(times[state] - before[state]);
        times[state] -= taken;
        excess -= taken;
    }
    times
}

impl Tracked {
    /// The stream notes the time of a row only now and then; rows given out since the last look count as
    /// given out now.
    fn since_last_row(&mut self) -> Nanos {
        let (progress, now) = (&self.stream.progress, self.stream.gauge.now());
        let rows = progress.yielded.load(Ordering::Relaxed);
        if rows != self.seen.0 {
            self.seen = (rows, now);
        }
        now.saturating_sub(self.seen.1.max(progress.last_row.load(Ordering::Relaxed)))
    }
}

/// A stream's membership among the live ones.
#[derive(Debug)]
pub(super) struct Live {
    entity: Arc<Entity>,
    stream: Observer,
    /// The attributes of its `db.client` metrics.
    database: Arc<[KeyValue]>,
}

impl Live {
    /// `schema` is that of the stream's own entity, if its name has one.
    pub(super) fn new(
        registry: &Registry,
        stream: &Observer,
        database: &Arc<Database>,
        schema: Option<&str>,
    ) -> Self {
        let entity = registry.entity(&stream.entity);
        lock(&entity.streams).live.push(Tracked { stream: stream.clone(), seen: (0, 0) });
        let database = entity.attributes(database, schema);
        Self { entity, stream: stream.clone(), database }
    }

    /// The attributes of its metrics: one, in a slice.
    pub(super) fn attributes(&self) -> &[KeyValue] {
        std::slice::from_ref(&self.entity.attribute)
    }

    /// Folds the stream into its entity's totals; gives the attributes of its `db.client` metrics.
    pub(super) fn end(self, end: End<'_>) -> Arc<[KeyValue]> {
        let mut streams = lock(&self.entity.streams);
        streams.live.retain(|tracked| !Arc::ptr_eq(&tracked.stream.gauge, &self.stream.gauge));
        streams.ended.add(&Totals::of(&self.stream));
        drop(streams);
        self.entity.ends.count(end);
        self.database
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn database(address: &str) -> Arc<Database> {
        Arc::new(Database::new(address.to_owned(), 5432, Some("shop"), Some("public")))
    }

    fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> Option<Cow<'a, str>> {
        attributes.iter().find(|pair| pair.key.as_str() == key).map(|pair| pair.value.as_str())
    }

    #[test]
    fn a_relation_with_the_reserved_name_counts_as_other() {
        let entity = Registry::default().entity(&Arc::from(REFUSED));
        assert_eq!(entity.attribute.value.as_str(), OTHER);
    }

    #[test]
    fn the_schema_of_a_name_is_in_the_namespace_of_its_own_series_only() {
        let (registry, database) = (Registry::default(), database("one"));
        let namespace = |name: &str| {
            let attributes = registry.entity(&Arc::from(name)).attributes(&database, Some("sales"));
            attribute(&attributes, "db.namespace").map(Cow::into_owned)
        };
        assert_eq!(namespace("sales.orders").as_deref(), Some("shop|sales"));
        assert_eq!(namespace(OTHER).as_deref(), Some("shop|public"));
    }

    #[test]
    fn an_entity_of_many_databases_keeps_the_attributes_of_few_and_finds_all() {
        let entity = Entity::new(&Arc::from("orders"));
        let databases: Vec<_> = (0..3 * MOST_DATABASES).map(|number| database(&number.to_string())).collect();
        for database in databases.iter().chain(&databases) {
            let attributes = entity.attributes(database, None);
            assert_eq!(attribute(&attributes, "server.address").as_deref(), Some(&*database.address));
        }
        assert_eq!(lock(&entity.databases).len(), MOST_DATABASES);
        let again = || entity.attributes(&databases[databases.len() - 1], None);
        assert!(Arc::ptr_eq(&again(), &again()), "they are made once");
    }

    #[test]
    fn what_is_found_out_late_takes_nothing_back_and_changes_no_sum() {
        // By the last look all was the consumer's; now a sample says that 30 of it were decoding.
        assert_eq!(clamp_monotonic(&[5, 0, 10, 50, 0], [6, 1, 40, 25, 2]), [6, 1, 15, 50, 2]);
        assert_eq!(clamp_monotonic(&[5, 0, 10, 50, 0], [6, 1, 40, 55, 2]), [6, 1, 40, 55, 2]);
        // A wait that was the source's so far turns out to be the runtime's.
        assert_eq!(clamp_monotonic(&[50, 0, 0, 0, 0], [20, 40, 0, 0, 0]), [50, 10, 0, 0, 0]);
    }
}
