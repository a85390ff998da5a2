//! Streams a table of orders three times: to a fast consumer, to a slow consumer, and from a slow view, and shows
//! which side is slow each time. Starts its own Postgres.
//!
//! `cargo run --release --features otlp --example demo`

#[cfg(not(unix))]
compile_error!("this program needs Unix signals and file descriptors");

mod figures;
mod occupancy;
mod orders;
mod report;
mod screen;
mod server;
mod streams;
mod telemetry;

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use fraiseql_stream::{Connection, Instruments, Stats};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use figures::{grouped, megabytes, seconds};
use occupancy::Memory;
use screen::Screen;
use server::Server;
use streams::Context;
use telemetry::Telemetry;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Stream a table of orders from Postgres three times and show which side is slow: your code or Postgres
#[derive(Debug, Parser)]
#[command(name = "demo", after_help = ENVIRONMENT)]
struct Args {
    /// Number of orders to create and stream
    #[arg(long, value_name = "N", default_value_t = 400_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rows: u32,
}

const TITLE: &str = "fraiseql-stream: one table of orders, streamed three times. Which side is slow?";
const LEGEND: &str = "[###.......]  rows waiting in the channel for your code (at most 256)";

const ENVIRONMENT: &str = "\
Environment:
  DATABASE_URL  the Postgres server to use; if unset, the demo starts a private one
  OTEL_*        if any is set, metrics, traces and logs are exported over OTLP
  NO_COLOR      if set, disables colours";

/// A listener for SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next signal and returns its exit code.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
        }
    }
}

/// Returns the name of the signal with this exit code.
fn signal_name(code: u8) -> Option<&'static str> {
    match code {
        130 => Some("SIGINT"),
        143 => Some("SIGTERM"),
        _ => None,
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    // Spawned, as in a service: a future that `block_on` polls does not run on a worker thread and is woken later.
    let end = runtime.block_on(async { tokio::spawn(run(args)).await });
    // A download of Postgres that is still running must not delay the exit.
    runtime.shutdown_background();
    match end {
        Ok(Ok(code)) => ExitCode::from(code),
        Ok(Err(error)) => failed(&*error),
        Err(panic) => failed(&panic),
    }
}

fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    eprintln!("demo: {error}");
    ExitCode::FAILURE
}

/// How the demo ended.
enum End {
    Finished(Result<Vec<Stats>>),
    /// Stopped by a signal, with its exit code.
    Stopped(u8),
    /// The reader closed the output.
    OutputClosed,
}

async fn run(args: Args) -> Result<u8> {
    let mut signals = Signals::listen()?;
    let telemetry = Telemetry::start()?;
    let memory = Memory::new();
    let mut demo = Demo {
        server: Server::from_env(),
        db: None,
        monitor: None,
        screen: Screen::open(),
        instruments: memory.instruments(telemetry.is_exported()),
    };
    let output_closed = demo.screen.closed();
    let end = tokio::select! {
        result = demo.run(args.rows) => End::Finished(result),
        code = signals.next() => End::Stopped(code),
        () = output_closed => End::OutputClosed,
    };
    // A second signal skips the clean-up: the server and the query end with the process.
    tokio::select! {
        code = demo.finish(end, telemetry, memory) => code,
        code = signals.next() => Ok(code),
    }
}

/// Everything that has to be shut down in order, however the demo ends.
struct Demo {
    server: Server,
    db: Option<Connection>,
    monitor: Option<Connection>,
    screen: Screen,
    instruments: Instruments,
}

impl Demo {
    async fn run(&mut self, rows: u32) -> Result<Vec<Stats>> {
        let screen = &self.screen;
        screen.print_with(|paint| paint.bold(TITLE) + "\n");
        let startup = self.server.startup();
        screen.live(move |_| format!("   {startup} ..."));
        self.server.ready().await?;
        let db = self.server.connect(&self.instruments).await?;
        let monitor = self.server.connect(&self.instruments).await?;
        let (db, monitor) = (self.db.insert(db), self.monitor.insert(monitor));
        screen.clear();
        let row = db.client().await?.query_one("SHOW server_version", &[]);
        let version: String = row.await?.get(0);
        let version = version.split(' ').next().unwrap_or_default();
        screen.print(format!("   server   PostgreSQL {version}, {}", self.server.origin()));

        let start = Instant::now();
        let bytes = orders::create(db, rows, screen).await?;
        screen.clear();
        screen.print(format!(
            "   orders   {} with 1 to 5 lines each, as jsonb: {}, created in {}\n   {LEGEND}",
            grouped(rows.into()),
            megabytes(bytes),
            seconds(start.elapsed()),
        ));
        streams::run(&mut Context { db, monitor, screen }).await
    }

    async fn finish(mut self, end: End, telemetry: Telemetry, memory: Memory) -> Result<u8> {
        let (finished, end) = match end {
            End::Finished(Ok(streams)) => {
                let report = move |paint| report::report(paint, &streams, &memory);
                self.screen.print_with(report);
                (true, Ok(0))
            }
            End::Finished(Err(error)) => (false, Err(error)),
            End::Stopped(code) => (false, Ok(code)),
            End::OutputClosed => (false, Ok(0)),
        };
        self.clean_up().await;
        let exported = telemetry.finish().await;
        if finished {
            self.screen.print(exported);
        }
        let printed = self.screen.close();
        if finished {
            printed.await;
        } else {
            // After a signal, a stopped terminal must not delay the exit.
            let _ = timeout(Duration::from_secs(1), printed).await;
        }
        if let Some(signal) = end.as_ref().ok().and_then(|code| signal_name(*code)) {
            eprintln!("demo: stopped by {signal}; the query was cancelled and the orders were removed");
        }
        end
    }

    async fn clean_up(&mut self) {
        if let Some(db) = &mut self.db {
            // Waits until a query that was dropped midway has been cancelled. If that takes too long, closing the
            // connection below ends it.
            let _ = timeout(Duration::from_secs(6), db.client()).await;
        }
        (self.db, self.monitor) = (None, None);
        self.server.stop().await;
    }
}
