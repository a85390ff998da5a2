//! Who is slow? One table of orders, streamed three times: as fast as it goes, to a slow consumer, and out of a
//! slow view. Brings its own Postgres.
//!
//! `cargo run --release --example demo`

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
use streams::Stage;
use telemetry::Telemetry;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Streams a table of orders out of Postgres three times, and shows who is slow each time: your code or Postgres.
#[derive(Debug, Parser)]
#[command(name = "demo", after_help = ENVIRONMENT)]
struct Args {
    /// How many orders to make and stream
    #[arg(long, value_name = "N", default_value_t = 400_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rows: u32,
}

const TITLE: &str = "fraiseql-stream: one table of orders, streamed three times. Who is slow?";
const LEGEND: &str = "[###.......]  how full the channel from Postgres to your code is, of 256 rows";

const ENVIRONMENT: &str = "\
Environment:
  DATABASE_URL  a Postgres to use; without it, a private one runs while the demo does
  OTEL_*        with any of them set, metrics, traces and logs are exported by OTLP
  NO_COLOR      no colours";

/// SIGINT and SIGTERM.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The exit code that the next signal asks for.
    async fn asked(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
        }
    }
}

/// The signal that leads to this exit code.
fn name_of(code: u8) -> Option<&'static str> {
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
    // In a task, as in a service: what `block_on` itself runs is not on the runtime's threads, and is woken later.
    let end = runtime.block_on(async { tokio::spawn(play(args)).await });
    // A Postgres that is still being fetched must not hold us up.
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

/// How the performance ended.
enum End {
    Played(Result<Vec<Stats>>),
    /// By a signal; the exit code.
    Stopped(u8),
    /// Nobody reads what is printed.
    Unread,
}

async fn play(args: Args) -> Result<u8> {
    let mut stop = Stop::listen()?;
    let telemetry = Telemetry::start()?;
    let memory = Memory::new();
    let mut house = House {
        server: Server::choose(),
        db: None,
        watcher: None,
        screen: Screen::open(),
        instruments: memory.instruments(telemetry.is_exported()),
    };
    let unread = house.screen.closed();
    let end = tokio::select! {
        played = house.perform(args.rows) => End::Played(played),
        code = stop.asked() => End::Stopped(code),
        () = unread => End::Unread,
    };
    // A second signal is a request to hurry: what is left ends by itself once we are gone.
    tokio::select! {
        code = house.leave(end, telemetry, memory) => code,
        code = stop.asked() => Ok(code),
    }
}

/// What has to be put away in order at the end, whatever the end is.
struct House {
    server: Server,
    db: Option<Connection>,
    watcher: Option<Connection>,
    screen: Screen,
    instruments: Instruments,
}

impl House {
    async fn perform(&mut self, rows: u32) -> Result<Vec<Stats>> {
        let screen = &self.screen;
        screen.paint(|paint| paint.bold(TITLE) + "\n");
        let plan = self.server.plan();
        screen.live(move |_| format!("   {plan} ..."));
        self.server.ready().await?;
        let db = self.server.connect(&self.instruments).await?;
        let watcher = self.server.connect(&self.instruments).await?;
        let (db, watcher) = (self.db.insert(db), self.watcher.insert(watcher));
        screen.clear();
        let row = db.client().await?.query_one("SHOW server_version", &[]);
        let version: String = row.await?.get(0);
        let version = version.split(' ').next().unwrap_or_default();
        screen.say(format!("   server   PostgreSQL {version}, {}", self.server.owner()));

        let began = Instant::now();
        let bytes = orders::create(db, rows, screen).await?;
        screen.clear();
        screen.say(format!(
            "   orders   {}, of 1 to 5 lines each, as jsonb; {} made in {}\n   {LEGEND}",
            grouped(rows.into()),
            megabytes(bytes),
            seconds(began.elapsed()),
        ));
        streams::run(&mut Stage { db, watcher, screen }).await
    }

    async fn leave(mut self, end: End, telemetry: Telemetry, memory: Memory) -> Result<u8> {
        let (played, end) = match end {
            End::Played(Ok(streams)) => {
                let report = move |paint| report::report(paint, &streams, &memory);
                self.screen.paint(report);
                (true, Ok(0))
            }
            End::Played(Err(error)) => (false, Err(error)),
            End::Stopped(code) => (false, Ok(code)),
            End::Unread => (false, Ok(0)),
        };
        self.clean_up().await;
        let sent = telemetry.finish().await;
        if played {
            self.screen.say(sent);
        }
        let printed = self.screen.close();
        if played {
            printed.await;
        } else {
            // Who stops us does not wait for a terminal that is stopped itself.
            let _ = timeout(Duration::from_secs(1), printed).await;
        }
        if let Some(signal) = end.as_ref().ok().and_then(|code| name_of(*code)) {
            eprintln!("demo: stopped by {signal}; the query is cancelled, the orders are gone");
        }
        end
    }

    async fn clean_up(&mut self) {
        if let Some(db) = &mut self.db {
            // Returns once a query that was left in the middle is cancelled. If that fails, the end of the
            // session does it, here below.
            let _ = timeout(Duration::from_secs(6), db.client()).await;
        }
        (self.db, self.watcher) = (None, None);
        self.server.stop().await;
    }
}
