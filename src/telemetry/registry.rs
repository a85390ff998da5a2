//! `Registry`: the live streams of all entities, and the sums of those that have ended. The observable instruments read
//! from it: their callbacks cannot be unregistered, so one set of them serves all streams.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use opentelemetry::KeyValue;

use super::SCOPE;
use super::database::Database;
use super::ends::{Count, End, Ends};
use crate::channel::{ConsumerState, Nanos, Observer};
use crate::sync::lock;

/// The maximum number of entities with series of their own. Further ones share the series of `OTHER`.
pub(crate) const MAX_ENTITIES: usize = 1_000;
const OTHER: &str = "_OTHER";
/// The entity in the metrics of streams that never began: Postgres or this crate refused the query, or its future was
/// dropped before Postgres had accepted it. Such a name may come from a user of the service and is not known to exist,
/// and a series that has begun is exported forever. Spans have the real name.
pub(super) const REFUSED: &str = "_REFUSED";
/// The maximum number of databases whose attributes an entity caches, so that they are not created for each stream.
const MAX_DATABASES: usize = 8;

pub(super) const STATES: [&str; 5] = ["source_wait", "scheduled", "decode", "consumer", "paused"];
pub(super) const OUTCOMES: [&str; 3] = ["yielded", "filtered", "failed"];

/// What the observable instruments observe.
#[derive(Debug)]
pub(super) struct Registry {
    entities: Mutex<HashMap<Arc<str>, Arc<Entity>>>,
    /// The counts of streams whose query was never accepted.
    refused: Ends,
    overflow_is_logged: AtomicBool,
}

/// One value of the attribute `entity`.
#[derive(Debug)]
pub(super) struct Entity {
    pub(super) attribute: KeyValue,
    streams: Mutex<Streams>,
    ends: Ends,
    /// The cached attributes, oldest first.
    databases: Mutex<Vec<CachedAttributes>>,
}

/// The attributes of an entity's `db.client` metrics for one database.
#[derive(Debug)]
struct CachedAttributes {
    database: Arc<Database>,
    attributes: Arc<[KeyValue]>,
}

#[derive(Debug, Default)]
struct Streams {
    live: Vec<Tracked>,
    /// The sums over the streams that have ended.
    ended: Totals,
    /// The times by state and the backlog, as they were last observed.
    observed: ([Nanos; 5], Nanos),
}

#[derive(Debug)]
struct Tracked {
    stream: Observer,
    /// The number of rows yielded by the last observation that saw a new one, and the time of that observation.
    seen: (u64, Nanos),
}

/// Sums over the streams of one entity. They never decrease.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    /// In the order of `STATES`.
    pub(super) time: [Nanos; 5],
    /// Waiting for the source, and for room in the channel.
    pub(super) producer: [Nanos; 2],
    pub(super) backlog: Nanos,
    /// In the order of `OUTCOMES`.
    pub(super) rows: [u64; 3],
    pub(super) bytes: u64,
}

