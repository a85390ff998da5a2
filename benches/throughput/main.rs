//! What a row costs the client: CPU time per row of fraiseql-stream, of its peers, and of tokio-postgres by hand.
//!
//! `cargo bench --manifest-path benches/Cargo.toml`; `-- --help` tells the options.
//!
//! Counted is the CPU time, in user and kernel, of a process that does nothing else: with all its threads, those that
//! export telemetry included, and the flush at its end. Postgres and the collector are processes of their own and not
//! counted; neither are connecting and a first short query. All modes take turns within each round, in an order that
//! changes from round to round, and each is compared with the basis of its own round.

mod child;
mod document;
mod mode;
mod peers;
mod report;
mod server;

use std::io::Write as _;
use std::time::Duration;

use backends::{Collector, Postgres};
use clap::Parser as _;
use serde_json::Value;

use child::{Job, Outcome, Runtime};
use mode::Mode;
use report::Runs;
use server::{FIRST_ROW, SIZES, Size};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// CPU time per row of fraiseql-stream and its peers
#[derive(Debug, clap::Parser)]
struct Options {
    /// How often each mode is run
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Multiplies the number of rows
    #[arg(long, default_value_t = 1.0)]
    rows_scale: f64,
    /// Only rows of these sizes in bytes: 134, 1024, 20480
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<usize>,
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
    /// One JSON line per size and mode, for programs
    #[arg(long)]
    json: bool,
    /// Runs the modes under a program, such as "valgrind --tool=callgrind": its report counts then, not the times here
    #[arg(long, value_name = "COMMAND")]
    under: Option<String>,
}

fn main() -> Result<(), Failure> {
    if let Some(job) = Job::mine()? {
        let outcome = job.work()?;
        return Ok(serde_json::to_writer(std::io::stdout(), &outcome)?);
    }
    // `cargo bench` adds a word of its own.
    let words = std::env::args().filter(|word| word != "--bench");
    let bench = Bench::start(Options::parse_from(words))?;
    let runs = bench.run()?;
    bench.check_telemetry()?;
    let mut out = std::io::stdout().lock();
    for runs in &runs {
        if bench.options.json { runs.json(&mut out)? } else { runs.table(&mut out)? }
    }
    Ok(())
}

struct Bench {
    options: Options,
    modes: Vec<Mode>,
    sizes: Vec<Size>,
    server: Postgres,
    collector: Collector,
}

impl Bench {
    fn start(options: Options) -> Result<Self, Failure> {
        let mut modes = Mode::TYPED.to_vec();
        if !options.modes.is_empty() {
            modes = Mode::TYPED.into_iter().chain(Mode::BYTES).collect();
            modes.retain(|mode| options.modes.iter().any(|wanted| wanted == mode || wanted.basis() == *mode));
        } else if options.bytes {
            modes.extend(Mode::BYTES);
        }
        let chosen = SIZES
            .into_iter()
            .filter(|size| options.sizes.is_empty() || options.sizes.contains(&size.row_bytes));
        let sizes: Vec<_> = chosen.map(|size| size.scaled(options.rows_scale)).collect();
        let bench = Self { options, modes, sizes, server: server::start()?, collector: Collector::start()? };
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let cpus = std::thread::available_parallelism()?;
        let load = load.split(' ').next().unwrap_or("?");
        eprintln!("PostgreSQL {}, {cpus} CPUs, load {load}; loading tables", bench.server.version());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut tables = bench.sizes.clone();
        if tables.iter().all(|size| size.table() != FIRST_ROW.table()) {
            tables.push(FIRST_ROW);
        }
        for size in tables {
            runtime.block_on(server::load(&bench.server.url(), size))?;
        }
        Ok(bench)
    }

