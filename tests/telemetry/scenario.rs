//! Scenarios: parts of this binary that run alone in a process of their own.

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

/// Set in a scenario's process: the database.
const DATABASE: &str = "TELEMETRY_DATABASE_URL";
/// Which tokio runtime a scenario plays on.
const RUNTIME: &str = "TELEMETRY_RUNTIME";
/// Begins the line in which a scenario tells its outcome.
const TOLD: &str = "told: ";
const PATIENCE: Duration = Duration::from_secs(90);

/// A scenario that is to be run.
pub(crate) struct Scenario(Command);

impl Scenario {
    /// `name` is that of the ignored test. The process has no `OTEL_*` variables but those given.
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

    /// Sends telemetry to this collector by `http/protobuf` or `grpc`.
    pub(crate) fn to(self, collector: &Collector, protocol: &str) -> Self {
        let endpoint = match protocol {
            "grpc" => collector.grpc_endpoint(),
            _ => collector.http_endpoint(),
        };
        self.set("OTEL_EXPORTER_OTLP_PROTOCOL", protocol).set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
    }

    /// `current_thread`, or `one_worker`: a multi-thread runtime of one, with the scenario in a spawned task.
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

/// A scenario that runs.
pub(crate) struct Running {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
    stdout: Vec<String>,
    stderr: Option<JoinHandle<String>>,
    started: Instant,
}

impl Running {
    /// Waits until the scenario has said so.
    pub(crate) fn wait_for(&mut self, word: &str) {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            match line {
                Ok(line) if line == word => return,
                Ok(line) => self.stdout.push(line),
                Err(_) => {
                    // Its output ends with it.
                    let _ = self.child.kill();
                    panic!("{word} was never said: {}{}", self.stdout.join("\n"), self.stderr());
                }
            }
        }
    }

    /// Lets the scenario go on from where it listens.
    pub(crate) fn go_on(&mut self) {
        writeln!(self.input, "go on").expect("the scenario listens");
    }

    pub(crate) fn finish(mut self) -> Outcome {
        let mut status = None;
        wait_until(PATIENCE, || {
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
        let well = status.is_some_and(|status| status.success()) && stdout.iter().any(passed);
        let all = stdout.join("\n");
        assert!(well, "{status:?} after {elapsed:?}\n{all}\n{stderr}");
        Outcome::new(&stdout, stderr)
    }

    fn stderr(&mut self) -> String {
        let reader = self.stderr.take().map(JoinHandle::join);
        reader.and_then(std::result::Result::ok).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended unless the test that waits for it failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came out of a scenario.
pub(crate) struct Outcome {
    /// What it told of itself.
    pub(crate) told: Value,
    /// What the library printed on standard output.
    pub(crate) stdout: String,
    /// What the library printed on standard error.
    pub(crate) stderr: String,
}

impl Outcome {
    fn new(stdout: &[String], stderr: String) -> Self {
        let frame = |line: &&String| {
            let frame = ["running 1 test", ".", "test result: "];
            line.is_empty() || line.starts_with(TOLD) || frame.iter().any(|of| line.starts_with(of))
        };
        let told = stdout.iter().rev().find_map(|line| line.strip_prefix(TOLD));
        let told = told.map_or(Value::Null, |told| serde_json::from_str(told).expect("JSON is told"));
        let printed: Vec<_> = stdout.iter().filter(|line| !frame(line)).cloned().collect();
        Self { told, stdout: printed.join("\n"), stderr }
    }

    pub(crate) fn warnings(&self) -> Vec<&str> {
        self.stderr.lines().collect()
    }
}

/// Plays a scenario; returns at once where nobody asked for it.
pub(crate) fn play(scenario: impl Future<Output = Result> + Send + 'static) -> Result {
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

/// The database of this scenario.
pub(crate) fn url() -> String {
    std::env::var(DATABASE).expect("a scenario has a database")
}

/// Tells the outcome to the test that runs this scenario.
pub(crate) fn tell(outcome: &Value) {
    say(&format!("{TOLD}{outcome}"));
}

/// Says a word to the test that runs this scenario.
pub(crate) fn say(word: &str) {
    let mut stdout = std::io::stdout().lock();
    let said = write!(stdout, "\n{word}\n").and_then(|()| stdout.flush());
    said.expect("the test listens");
}

/// Waits for `go_on`; blocks the thread.
pub(crate) fn listen() {
    let heard = std::io::stdin().lines().next();
    assert!(heard.is_some(), "the test is gone");
}

/// Statistics in a form that can be told.
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
