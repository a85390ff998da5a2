//! What a row and what a stream cost the client: CPU time of fraiseql-stream, of its peers, and of tokio-postgres by hand.
//!
//! `cargo bench --manifest-path benches/Cargo.toml`; `-- --help` lists the options.
//!
//! Counted is the CPU time, in user and kernel, of a process that does nothing else: with all its threads, those that
//! export telemetry included, and the flush at its end. Postgres and the collector are processes of their own and not
//! counted; neither are connecting and the first queries of a connection. All modes take turns within each round, in an order that
//! changes from round to round, and each is compared with the basis of its own round.
//!
//! A row is compared with tokio-postgres given the SQL text, a stream with tokio-postgres and a statement that was
//! prepared once. Streams are short queries one after another on a connection, streams on 1, 8 and 64 connections at
//! once, and 80 streams that wait for Postgres nearly all the time.
//!
//! Short queries are mostly sleeping and waking, and that costs several times as much on an idle core, which halts, as
//! on a busy one: compare reports only if the machine was about as busy. The sleeps themselves are in the report.

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
use plan::{Case, Kind, Parts};
use report::Runs;
use server::FIRST_ROW;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// CPU time per row and per stream of fraiseql-stream and its peers
#[derive(Debug, clap::Parser)]
struct Options {
    /// How often each mode is run; streams that wait for Postgres are run once
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Multiplies the number of rows, and of short queries
    #[arg(long, default_value_t = 1.0)]
    rows_scale: f64,
    #[command(flatten)]
    parts: Parts,
    /// Only these modes, and what they are compared with
    #[arg(long, value_delimiter = ',', value_enum)]
    modes: Vec<Mode>,
    /// Also rows that are not decoded
    #[arg(long)]
    bytes: bool,
    /// Where rows are taken
    #[arg(long, value_enum, default_value = "multi-thread")]
    runtime: Runtime,
    /// Short for --runtime current-thread
    #[arg(long)]
    current_thread: bool,
    /// One JSON line per size, or kind of stream, and mode, for programs
    #[arg(long)]
    json: bool,
    /// Runs the modes under a program, such as "valgrind --tool=callgrind": its report counts then, not the times here
    #[arg(long, value_name = "COMMAND")]
    under: Option<String>,
}

impl Options {
    /// The modes of a kind that are asked for, and their bases.
    fn modes(&self, kind: Kind) -> Vec<Mode> {
        let is_wanted = |mode: Mode| match self.modes.as_slice() {
            [] => self.bytes || !mode.is_bytes(),
            modes => modes.contains(&mode),
        };
        let all = || kind.modes().iter().copied();
        let wanted: Vec<_> = all().filter(|mode| is_wanted(*mode)).collect();
        let is_basis = |mode: Mode| wanted.iter().any(|wanted| kind.basis(*wanted) == mode);
        all().filter(|mode| wanted.contains(mode) || is_basis(*mode)).collect()
    }
}

fn main() -> Result<(), Failure> {
    if let Some(job) = Job::mine()? {
        let outcome = job.work()?;
        return Ok(serde_json::to_writer(std::io::stdout(), &outcome)?);
    }
    // `cargo bench` adds a word of its own.
    let words = std::env::args().filter(|word| word != "--bench");
    let mut bench = Bench::start(Options::parse_from(words))?;
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

    /// Every mode once, each round beginning with another one.
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

/// All rows came, and every mode of a kind has read the same in them.
fn check(mode: Mode, case: &Case, outcome: &Outcome, others: &mut Vec<(Mode, u64)>) -> Result<(), Failure> {
    if outcome.rows != case.all_rows() {
        return Err(format!("{mode} read {} rows of {}", outcome.rows, case.all_rows()).into());
    }
    let same = others.iter().find(|(other, _)| other.is_bytes() == mode.is_bytes());
    if let Some((other, checksum)) = same.filter(|(_, checksum)| *checksum != outcome.checksum) {
        return Err(
            format!("{mode} read other rows than {other}: {} and {checksum}", outcome.checksum).into()
        );
    }
    others.push((mode, outcome.checksum));
    Ok(())
}
