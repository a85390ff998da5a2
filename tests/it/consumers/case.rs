//! One case of the table: a consumer runs for a while, then its verdict is checked.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fraiseql_stream::{Observer, Shares, Stats};
use tokio::runtime::Runtime;
use tokio::task::{JoinError, JoinSet, yield_now};
use tokio::time::Instant;

use super::sources;
use super::table::{Expected, Flavor, Setting};
use super::ways::{Rows, Way};
use crate::server::{SOON, connect, within};

/// How long a consumer runs.
const RUN_TIME: Duration = Duration::from_millis(800);
/// The maximum number of runs of a case while the machine is too busy for its setting to hold.
const ATTEMPTS: usize = 4;

#[derive(Clone, Copy)]
pub(super) struct Case {
    pub(super) way: Way,
    pub(super) flavor: Flavor,
    pub(super) setting: Setting,
    pub(super) expected: Expected,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {}", self.way.name(), self.setting, self.flavor)
    }
}

/// The outcome of a case.
struct Outcome {
    /// The statistics while the consumer is at work, read by another thread.
    live: Vec<Stats>,
    last: Vec<Stats>,
    /// The share of the time in which hogs blocked the runtime's threads.
    blocked: f64,
    /// The share of the time for which the operating system woke a sleeping thread late.
    late: f64,
    ended: Result<(), JoinError>,
}

impl Case {
    /// Runs the case and returns what is wrong with its outcome, if anything.
    ///
    /// On an overloaded machine, the runtime is starved in every setting. A failure then proves nothing, so the case
    /// is run again; it still passes only with the expected outcome.
    pub(super) fn failure(&self) -> Option<String> {
        let mut failure = None;
        for _ in 0..ATTEMPTS {
            let outcome = self.run();
            let Outcome { blocked, late, .. } = outcome;
            let mismatch = self.mismatch(&outcome)?;
            let state = format!("threads blocked {blocked:.2}, machine late {late:.2}");
            failure = Some(format!("{self}: expected {}, {mismatch}, {state}", self.expected));
            if late < 0.1 {
                break;
            }
        }
        failure
    }

    fn run(&self) -> Outcome {
        let runtime = self.flavor.runtime();
        let streams = runtime.block_on(within(SOON, self.streams()));
        let observers: Vec<_> = streams.iter().map(Rows::observer).collect();
        let read_stats = || observers.iter().map(Observer::stats).collect();
        let started = Instant::now();
        let hogs = Hogs::default();
        if let Setting::Starved(burst) = self.setting {
            hogs.block(&runtime, self.flavor.threads(), burst);
        }
        let consumer = self.way.start(streams, self.setting.work(started + RUN_TIME));
        let ((late, live), ended) = std::thread::scope(|scope| {
            let watch = scope.spawn(|| (lateness(started + RUN_TIME * 7 / 8), read_stats()));
            let ended = runtime.block_on(async { within(SOON, tokio::spawn(consumer)).await });
            (watch.join().unwrap_or_else(|_| panic!("{self}: no live stats")), ended)
        });
        let blocked =
            hogs.stop().as_secs_f64() / self.flavor.threads() as f64 / started.elapsed().as_secs_f64();
        Outcome { live, last: read_stats(), blocked, late, ended }
    }

    /// Starts the streams of the case at the same time.
    async fn streams(&self) -> Vec<Rows> {
        let mut connections = Vec::new();
        for _ in 0..self.way.streams() {
            connections.push(connect(&sources::url()).await);
        }
        let entity = self.setting.source();
        let queries = connections.into_iter().map(|connection| connection.into_query(entity));
        let streams: JoinSet<_> = queries.map(|query| async { query.stream().await }).collect();
        let streams = streams.join_all().await.into_iter();
        streams.map(|stream| stream.unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    fn mismatch(&self, outcome: &Outcome) -> Option<String> {
        if let Err(error) = &outcome.ended {
            return Some(format!("but {error}"));
        }
        if matches!(self.setting, Setting::Starved(_)) && outcome.blocked < 0.75 {
            return Some("but it was not starved".to_owned());
        }
        let live = outcome.live.iter().map(|stats| ("live", stats));
        let mut all = live.chain(outcome.last.iter().map(|stats| ("at the end", stats)));
        let (when, stats) = all.find(|(_, stats)| !self.expected.accepts(stats))?;
        let Shares { backlog, source_wait, scheduled, overlap, .. } = stats.shares();
        let shares = format!(
            "backlog {backlog:.2}, source {source_wait:.2}, scheduled {scheduled:.2}, overlap {overlap:.2}"
        );
        Some(format!("got {:?} {when} ({shares}), {stats}", stats.verdict()))
    }
}

/// Sleeps in short naps until `until`; returns the share of the time for which it was woken late.
fn lateness(until: Instant) -> f64 {
    const NAP: Duration = Duration::from_millis(2);
    let (started, mut late) = (Instant::now(), Duration::ZERO);
    while Instant::now() < until {
        let asleep = Instant::now();
        std::thread::sleep(NAP);
        late += asleep.elapsed().saturating_sub(NAP);
    }
    late.div_duration_f64(started.elapsed())
}

/// Tasks that block the threads of a runtime.
#[derive(Default)]
struct Hogs {
    stop: Arc<AtomicBool>,
    /// The time for which they blocked threads, in nanoseconds.
    blocked: Arc<AtomicU64>,
}

impl Hogs {
    /// Blocks each thread for at least 80 ms between two turns of the runtime's other tasks.
    fn block(&self, runtime: &Runtime, threads: usize, burst: Duration) {
        let turns = 80_u128.div_ceil(burst.as_millis()).max(2);
        for _ in (0..threads).flat_map(|_| 0..turns) {
            runtime.spawn(hog(burst, Arc::clone(&self.stop), Arc::clone(&self.blocked)));
        }
    }

    fn stop(&self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        Duration::from_nanos(self.blocked.load(Ordering::Relaxed))
    }
}

// Dropping a runtime waits until its tasks yield, also during a panic.
impl Drop for Hogs {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn hog(burst: Duration, stop: Arc<AtomicBool>, blocked: Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        // Blocks on purpose: this is the mistake that the verdict must report.
        std::thread::sleep(burst);
        let took = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        blocked.fetch_add(took, Ordering::Relaxed);
        yield_now().await;
    }
}
