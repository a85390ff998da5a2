//! Calls on a stream in any order return each row once and in order, and leave a clean connection.

use std::task::Poll;
use std::time::Duration;

use fraiseql_stream::{Connection, Error, ErrorKind, JsonStream, Observer, Stats};
use futures_util::{FutureExt, StreamExt};

use crate::server::{Database, Doc, Random, SOON, connect, trickle, within};

/// The relations have documents 0, 1, 2, ...; those of `odd` that end in 7 do not decode, and `fails` ends with a
/// Postgres error.
fn database() -> Database {
    let odd = "CREATE VIEW odd AS SELECT CASE WHEN i % 10 = 7 THEN '{}' ELSE jsonb_build_object('id', i, 'pad', repeat('x', i % 300)) END AS data FROM generate_series(0, 1499) i;";
    let fails = "CREATE VIEW fails AS SELECT jsonb_build_object('id', i, 'one', 1 / least(1, 700 - i)) AS data FROM generate_series(0, 999) i;";
    let single = "CREATE VIEW single AS SELECT '{\"id\": 0}'::jsonb AS data;";
    let none = "CREATE VIEW empty AS SELECT data FROM single WHERE false;";
    Database::with(&format!("{odd} {fails} {single} {none} {}", trickle("slow", 8, 0.004)))
}

const RELATIONS: [&str; 5] = ["odd", "fails", "single", "empty", "slow"];

/// An item of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Row(u64),
    /// The row with this number does not decode.
    Bad(u64),
    Failure,
    End,
}

impl Item {
    fn of(item: Option<Result<Doc, Error>>) -> Self {
        match item {
            Some(Ok(row)) => Self::Row(row.id),
            Some(Err(error)) => match error.kind() {
                ErrorKind::Decode { row } => Self::Bad(row),
                ErrorKind::Query => Self::Failure,
                _ => panic!("{error}"),
            },
            None => Self::End,
        }
    }
}

/// Returns all items of a relation, without the rows that the predicate rejects.
fn expected(relation: &str, is_filtered: bool) -> Vec<Item> {
    let rows = match relation {
        "odd" => 1500,
        "fails" => 700,
        "single" => 1,
        "empty" => 0,
        _ => 8,
    };
    let row = |id| if relation == "odd" && id % 10 == 7 { Item::Bad(id) } else { Item::Row(id) };
    let passes = |item: &Item| !is_filtered || !matches!(item, Item::Row(id) if id % 3 == 1);
    let end = if relation == "fails" { Item::Failure } else { Item::End };
    (0..rows).map(row).filter(passes).chain([end]).collect()
}

/// A stream and its expected items.
struct Model {
    stream: JsonStream<Doc>,
    expected: Vec<Item>,
    /// The number of items returned so far.
    returned: usize,
    last_elapsed: Duration,
}

impl Model {
    async fn start(db: Connection, random: &mut Random) -> Self {
        let relation = RELATIONS[usize::try_from(random.below(5)).unwrap()];
        let is_filtered = random.below(3) == 0;
        let mut query = db.into_query::<Doc>(relation);
        if is_filtered {
            query = query.where_rust(|row| row.id % 3 != 1);
        }
        if random.below(3) == 0 {
            query = query.chunk_size(1 + usize::try_from(random.below(20)).unwrap());
        }
        if random.below(4) == 0 {
            query = query.max_memory(2000);
        }
        let stream = within(SOON, query.stream()).await.unwrap();
        Self { stream, expected: expected(relation, is_filtered), returned: 0, last_elapsed: Duration::ZERO }
    }

    fn is_over(&self) -> bool {
        self.returned == self.expected.len()
    }

    /// Checks the item that the stream has just returned.
    fn check_item(&mut self, item: Item) {
        let expected = self.expected.get(self.returned).copied().unwrap_or(Item::End);
        assert_eq!(item, expected, "item {} of {:?}", self.returned, self.stream.stats());
        self.returned = self.expected.len().min(self.returned + 1);
    }

    fn check_chunk(&mut self, chunk: Result<Option<Vec<Doc>>, Error>) {
        match chunk {
            Ok(Some(rows)) => {
                assert!(!rows.is_empty());
                for row in rows {
                    self.check_item(Item::of(Some(Ok(row))));
                }
            }
            Ok(None) => self.check_item(Item::End),
            Err(error) => self.check_item(Item::of(Some(Err(error)))),
        }
    }

