//! Scenarios: tests of this binary that run in a separate process each.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use backends::{Collector, wait_until};
use fraiseql_stream::Stats;
use serde_json::{Value, json};

use crate::servers::Database;

pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The variable with the URL of the database, set in the process of a scenario.
const DATABASE: &str = "TELEMETRY_DATABASE_URL";
/// The variable with the tokio runtime of a scenario.
const RUNTIME: &str = "TELEMETRY_RUNTIME";
/// The beginning of the line in which a scenario reports its outcome.
const REPORT: &str = "report: ";
const TIMEOUT: Duration = Duration::from_secs(90);

/// A scenario to run.
pub(crate) struct Scenario(Command);

impl Scenario {
    /// Creates a scenario from the name of the ignored test. Its process has only the `OTEL_*` variables set here.
    pub(crate) fn new(name: &str, database: &Database) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.args(["--exact", name, "--ignored", "--nocapture", "--quiet"]);
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("OTEL_") {
                command.env_remove(variable);
            }
        }
        command.env(DATABASE, &database.url);
        Self(command)
    }

    pub(crate) fn set(mut self, variable: &str, value: &str) -> Self {
        self.0.env(variable, value);
        self
    }

    /// Exports telemetry to this collector by `http/protobuf` or `grpc`.
    pub(crate) fn to(self, collector: &Collector, protocol: &str) -> Self {
        let endpoint = match protocol {
            "grpc" => collector.grpc_endpoint(),
            _ => collector.http_endpoint(),
        };
        self.set("OTEL_EXPORTER_OTLP_PROTOCOL", protocol).set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
    }

    /// Sets the runtime: `current_thread`, or `one_worker` for a multi-thread runtime with one worker, on which the
    /// scenario is a spawned task.
    pub(crate) fn on(self, runtime: &str) -> Self {
        self.set(RUNTIME, runtime)
    }

    pub(crate) fn run(self) -> Outcome {
        self.start().finish()
    }

    pub(crate) fn start(mut self) -> Running {
        self.0.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.0.spawn().expect("this binary runs");
        let input = child.stdin.take().expect("a pipe");
        let output = child.stdout.take().expect("a pipe");
        let mut errors = child.stderr.take().expect("a pipe");
        let (sent, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(std::result::Result::ok);
            lines.for_each(|line| drop(sent.send(line)));
        });
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).expect("UTF-8 on stderr");
            text
        });
        Running { child, input, lines, stdout: Vec::new(), stderr: Some(stderr), started: Instant::now() }
    }
}

/// A running scenario.
pub(crate) struct Running {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
    stdout: Vec<String>,
    stderr: Option<JoinHandle<String>>,
    started: Instant,
}

impl Running {
    /// Waits until the scenario announces this step.
    pub(crate) fn wait_for(&mut self, step: &str) {
        loop {
            let line = self.lines.recv_timeout(TIMEOUT);
            match line {
                Ok(line) if line == step => return,
                Ok(line) => self.stdout.push(line),
                Err(_) => {
                    // Reading its standard error would block until it ends.
                    let _ = self.child.kill();
                    panic!("{step} was not announced: {}{}", self.stdout.join("\n"), self.stderr());
                }
            }
        }
    }

    /// Resumes the scenario, which waits for it.
    pub(crate) fn resume(&mut self) {
        writeln!(self.input, "resume").expect("the scenario waits");
    }

    pub(crate) fn finish(mut self) -> Outcome {
        let mut status = None;
        wait_until(TIMEOUT, || {
            status = self.child.try_wait().expect("the scenario can be waited for");
            status.is_some()
        });
        let elapsed = self.started.elapsed();
        if status.is_none() {
            self.child.kill().expect("the scenario can be killed");
        }
        let stderr = self.stderr();
        self.stdout.extend(self.lines.iter());
        let stdout = std::mem::take(&mut self.stdout);
        let passed = |line: &String| line.starts_with("test result: ok. 1 passed");
        let has_passed = status.is_some_and(|status| status.success()) && stdout.iter().any(passed);
        let output = stdout.join("\n");
        assert!(has_passed, "{status:?} after {elapsed:?}\n{output}\n{stderr}");
        Outcome::new(&stdout, &stderr)
    }