    fn run(&self) -> Result<Vec<Runs>, Failure> {
        let runs = |size: &Size| Runs { row_bytes: size.row_bytes, rows: size.rows, ..Runs::default() };
        let mut all: Vec<_> = self.sizes.iter().map(runs).collect();
        for round in 0..self.options.rounds {
            eprint!("\rround {} of {}", round + 1, self.options.rounds);
            std::io::stderr().flush()?;
            for (size, runs) in self.sizes.iter().zip(&mut all) {
                self.round(round, *size, runs)?;
            }
        }
        eprintln!();
        Ok(all)
    }

    /// Every mode once, each round beginning with another one.
    fn round(&self, round: usize, size: Size, runs: &mut Runs) -> Result<(), Failure> {
        let mut checksums: Vec<(Mode, u64)> = Vec::new();
        let (collector, under) = (self.collector.http_endpoint(), self.options.under.as_deref());
        let turn = round % self.modes.len();
        for mode in self.modes[turn..].iter().chain(&self.modes[..turn]) {
            let outcome = self.job(*mode, size, 1).run(&collector, under)?;
            check(*mode, size, &outcome, &mut checksums)?;
            runs.rounds.entry(*mode).or_default().push(outcome);
            if size.row_bytes == FIRST_ROW.row_bytes && under.is_none() {
                let outcome = self.job(*mode, FIRST_ROW, 5).run(&collector, under)?;
                let times = outcome.first_rows.iter().map(|time| time.as_secs_f64() * 1e3);
                runs.first_rows.entry(*mode).or_default().extend(times);
            }
        }
        Ok(())
    }

    fn check_telemetry(&self) -> Result<(), Failure> {
        let runs = self.options.rounds * self.modes.iter().filter(|mode| mode.has_telemetry()).count();
        for size in &self.sizes {
            if !backends::wait_until(Duration::from_secs(10), || is_told(&self.collector, *size, runs)) {
                return Err(format!("the collector was not told about all runs of {}", size.table()).into());
            }
        }
        Ok(())
    }

    fn job(&self, mode: Mode, size: Size, times: usize) -> Job {
        Job {
            mode,
            url: self.server.url(),
            table: size.table(),
            runtime: if self.options.current_thread { Runtime::CurrentThread } else { self.options.runtime },
            warm_up: size.warm_up(),
            times,
        }
    }
}

/// Every run with telemetry has really told the collector, in traces and metrics, about every row.
fn is_told(collector: &Collector, size: Size, runs: usize) -> bool {
    let (table, rows) = (size.table(), Some(&Value::from(size.rows)));
    let spans = collector.spans();
    let spans = spans.iter().filter(|span| span.name == format!("SELECT {table}"));
    let metrics = collector.metrics();
    let metrics = metrics.iter().filter(|metric| metric.name == "fraiseql.stream.rows");
    let points = metrics.filter_map(|metric| metric.point(&[("entity", &table), ("outcome", "yielded")]));
    // A process counts the rows of its first query too.
    let all = size.rows + size.warm_up();
    spans.filter(|span| span.attributes.get("fraiseql.rows") == rows).count() >= runs
        && points.filter(|point| point.value == Some(f64_of(all))).count() >= runs
}

#[expect(clippy::cast_precision_loss, reason = "numbers of rows are small")]
fn f64_of(number: u64) -> f64 {
    number as f64
}

/// All rows came, and every mode of a kind has read the same in them.
fn check(mode: Mode, size: Size, outcome: &Outcome, others: &mut Vec<(Mode, u64)>) -> Result<(), Failure> {
    if outcome.rows != size.rows {
        return Err(format!("{mode} read {} rows of {}", outcome.rows, size.rows).into());
    }
    let same = others.iter().find(|(other, _)| other.basis() == mode.basis());
    if let Some((other, checksum)) = same.filter(|(_, checksum)| *checksum != outcome.checksum) {
        return Err(
            format!("{mode} read other rows than {other}: {} and {checksum}", outcome.checksum).into()
        );
    }
    others.push((mode, outcome.checksum));
    Ok(())
}
