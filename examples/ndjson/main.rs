//! Streams JSON rows out of Postgres to standard output, one document a line.
//!
//! ```text
//! DATABASE_URL=postgres://app@localhost/shop ndjson orders --where "data->>'status' = \$1" --param open --stats
//! ```
//!
//! `args` says what is asked for, `work` below is the program, and the rest is what a tool owes its user: it
//! stops at once when it is told to, also in the middle of a write that stalls, and leaves no query behind.

mod args;
mod pause;
mod signals;
mod sink;
mod stats;

use std::fmt;
use std::io::{self, ErrorKind, Write as _};
use std::time::Duration;

use clap::Parser as _;
use fraiseql_stream::{Connection, JsonStream, Observer, RawJson, otlp};
use futures_util::StreamExt as _;
use tokio::time::timeout;

use args::Args;
use pause::Pause;
use signals::Signals;
use sink::Sink;

/// What a cancel may take. It takes milliseconds unless the network is gone.
const CLEAN_UP: Duration = Duration::from_secs(2);
/// What a reader who stalls is given once we were told to stop.
const LAST_WORDS: Duration = Duration::from_millis(100);

fn main() {
    let args = Args::parse();
    let code = match args::database_url() {
        Ok(url) => start(&args, &url).unwrap_or_else(|error| complain(&error, 1)),
        Err(why) => complain(&why, 2),
    };
    std::process::exit(code)
}

fn complain(why: &dyn fmt::Display, code: i32) -> i32 {
    // The code tells it, too, should standard error be gone.
    let _ = writeln!(io::stderr(), "ndjson: {why}");
    code
}

/// One thread does it all: rows come, wait and go without changing it, and memory is allocated in one arena.
fn start(args: &Args, url: &str) -> io::Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(run(args, url));
    // A host name may still be being resolved, on a thread that nothing can interrupt.
    runtime.shutdown_background();
    code
}

/// Runs to the end, or to the signal that ends it; returns the exit code.
async fn run(args: &Args, url: &str) -> io::Result<i32> {
    let mut signals = Signals::listen()?;
    let mut run = Run::new(args)?;
    let end = tokio::select! {
        biased;
        signal = signals.next() => Ok(End::Signal(signal)),
        () = sink::reader_gone() => Ok(End::ReaderGone),
        end = run.work(url) => end,
    };
    let code = match &end {
        Ok(End::Complete | End::ReaderGone) => 0,
        Ok(End::Signal(signal)) => signal.exit_code(),
        Err(_) => 1,
    };
    tokio::select! {
        biased;
        // Not by returning: that would drop the telemetry, which waits for the collector.
        () = signals.insist(CLEAN_UP) => std::process::exit(code),
        () = run.wind_down(&end) => Ok(code),
    }
}

/// How it ended, if not by an error.
enum End {
    Complete,
    /// As in `ndjson ... | head`: nobody wants more, and that is fine.
    ReaderGone,
    Signal(signals::Number),
}

/// Why it failed.
enum Failure {
    Stream(fraiseql_stream::Error),
    Output(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(error) => error.fmt(f),
            Self::Output(error) => write!(f, "cannot write to standard output: {error}"),
        }
    }
}

impl From<fraiseql_stream::Error> for Failure {
    fn from(error: fraiseql_stream::Error) -> Self {
        Self::Stream(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// All that outlives the streaming itself, because it has to be brought to an end.
struct Run<'a> {
    args: &'a Args,
    output: Sink,
    errors: Sink,
    telemetry: Option<otlp::Guard>,
    db: Option<Connection>,
    stream: Option<Observer>,
}

impl<'a> Run<'a> {
    fn new(args: &'a Args) -> io::Result<Self> {
        let mut errors = Sink::new(io::stderr())?;
        let telemetry = otlp::init_if_configured().unwrap_or_else(|error| {
            errors.line(format!("ndjson: no telemetry: {error}").as_bytes());
            None
        });
        Ok(Self { args, output: Sink::new(io::stdout())?, errors, telemetry, db: None, stream: None })
    }

    /// Connects, asks, and writes all rows.
    async fn work(&mut self, url: &str) -> Result<End, Failure> {
        let db = self.db.insert(Connection::connect(url).await?);
        let mut rows = self.args.query(db).stream().await?;
        let stream = self.stream.insert(rows.observer());
        let written = async {
            let pause = self.args.pause.map(Pause::new);
            let copied = copy(&mut rows, &mut self.output, pause).await;
            // Rows before an error are good.
            self.output.finish().await?;
            copied
        };
        let written = tokio::select! {
            biased;
            never = stats::every_second(stream, &mut self.errors), if self.args.stats => match never {},
            written = written => written,
        };
        match written {
            Ok(()) => Ok(End::Complete),
            Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(End::ReaderGone),
            Err(failure) => Err(failure),
        }
    }

    /// Waits until the query is gone from the server, and says what is to be said.
    async fn wind_down(&mut self, end: &Result<End, Failure>) {
        let clean_up = async {
            if let Some(db) = &mut self.db {
                // What is not clean by then is closed with the process.
                let _ = timeout(CLEAN_UP, db.client()).await;
            }
        };
        // A reader who does read shall find whole lines.
        let _ = tokio::join!(clean_up, timeout(LAST_WORDS, self.output.finish()));
        if let Some(stream) = self.stream.as_ref().filter(|_| self.args.stats) {
            self.errors.line(stats::line(stream).as_bytes());
        }
        if let Err(failure) = end {
            self.errors.line(format!("ndjson: {failure}").as_bytes());
        }
        let patience = match end {
            Ok(End::Signal(_)) => LAST_WORDS,
            _ => Duration::MAX,
        };
        let _ = timeout(patience, self.errors.finish()).await;
        if let Some(telemetry) = self.telemetry.take() {
            // A failure has been told by the subscriber that telemetry brought along.
            let _ = telemetry.shutdown().await;
        }
    }
}

/// Writes rows: many at once while they come fast, none later than it must.
async fn copy(
    rows: &mut JsonStream<RawJson, &mut Connection>,
    output: &mut Sink,
    mut pause: Option<Pause>,
) -> Result<(), Failure> {
    while let Some(row) = next(rows, output).await? {
        output.line(row.as_bytes());
        if output.is_full() || pause.is_some() {
            output.flush().await?;
        }
        if let Some(pause) = &mut pause {
            pause.take().await;
        }
    }
    Ok(())
}

/// The next row; while there is none, those before it are written.
async fn next(
    rows: &mut JsonStream<RawJson, &mut Connection>,
    output: &mut Sink,
) -> Result<Option<RawJson>, Failure> {
    if let Some(row) = rows.next_ready() {
        return Ok(Some(row?));
    }
    tokio::select! {
        biased;
        row = rows.next() => return Ok(row.transpose()?),
        written = output.finish() => written?,
    }
    Ok(rows.next().await.transpose()?)
}
