//! Measures the client's CPU time per row and per stream: of fraiseql-stream, of tokio-postgres, and of other clients.
//!
//! Run it with `cargo bench --manifest-path benches/Cargo.toml`; `-- --help` lists the options.
//!
//! Each run is a process of its own. Its CPU time is user and kernel time of all threads, including those that export
//! telemetry, and includes the final flush. Connecting and the warm-up queries of a connection are not counted, nor are
//! Postgres and the collector. All modes take turns within each round, in an order that changes from round to round, and
//! each is compared with the baseline of the same round.
//!
//! The baseline for rows is tokio-postgres with the SQL text in each query; the baseline for streams is tokio-postgres
//! with a statement that was prepared once. The stream benchmarks are: short queries one after another on a connection,
//! streams on 1, 8 and 64 connections at once, and 80 streams that wait for Postgres nearly all the time.
//!
//! A short query mostly sleeps and wakes, which costs several times as much on an idle core, which halts, as on a busy
//! one. Compare reports only if the machine was about equally busy. The report includes the number of sleeps.

mod child;
mod document;
mod exported;
mod mode;
mod peers;
mod plan;
mod report;
mod server;
mod streams;

use std::io::Write as _;

use backends::{Collector, Postgres};
use clap::Parser as _;

use child::{Job, Outcome, Runtime};
use mode::Mode;
use plan::{Case, FIRST_ROW, Kind, Parts};
use report::Runs;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measure CPU time per row and per stream of fraiseql-stream and other clients
#[derive(Debug, clap::Parser)]
struct Options {
    /// Number of runs of each mode; streams that wait for Postgres run once
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Factor for the number of rows and of short queries
    #[arg(long, default_value_t = 1.0)]
    rows_scale: f64,
    #[command(flatten)]
    parts: Parts,
    /// Run only these modes and their baselines
    #[arg(long, value_delimiter = ',', value_enum)]
    modes: Vec<Mode>,
    /// Include the modes that do not decode rows
    #[arg(long)]
    bytes: bool,
    /// Where rows are consumed
    #[arg(long, value_enum, default_value = "multi-thread")]
    runtime: Runtime,
    /// Same as --runtime current-thread
    #[arg(long)]
    current_thread: bool,
    /// Print the report as JSON, one line per benchmark and mode
    #[arg(long)]
    json: bool,
    /// Run each mode under this command, such as "valgrind --tool=callgrind"; ignore the times reported here
    #[arg(long, value_name = "COMMAND")]
    under: Option<String>,
}

impl Options {
    /// Returns the selected modes of a kind, and their baselines.
    fn modes(&self, kind: Kind) -> Vec<Mode> {
        let is_selected = |mode: Mode| match self.modes.as_slice() {
            [] => self.bytes || !mode.is_bytes(),
            modes => modes.contains(&mode),
        };
        let all = || kind.modes().iter().copied();
        let selected: Vec<_> = all().filter(|mode| is_selected(*mode)).collect();
        let is_baseline = |mode: Mode| selected.iter().any(|selected| kind.baseline(*selected) == mode);
        all().filter(|mode| selected.contains(mode) || is_baseline(*mode)).collect()
    }
}

fn main() -> Result<(), Failure> {
    if let Some(job) = Job::from_env()? {
        let outcome = job.execute()?;
        return Ok(serde_json::to_writer(std::io::stdout(), &outcome)?);
    }
    // `cargo bench` adds an argument of its own.
    let args = std::env::args().filter(|arg| arg != "--bench");
    let mut bench = Bench::start(Options::parse_from(args))?;
    let runs = bench.run()?;
    let mut out = std::io::stdout().lock();
    for runs in &runs {
        runs.write(&mut out, bench.options.json)?;
    }
    Ok(())
}

struct Bench {
    options: Options,
    cases: Vec<Case>,
    server: Postgres,
    collector: Collector,
}

