//! Runs a mode in a process of its own, so that all its threads are counted and no mode affects the next.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike as _};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::mode::Mode;
use crate::peers::{Peer, Raw, RawBytes, RawPrepared, Sqlx, Stream, StreamBytes, Wire};
use crate::plan::WarmUp;
use crate::{Failure, f64_of};

/// Passes the job to a child process.
const CHILD: &str = "FRAISEQL_STREAM_BENCH_JOB";

/// The job of a child process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) mode: Mode,
    pub(crate) url: String,
    pub(crate) entity: String,
    pub(crate) runtime: Runtime,
    pub(crate) warm_up: WarmUp,
    /// The number of connections that are read from at the same time.
    pub(crate) streams: usize,
    /// The number of queries on each connection.
    pub(crate) queries: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum Runtime {
    /// Two workers; rows are consumed in a spawned task, as in a service
    MultiThread,
    /// Two workers; the rows of a single stream are consumed in `block_on`, outside the workers
    MultiThreadMain,
    /// One thread for everything
    CurrentThread,
}

/// The measurements of a child process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) rows: u64,
    pub(crate) checksum: u64,
    /// User and kernel CPU time of the whole process, from the first query until telemetry is flushed.
    pub(crate) user: Duration,
    pub(crate) system: Duration,
    /// The part of it that the final flush of telemetry took.
    pub(crate) flush: Duration,
    /// Elapsed time from the first query to the last row of all streams.
    pub(crate) wall: Duration,
    /// Page faults, each of which costs the kernel a microsecond or so.
    pub(crate) faults: u64,
    /// The number of times a thread went to sleep.
    pub(crate) sleeps: u64,
    /// The time to the first row of each query.
    pub(crate) first_rows: Vec<Duration>,
}

impl Outcome {
    pub(crate) fn cpu(&self) -> Duration {
        self.user + self.system
    }

    pub(crate) fn cpu_us_per_row(&self) -> f64 {
        self.per_row(self.cpu().as_secs_f64() * 1e6)
    }

    pub(crate) fn per_row(&self, sum: f64) -> f64 {
        sum / f64_of(self.rows.max(1))
    }
}

