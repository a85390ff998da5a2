//! Streams JSON rows from Postgres to standard output, one document per line.
//!
//! ```text
//! DATABASE_URL=postgres://app@localhost/shop ndjson orders --where "data->>'status' = \$1" --param open --stats
//! ```
//!
//! `Run::stream_rows` below is the program; the rest makes it a well-behaved tool: it stops at once on a signal,
//! even while a write is blocked, and leaves no query running on the server.

#[cfg(not(unix))]
compile_error!("this program needs Unix signals and file descriptors");

mod args;
mod pause;
mod signals;
mod sink;
mod stats;
mod telemetry;

use std::fmt;
use std::io::{self, ErrorKind, Write as _};
use std::task::Poll;
use std::time::Duration;

use clap::Parser as _;
use fraiseql_stream::{Connection, JsonStream, Observer, RawJson, otlp};
use futures_util::StreamExt as _;
use tokio::time::timeout;

use args::Args;
use pause::Pause;
use signals::Signals;
use sink::Sink;

/// The time limit for cancelling the query. A cancel takes milliseconds unless the network is down.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);
/// The time left to a stalled reader once the program has to stop.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

fn main() {
    let args = Args::parse();
    let code = match args::database_url() {
        Ok(url) => start(&args, &url).unwrap_or_else(|error| fail(&error, 1)),
        Err(why) => fail(&why, 2),
    };
    std::process::exit(code)
}

fn fail(why: &dyn fmt::Display, code: i32) -> i32 {
    // If standard error is closed, the exit code still reports the failure.
    let _ = writeln!(io::stderr(), "ndjson: {why}");
    code
}

/// A single-threaded runtime: rows never move between threads, and all memory comes from one allocator arena.
fn start(args: &Args, url: &str) -> io::Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(run(args, url));
    // A host name may still be resolving on a blocking thread, which cannot be interrupted.
    runtime.shutdown_background();
    code
}

/// Runs until all rows are written or a signal arrives; returns the exit code.
async fn run(args: &Args, url: &str) -> io::Result<i32> {
    let mut signals = Signals::listen()?;
    let mut run = Run::new(args)?;
    let end = tokio::select! {
        biased;
        signal = signals.next() => Ok(End::Signal(signal)),
        () = sink::reader_gone() => Ok(End::ReaderGone),
        end = run.stream_rows(url) => end,
    };
    let code = match &end {
        Ok(End::Complete | End::ReaderGone) => 0,
        Ok(End::Signal(signal)) => signal.exit_code(),
        Err(_) => 1,
    };
    tokio::select! {
        biased;
        // Exits instead of returning: dropping the telemetry guard would wait for the collector.
        () = signals.abort_requested(CANCEL_TIMEOUT) => std::process::exit(code),
        () = run.shut_down(&end) => Ok(code),
    }
}

/// How a run ended without an error.
enum End {
    Complete,
    /// The reader closed standard output, as in `ndjson ... | head`. This is not an error.
    ReaderGone,
    Signal(signals::Number),
}

/// Why a run failed.
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

/// Everything that has to be shut down in order once streaming has ended.
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
        let telemetry = telemetry::start().unwrap_or_else(|error| {
            errors
                .line(format!("ndjson: cannot set up telemetry: {error}; continuing without it").as_bytes());
            None
        });
        Ok(Self { args, output: Sink::new(io::stdout())?, errors, telemetry, db: None, stream: None })
    }

    /// Connects, starts the query, and writes all rows.
    async fn stream_rows(&mut self, url: &str) -> Result<End, Failure> {
        let db = self.db.insert(Connection::connect(url).await?);
        let mut rows = self.args.query(db).stream().await?;
        let stream = self.stream.insert(rows.observer());
        let written = async {
            let pause = self.args.pause.map(Pause::new);
            let copied = copy(&mut rows, &mut self.output, pause).await;
            // The rows that precede an error are valid and still have to be written.
            self.output.finish().await?;
            copied
        };
        let written = tokio::select! {
            biased;
            never = stats::write_every_second(stream, &mut self.errors), if self.args.stats => match never {},
            written = written => written,
        };
        match written {
            Ok(()) => Ok(End::Complete),
            Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(End::ReaderGone),
            Err(failure) => Err(failure),
        }
    }

    /// Waits until the query has ended on the server, then writes the final statistics and the error, if any.
    async fn shut_down(&mut self, end: &Result<End, Failure>) {
        let clean_up = async {
            if let Some(db) = &mut self.db {
                // After the timeout, the connection closes with the process.
                let _ = timeout(CANCEL_TIMEOUT, db.client()).await;
            }
        };
        // A reader that still reads gets whole lines.
        let _ = tokio::join!(clean_up, timeout(FLUSH_TIMEOUT, self.output.finish()));
        if let Some(stream) = self.stream.as_ref().filter(|_| self.args.stats) {
            self.errors.line(stats::line(stream).as_bytes());
        }
        if let Err(failure) = end {
            self.errors.line(format!("ndjson: {failure}").as_bytes());
        }
        let limit = match end {
            Ok(End::Signal(_)) => FLUSH_TIMEOUT,
            _ => Duration::MAX,
        };
        let _ = timeout(limit, self.errors.finish()).await;
        if let Some(telemetry) = self.telemetry.take() {
            // A failure has already been logged.
            let _ = telemetry.shutdown().await;
        }
    }
}

/// Copies rows to `output`: in large writes while rows arrive fast, without delay when they arrive slowly.
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
            pause.sleep().await;
        }
    }
    Ok(())
}

/// Returns the next row. If none is ready, writes the rows collected so far while waiting for it.
async fn next(
    rows: &mut JsonStream<RawJson, &mut Connection>,
    output: &mut Sink,
) -> Result<Option<RawJson>, Failure> {
    if let Poll::Ready(row) = rows.next_ready() {
        return Ok(row.transpose()?);
    }
    tokio::select! {
        biased;
        row = rows.next() => return Ok(row.transpose()?),
        written = output.finish() => written?,
    }
    Ok(rows.next().await.transpose()?)
}