    fn stderr(&mut self) -> String {
        let reader = self.stderr.take().map(JoinHandle::join);
        reader.and_then(std::result::Result::ok).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended, unless the test that waits for it failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The outcome of a scenario.
pub(crate) struct Outcome {
    /// The value passed to `report`.
    pub(crate) reported: Value,
    /// The lines that the library printed to standard output.
    pub(crate) stdout: String,
    /// The lines that the library printed to standard error, without those of failed streams.
    pub(crate) stderr: String,
    /// The lines of failed streams on standard error.
    pub(crate) failures: Vec<String>,
}

impl Outcome {
    fn new(stdout: &[String], stderr: &str) -> Self {
        let frame = |line: &&String| {
            let frame = ["running 1 test", ".", "test result: "];
            line.is_empty() || line.starts_with(REPORT) || frame.iter().any(|of| line.starts_with(of))
        };
        let report = stdout.iter().rev().find_map(|line| line.strip_prefix(REPORT));
        let reported = report.map_or(Value::Null, |report| serde_json::from_str(report).expect("it is JSON"));
        let printed: Vec<_> = stdout.iter().filter(|line| !frame(line)).cloned().collect();
        let is_failure = |line: &&str| line.contains("ERROR ");
        let (failures, others): (Vec<_>, Vec<_>) = stderr.split_inclusive('\n').partition(is_failure);
        let failures = failures.into_iter().map(ToOwned::to_owned).collect();
        Self { reported, stdout: printed.join("\n"), stderr: others.concat(), failures }
    }

    pub(crate) fn warnings(&self) -> Vec<&str> {
        self.stderr.lines().collect()
    }
}

/// Runs a scenario in its process; does nothing if an ignored test was started by hand.
pub(crate) fn run_scenario(scenario: impl Future<Output = Result> + Send + 'static) -> Result {
    if std::env::var_os(DATABASE).is_none() {
        return Ok(());
    }
    let threads = |number| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(number).enable_all().build()
    };
    match std::env::var(RUNTIME).as_deref() {
        Ok("current_thread") => {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(scenario)
        }
        Ok("one_worker") => threads(1)?.block_on(async { tokio::spawn(scenario).await? }),
        _ => threads(2)?.block_on(scenario),
    }
}

/// Returns the database of this scenario.
pub(crate) fn url() -> String {
    std::env::var(DATABASE).expect("a scenario has a database")
}

/// Reports the outcome to the test that runs this scenario.
pub(crate) fn report(outcome: &Value) {
    announce(&format!("{REPORT}{outcome}"));
}

/// Announces a step to the test that runs this scenario.
pub(crate) fn announce(step: &str) {
    let mut stdout = std::io::stdout().lock();
    let written = write!(stdout, "\n{step}\n").and_then(|()| stdout.flush());
    written.expect("the test reads");
}

/// Waits for `resume`; blocks the thread.
pub(crate) fn wait_for_resume() {
    let line = std::io::stdin().lines().next();
    assert!(line.is_some(), "the test has ended");
}

/// Returns statistics as JSON.
pub(crate) fn figures(stats: &Stats) -> Value {
    let time = &stats.time;
    json!({
        "rows": stats.rows,
        "filtered": stats.filtered,
        "failed": stats.failed,
        "bytes": stats.bytes,
        "elapsed": stats.elapsed.as_secs_f64(),
        "time": {
            "source_wait": time.source_wait.as_secs_f64(),
            "scheduled": time.scheduled.as_secs_f64(),
            "decode": time.decode.as_secs_f64(),
            "consumer": time.consumer.as_secs_f64(),
            "paused": time.paused.as_secs_f64(),
        },
        "source": stats.producer_time.source.as_secs_f64(),
        "room": stats.producer_time.room.as_secs_f64(),
        "backlog": stats.backlog.as_secs_f64(),
        "verdict": stats.verdict().as_str(),
    })
}