impl Bench {
    fn start(options: Options) -> Result<Self, Failure> {
        let mut cases = Case::all(&options.parts, options.rows_scale);
        cases.retain(|case| !options.modes(case.kind).is_empty());
        let bench = Self { options, cases, server: server::start()?, collector: Collector::start()? };
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let cpus = std::thread::available_parallelism()?;
        let load = load.split(' ').next().unwrap_or("?");
        eprintln!("PostgreSQL {}, {cpus} CPUs, load {load}; loading tables", bench.server.version());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let url = bench.server.url();
        for case in &bench.cases {
            runtime.block_on(server::load(&url, case))?;
        }
        let first_row = Case::rows(FIRST_ROW, 1);
        let is_missing = bench.cases.iter().all(|case| case.entity() != first_row.entity());
        if is_missing && bench.cases.iter().any(Case::has_first_row) {
            runtime.block_on(server::load(&url, &first_row))?;
        }
        Ok(bench)
    }

    fn run(&mut self) -> Result<Vec<Runs>, Failure> {
        let mut all: Vec<_> = self.cases.iter().cloned().map(Runs::new).collect();
        let rounds = self.options.rounds;
        for round in 0..rounds {
            for runs in all.iter_mut().filter(|runs| round < runs.case.rounds(rounds)) {
                eprint!("\rround {} of {rounds}: {:24}", round + 1, runs.case.entity());
                std::io::stderr().flush()?;
                self.round(round, runs)?;
            }
        }
        eprintln!();
        Ok(all)
    }

    /// Runs every mode once, starting with a different one in each round.
    fn round(&mut self, round: usize, runs: &mut Runs) -> Result<(), Failure> {
        let mut checksums: Vec<(Mode, u64)> = Vec::new();
        let mut modes = self.options.modes(runs.case.kind);
        let turn = round % modes.len();
        modes.rotate_left(turn);
        for mode in modes {
            let outcome = self.measure(mode, &runs.case)?;
            check(mode, &runs.case, &outcome, &mut checksums)?;
            runs.rounds.entry(mode).or_default().push(outcome);
            if mode.has_telemetry() {
                runs.spans.entry(mode).or_default().push(exported::check(&self.collector, &runs.case)?);
                self.collector = Collector::start()?;
            }
            if runs.case.has_first_row() && self.options.under.is_none() {
                let outcome = self.measure(mode, &Case::rows(FIRST_ROW, 5))?;
                let times = outcome.first_rows.iter().map(|time| time.as_secs_f64() * 1e3);
                runs.first_rows.entry(mode).or_default().extend(times);
            }
        }
        Ok(())
    }

    fn measure(&self, mode: Mode, case: &Case) -> Result<Outcome, Failure> {
        let job = Job {
            mode,
            url: self.server.url(),
            entity: case.entity(),
            runtime: if self.options.current_thread { Runtime::CurrentThread } else { self.options.runtime },
            warm_up: case.warm_up(),
            streams: case.streams,
            queries: case.queries,
        };
        job.run(&self.collector.http_endpoint(), self.options.under.as_deref())
    }
}

#[expect(clippy::cast_precision_loss, reason = "numbers of rows and queries are small")]
fn f64_of(number: u64) -> f64 {
    number as f64
}

/// Checks that all rows were read, and that all modes of a kind read the same contents.
fn check(mode: Mode, case: &Case, outcome: &Outcome, others: &mut Vec<(Mode, u64)>) -> Result<(), Failure> {
    if outcome.rows != case.all_rows() {
        return Err(format!("{mode} read {} of {} rows", outcome.rows, case.all_rows()).into());
    }
    let same = others.iter().find(|(other, _)| other.is_bytes() == mode.is_bytes());
    if let Some((other, checksum)) = same.filter(|(_, checksum)| *checksum != outcome.checksum) {
        return Err(format!(
            "{mode} and {other} read different rows (checksums {} and {checksum})",
            outcome.checksum
        )
        .into());
    }
    others.push((mode, outcome.checksum));
    Ok(())
}