/// Sums over the live streams of one entity at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Levels {
    pub(super) streams: usize,
    pub(super) rows: usize,
    pub(super) row_limit: usize,
    pub(super) bytes: usize,
    pub(super) byte_limit: usize,
    /// The longest time since the last row of a stream, or since its start if it has had none.
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
    /// Returns the entity of a query that Postgres has accepted. Its series begin here and are never removed, because a
    /// counter must not disappear.
    pub(super) fn entity(&self, name: &Arc<str>) -> Arc<Entity> {
        let mut entities = lock(&self.entities);
        if let Some(entity) = entities.get(name) {
            return Arc::clone(entity);
        }
        let is_full = entities.len() >= MAX_ENTITIES;
        // A relation can have the reserved name.
        let name = if is_full || **name == *REFUSED { Arc::from(OTHER) } else { Arc::clone(name) };
        let entity = entities.entry(name).or_insert_with_key(|name| Arc::new(Entity::new(name)));
        let entity = Arc::clone(entity);
        drop(entities);
        if is_full && !self.overflow_is_logged.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                name: "fraiseql.entities.overflow",
                target: SCOPE,
                "more than {MAX_ENTITIES} entities are streamed: metrics count further ones as entity={OTHER:?}; keep the number of distinct entities small"
            );
        }
        entity
    }

    /// Counts a stream whose query was never accepted.
    pub(super) fn count_refused(&self, end: End<'_>) {
        self.refused.count(end);
    }

    /// Calls `observe` with the sums of each entity.
    pub(super) fn totals(&self, mut observe: impl FnMut(&KeyValue, &Totals)) {
        for entity in self.snapshot() {
            observe(&entity.attribute, &entity.totals());
        }
    }

    /// Calls `observe` with the levels of each entity.
    pub(super) fn levels(&self, mut observe: impl FnMut(&KeyValue, &Levels)) {
        for entity in self.snapshot() {
            observe(&entity.attribute, &entity.levels());
        }
    }

    /// Calls `observe` with each count of ended streams.
    pub(super) fn ends(&self, mut observe: impl FnMut(&KeyValue, &Count)) {
        let mut observe_all = |entity: &KeyValue, ends: &Ends| {
            ends.counts().iter().for_each(|count| observe(entity, count));
        };
        observe_all(&KeyValue::new("entity", REFUSED), &self.refused);
        for entity in self.snapshot() {
            observe_all(&entity.attribute, &entity.ends);
        }
    }

    /// Returns a copy of the list, so that no stream waits for an exporter.
    fn snapshot(&self) -> Vec<Arc<Entity>> {
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

    /// Returns the attributes of its `db.client` metrics. `schema` is that in the name passed to the query, if any.
    fn attributes(&self, database: &Arc<Database>, schema: Option<&str>) -> Arc<[KeyValue]> {
        let mut databases = lock(&self.databases);
        if let Some(cached) = databases.iter().find(|cached| cached.database == *database) {
            return Arc::clone(&cached.attributes);
        }
        let entity = &self.attribute.value;
        // Many names share this entity: with their schemas, it would have a series for each of them.
        let schema = schema.filter(|_| entity.as_str() != OTHER);
        let attributes = database.attributes(entity, schema);
        if databases.len() == MAX_DATABASES {
            databases.remove(0);
        }
        let cached = CachedAttributes { database: Arc::clone(database), attributes: Arc::clone(&attributes) };
        databases.push(cached);
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

/// Returns the times of `STATES`, none of them below what was observed `before`, with the exact sum of `now`. Without
/// this a time could decrease: decoding is estimated from samples, and the cause of a wait is known only at its end, so
/// time may move from one state to another.
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
    /// Returns the time since the last row. The stream stores the time of a row only occasionally, so rows yielded since
    /// the last observation count as yielded now.
    fn since_last_row(&mut self) -> Nanos {
        let (progress, now) = (&self.stream.progress, self.stream.gauge.now());
        let rows = progress.yielded.load(Ordering::Relaxed);
        if rows != self.seen.0 {
            self.seen = (rows, now);
        }
        now.saturating_sub(self.seen.1.max(progress.last_row.load(Ordering::Relaxed)))
    }
}

/// A stream's registration among the live streams of its entity.
#[derive(Debug)]
pub(super) struct Live {
    entity: Arc<Entity>,
    stream: Observer,
    /// The attributes of the stream's `db.client` metrics.
    database: Arc<[KeyValue]>,
}

impl Live {
    /// Registers a stream. `schema` is that in the name passed to the query, if any.
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

    /// Returns the attributes of the stream's own metrics.
    pub(super) fn attributes(&self) -> &[KeyValue] {
        std::slice::from_ref(&self.entity.attribute)
    }

    /// Adds the stream to the sums of its entity and counts how it ended. Returns the attributes of its `db.client`
    /// metrics.
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
    fn relation_with_the_reserved_name_is_recorded_as_other() {
        let entity = Registry::default().entity(&Arc::from(REFUSED));
        assert_eq!(entity.attribute.value.as_str(), OTHER);
    }

    #[test]
    fn schema_of_a_name_is_in_the_namespace_of_its_own_series_only() {
        let (registry, database) = (Registry::default(), database("one"));
        let namespace = |name: &str| {
            let attributes = registry.entity(&Arc::from(name)).attributes(&database, Some("sales"));
            attribute(&attributes, "db.namespace").map(Cow::into_owned)
        };
        assert_eq!(namespace("sales.orders").as_deref(), Some("shop|sales"));
        assert_eq!(namespace(OTHER).as_deref(), Some("shop|public"));
    }

    #[test]
    fn entity_in_many_databases_caches_the_attributes_of_a_few() {
        let entity = Entity::new(&Arc::from("orders"));
        let databases: Vec<_> = (0..3 * MAX_DATABASES).map(|number| database(&number.to_string())).collect();
        for database in databases.iter().chain(&databases) {
            let attributes = entity.attributes(database, None);
            assert_eq!(attribute(&attributes, "server.address").as_deref(), Some(&*database.address));
        }
        assert_eq!(lock(&entity.databases).len(), MAX_DATABASES);
        let again = || entity.attributes(&databases[databases.len() - 1], None);
        assert!(Arc::ptr_eq(&again(), &again()), "attributes are created once");
    }

    #[test]
    fn time_that_moves_between_states_lowers_none_of_them_and_keeps_the_sum() {
        // Counted for the consumer at first; then a sample shows that 30 of it were spent decoding.
        assert_eq!(clamp_monotonic(&[5, 0, 10, 50, 0], [6, 1, 40, 25, 2]), [6, 1, 15, 50, 2]);
        assert_eq!(clamp_monotonic(&[5, 0, 10, 50, 0], [6, 1, 40, 55, 2]), [6, 1, 40, 55, 2]);
        // A wait that was counted for the source turns out to be caused by the runtime.
        assert_eq!(clamp_monotonic(&[50, 0, 0, 0, 0], [20, 40, 0, 0, 0]), [50, 10, 0, 0, 0]);
    }
}