    async fn step(mut self, random: &mut Random) -> Self {
        match random.below(12) {
            0..=2 => self.next(random.below(150)).await,
            3 => {
                if let Some(item) = self.stream.next().now_or_never() {
                    self.check_item(Item::of(item));
                }
            }
            4 => {
                while let Poll::Ready(Some(row)) = self.stream.next_ready() {
                    self.check_item(Item::of(Some(row)));
                }
            }
            5 => {
                let chunk = within(SOON, self.stream.next_chunk()).await;
                self.check_chunk(chunk);
            }
            6 => {
                if let Some(chunk) = self.stream.next_chunk().now_or_never() {
                    self.check_chunk(chunk);
                }
            }
            7 => self.stream.pause(),
            8 => self.stream.resume(),
            9 => tokio::time::sleep(Duration::from_millis(random.below(15))).await,
            10 => std::thread::sleep(Duration::from_millis(random.below(15))),
            _ => return self.in_another_task(random.below(150)).await,
        }
        self
    }

    async fn next(&mut self, times: u64) {
        for _ in 0..times {
            let item = within(SOON, self.stream.next()).await;
            self.check_item(Item::of(item));
        }
    }

    async fn in_another_task(mut self, times: u64) -> Self {
        let task = async move {
            self.next(times).await;
            self
        };
        tokio::spawn(task).await.unwrap()
    }

    fn check_stats(&mut self) {
        let stats = self.stream.stats();
        assert_adds_up(&stats);
        assert!(stats.elapsed >= self.last_elapsed, "{stats:?}");
        self.last_elapsed = stats.elapsed;
        let returned = &self.expected[..self.returned];
        let rows = returned.iter().filter(|item| matches!(item, Item::Row(_))).count();
        assert_eq!(stats.rows, rows as u64, "{stats:?}");
        if self.is_over() {
            assert!(self.stream.observer().is_ended());
            assert_eq!((stats.buffered_rows, stats.buffered_bytes), (0, 0));
        }
    }

    /// Closes the stream, drains it, reads it to its end, or drops it.
    async fn end(mut self, random: &mut Random) -> Option<Connection> {
        match random.below(4) {
            0 => Some(within(SOON, self.stream.close()).await.unwrap()),
            1 => Some(self.drain().await),
            2 => {
                self.next((self.expected.len() - self.returned) as u64 + 2).await;
                self.check_stats();
                Some(within(SOON, self.stream.close()).await.unwrap())
            }
            _ => None,
        }
    }

    async fn drain(self) -> Connection {
        let fails = !self.is_over() && self.expected.last() == Some(&Item::Failure);
        let (error, db) = match within(SOON, self.stream.drain()).await {
            Ok(db) => (None, db),
            Err(error) => {
                let (error, db) = error.into_parts();
                (Some(error), db)
            }
        };
        assert_eq!(error.is_some(), fails, "{error:?}");
        db
    }
}

fn assert_adds_up(stats: &Stats) {
    let time = &stats.time;
    let sum = time.source_wait + time.scheduled + time.decode + time.consumer + time.paused;
    assert_eq!(sum, stats.elapsed, "{stats:?}");
    assert!(stats.backlog <= time.decode + time.consumer, "{stats:?}");
    for shares in [stats.shares(), stats.recent()] {
        let parts = [shares.backlog, shares.source_wait, shares.scheduled, shares.overlap];
        assert!(parts.iter().all(|part| (0.0..=1.0).contains(part)), "{stats:?}");
        let sum: f64 = parts.iter().sum();
        assert!(sum == 0.0 || (sum - 1.0).abs() < 1e-9, "{stats:?}");
    }
}

/// Checks the statistics from a separate thread until the stream ends.
fn watch(observer: Observer) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut elapsed = Duration::ZERO;
        while !observer.is_ended() {
            let stats = observer.stats();
            assert_adds_up(&stats);
            assert!(stats.elapsed >= elapsed, "from {elapsed:?} back to {stats:?}");
            elapsed = stats.elapsed;
            std::thread::sleep(Duration::from_micros(50));
        }
    })
}

/// Runs streams one after another on one connection, with random calls on each.
async fn call_at_random(url: String, seed: u64, streams: u32) {
    let mut random = Random(seed);
    let mut db = Some(connect(&url).await);
    for _ in 0..streams {
        let connection = match db.take() {
            Some(db) => db,
            None => connect(&url).await,
        };
        let mut model = Model::start(connection, &mut random).await;
        let watcher = (random.below(4) == 0).then(|| watch(model.stream.observer()));
        for _ in 0..random.below(25) {
            model = model.step(&mut random).await;
            model.check_stats();
        }
        db = model.end(&mut random).await;
        if let Some(watcher) = watcher {
            watcher.join().unwrap();
        }
    }
}

const STREAMS: u32 = 40;

async fn call_many_at_random(first_seed: u64) {
    let database = database();
    let tasks: Vec<_> = (first_seed..first_seed + 6)
        .map(|seed| tokio::spawn(call_at_random(database.url.clone(), seed, STREAMS)))
        .collect();
    for (task, seed) in tasks.into_iter().zip(first_seed..) {
        task.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[tokio::test]
async fn calls_in_any_order_return_each_row_once() {
    call_many_at_random(100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn calls_in_any_order_return_each_row_once_on_three_threads() {
    call_many_at_random(200).await;
}
