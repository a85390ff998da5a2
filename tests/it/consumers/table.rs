//! The table's axes - settings, kinds of runtime, expected outcomes - and how its cases are run.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fraiseql_stream::{Shares, Stats, Verdict};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use super::case::Case;
use super::ways::{Way, Work};

/// The number of cases of a test that run at once, which is possible because they sleep nearly all the time.
const LANES: usize = 4;
const WORKERS: usize = 2;

#[derive(Clone, Copy, Debug)]
pub(super) enum Flavor {
    CurrentThread,
    MultiThread,
}

pub(super) const BOTH: [Flavor; 2] = [Flavor::CurrentThread, Flavor::MultiThread];

impl Flavor {
    pub(super) fn runtime(self) -> Runtime {
        let mut builder = match self {
            Self::CurrentThread => Builder::new_current_thread(),
            Self::MultiThread => Builder::new_multi_thread(),
        };
        builder.worker_threads(WORKERS).enable_all().build().unwrap_or_else(|error| panic!("{error}"))
    }

    pub(super) fn threads(self) -> usize {
        match self {
            Self::CurrentThread => 1,
            Self::MultiThread => WORKERS,
        }
    }
}

impl fmt::Display for Flavor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CurrentThread => "current-thread",
            Self::MultiThread => "multi-thread",
        })
    }
}

/// Which side is slow, and how.
#[derive(Clone, Copy, Debug)]
pub(super) enum Setting {
    /// A fast source, and a consumer that sleeps this long per row.
    Sleeping(Duration),
    /// The same, but the consumer blocks its thread.
    Blocking(Duration),
    /// A fast consumer, and a slow source of this name.
    SlowSource(&'static str),
    /// Both are fast, but other tasks block the runtime's threads for this long at a time.
    Starved(Duration),
}

pub(super) const SPEEDS: [Duration; 3] =
    [Duration::from_micros(300), Duration::from_millis(1), Duration::from_millis(4)];
pub(super) const SLEEPING: [Setting; 3] =
    [Setting::Sleeping(SPEEDS[0]), Setting::Sleeping(SPEEDS[1]), Setting::Sleeping(SPEEDS[2])];
pub(super) const BLOCKING: [Setting; 3] =
    [Setting::Blocking(SPEEDS[0]), Setting::Blocking(SPEEDS[1]), Setting::Blocking(SPEEDS[2])];
pub(super) const SLOW_SOURCES: [Setting; 2] =
    [Setting::SlowSource("every_1_ms"), Setting::SlowSource("every_5_ms")];
pub(super) const EVERY_10_MS: Setting = Setting::SlowSource("every_10_ms");

impl Setting {
    pub(super) fn source(self) -> &'static str {
        match self {
            Self::SlowSource(entity) => entity,
            _ => "fast",
        }
    }

    pub(super) fn work(self, deadline: Instant) -> Work {
        match self {
            Self::Sleeping(each) => Work { each, blocks: false, deadline },
            Self::Blocking(each) => Work { each, blocks: true, deadline },
            Self::SlowSource(_) | Self::Starved(_) => Work { each: Duration::ZERO, blocks: false, deadline },
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sleeping(each) => write!(f, "{each:?} of sleep per row"),
            Self::Blocking(each) => write!(f, "{each:?} of blocking work per row"),
            Self::SlowSource(entity) => write!(f, "the source {entity}"),
            Self::Starved(burst) => write!(f, "a runtime starved in bursts of {burst:?}"),
        }
    }
}

/// The outcomes that a case accepts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expected {
    /// Exactly this verdict.
    Is(Verdict),
    /// The consumer is busy nearly all of the time. If it blocks the only thread, rows pile up in the socket, not in
    /// the channel, so nothing shows whether any row waits. `Balanced` by overlap is correct as well then.
    Busy,
    /// Any verdict that does not name the source. Whether the consumer or the runtime is late cannot be known if a
    /// waiting consumer itself blocks the only thread, or if a starved runtime delays a timer or a task that the
    /// consumer waits for.
    NotTheSource,
}

impl Expected {
    pub(super) fn accepts(self, stats: &Stats) -> bool {
        let Shares { backlog, source_wait, overlap, .. } = stats.shares();
        let nobody_waits = stats.verdict() == Verdict::Balanced && overlap > 0.5;
        match self {
            Self::Is(verdict) => stats.verdict() == verdict,
            Self::Busy => {
                backlog + overlap > 0.8 && (stats.verdict() == Verdict::ConsumerBound || nobody_waits)
            }
            Self::NotTheSource => source_wait < 0.5 && (stats.verdict() != Verdict::Balanced || nobody_waits),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(verdict) => write!(f, "{verdict:?}"),
            Self::Busy => f.write_str("ConsumerBound, or Balanced by overlap"),
            Self::NotTheSource => f.write_str("anything but the source"),
        }
    }
}

/// Every way in every setting on each kind of runtime.
pub(super) fn cases(flavors: &[Flavor], ways: &[Way], settings: &[Setting], expected: Expected) -> Vec<Case> {
    let mut cases = Vec::new();
    for &flavor in flavors {
        for &way in ways {
            cases.extend(settings.iter().map(|&setting| Case { way, flavor, setting, expected }));
        }
    }
    cases
}

/// Runs all cases, then fails with a list of those that failed.
pub(super) fn check(cases: &[Case]) {
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let lane = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let failure = case.failure();
            failures.lock().unwrap_or_else(PoisonError::into_inner).extend(failure);
        }
    };
    std::thread::scope(|scope| (0..LANES).for_each(|_| drop(scope.spawn(lane))));
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (failed, all) = (failures.len(), cases.len());
    assert!(failures.is_empty(), "{failed} failures in {all} cases:\n{}", failures.join("\n"));
}