impl Job {
    /// Runs the job in a child process, under the command `under` if given. A mode with telemetry exports to `collector`.
    pub(crate) fn run(&self, collector: &str, under: Option<&str>) -> Result<Outcome, Failure> {
        let executable = std::env::current_exe()?;
        let mut words = under.into_iter().flat_map(str::split_whitespace);
        let mut child = match words.next() {
            Some(program) => Command::new(program),
            None => Command::new(&executable),
        };
        if under.is_some() {
            child.args(words).arg(&executable);
        }
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("OTEL_") {
                child.env_remove(name);
            }
        }
        child.env(CHILD, serde_json::to_string(self)?);
        if self.mode.has_telemetry() {
            child.env("OTEL_SERVICE_NAME", "throughput");
            child.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector);
            child.env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        }
        let output = child.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            return Err(format!("{} failed ({})", self.mode, output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Returns the job of this process, if it is a child.
    pub(crate) fn from_env() -> Result<Option<Self>, Failure> {
        let job = std::env::var(CHILD).ok();
        Ok(job.map(|job| serde_json::from_str(&job)).transpose()?)
    }

    /// Executes the job in this process.
    pub(crate) fn execute(self) -> Result<Outcome, Failure> {
        let mut builder = match self.runtime {
            Runtime::CurrentThread => tokio::runtime::Builder::new_current_thread(),
            Runtime::MultiThread | Runtime::MultiThreadMain => {
                let mut builder = tokio::runtime::Builder::new_multi_thread();
                builder.worker_threads(2);
                builder
            }
        };
        let runtime = builder.enable_all().build()?;
        if self.runtime == Runtime::MultiThread {
            runtime.block_on(async { tokio::spawn(self.measure()).await? })
        } else {
            runtime.block_on(self.measure())
        }
    }

    async fn measure(self) -> Result<Outcome, Failure> {
        match self.mode {
            Mode::Raw => self.measure_peer::<Raw>().await,
            Mode::RawPrepared => self.measure_peer::<RawPrepared>().await,
            Mode::StreamTelemetryOff | Mode::StreamTelemetryOn => self.measure_peer::<Stream>().await,
            Mode::FraiseqlWire => self.measure_peer::<Wire>().await,
            Mode::Sqlx => self.measure_peer::<Sqlx>().await,
            Mode::RawBytes => self.measure_peer::<RawBytes>().await,
            Mode::StreamBytesTelemetryOff | Mode::StreamBytesTelemetryOn => {
                self.measure_peer::<StreamBytes>().await
            }
        }
    }

    async fn measure_peer<P: Peer>(self) -> Result<Outcome, Failure> {
        let telemetry = if self.mode.has_telemetry() { Some(fraiseql_stream::otlp::init()?) } else { None };
        let mut peers = try_join_all((0..self.streams).map(|_| self.connect::<P>())).await?;
        let (before, start) = (getrusage(UsageWho::RUSAGE_SELF)?, Instant::now());
        let tally = self.read_all(&mut peers).await?;
        let wall = start.elapsed();
        let streamed = getrusage(UsageWho::RUSAGE_SELF)?;
        if let Some(telemetry) = telemetry {
            telemetry.shutdown().await?;
        }
        let after = getrusage(UsageWho::RUSAGE_SELF)?;
        let count = |count: fn(&Usage) -> i64| count(&after).saturating_sub(count(&before)).unsigned_abs();
        Ok(Outcome {
            rows: tally.rows,
            checksum: tally.checksum,
            user: time(after.user_time() - before.user_time()),
            system: time(after.system_time() - before.system_time()),
            flush: time(
                after.user_time() + after.system_time() - streamed.user_time() - streamed.system_time(),
            ),
            wall,
            faults: count(Usage::minor_page_faults),
            sleeps: count(Usage::voluntary_context_switches),
            first_rows: tally.first_rows,
        })
    }

    /// Connects and runs the warm-up queries.
    async fn connect<P: Peer>(&self) -> Result<P, Failure> {
        let mut peer = P::connect(&self.url, self.warm_up.queries + self.queries).await?;
        for _ in 0..self.warm_up.queries {
            peer.read(&self.entity, self.warm_up.limit, |_| ()).await?;
        }
        Ok(peer)
    }

    /// Reads all streams: a single one in the current task, several in one task each.
    async fn read_all<P: Peer>(&self, peers: &mut Vec<P>) -> Result<Tally, Failure> {
        let mut tally = Tally::default();
        if let [peer] = peers.as_mut_slice() {
            self.read(peer, &mut tally).await?;
            return Ok(tally);
        }
        let mut tasks = JoinSet::new();
        for mut peer in peers.drain(..) {
            let job = self.clone();
            tasks.spawn(async move {
                let mut tally = Tally::default();
                job.read(&mut peer, &mut tally).await.map(|()| tally)
            });
        }
        while let Some(read) = tasks.join_next().await {
            tally.add(read??);
        }
        Ok(tally)
    }

    async fn read<P: Peer>(&self, peer: &mut P, tally: &mut Tally) -> Result<(), Failure> {
        for _ in 0..self.queries {
            tally.start = Some(Instant::now());
            peer.read(&self.entity, None, |row| tally.count(row)).await?;
        }
        Ok(())
    }
}

/// Counts the rows that a peer reads.
#[derive(Default)]
struct Tally {
    rows: u64,
    checksum: u64,
    first_rows: Vec<Duration>,
    /// The start of the current query, until its first row arrives.
    start: Option<Instant>,
}

impl Tally {
    fn count(&mut self, row: u64) {
        self.first_rows.extend(self.start.take().map(|start| start.elapsed()));
        self.rows += 1;
        self.checksum = self.checksum.wrapping_add(row);
    }

    fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.checksum = self.checksum.wrapping_add(other.checksum);
        self.first_rows.extend(other.first_rows);
    }
}

fn time(time: TimeVal) -> Duration {
    Duration::from_micros(time.num_microseconds().unsigned_abs())
}
