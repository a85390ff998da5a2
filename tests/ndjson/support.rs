//! The program under test, one server for all tests, and a database for each.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use backends::{Postgres, send_signal, wait_until};
use serde_json::Value;

/// A limit for operations that take milliseconds, generous enough for a machine that runs all other tests too.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);
/// The limit for the program to stop and for its query to end on the server.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// A program that still runs after this time hangs and is killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// A database that belongs to one test.
pub(crate) struct Database {
    name: &'static str,
    pub(crate) url: String,
}

pub(crate) fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start().expect("the server starts"))
}

impl Database {
    pub(crate) fn new(name: &'static str, script: &str) -> Self {
        let url = server().create_database(name).expect("the database is created");
        let database = Self { name, url };
        database.sql(script);
        database
    }

    pub(crate) fn sql(&self, script: &str) -> String {
        self.try_sql(script).expect("the SQL is valid")
    }

    pub(crate) fn try_sql(&self, script: &str) -> Result<String, backends::Error> {
        server().psql(self.name, script)
    }

    /// Returns a connection string for the Unix socket, where the kernel buffers little.
    pub(crate) fn socket_url(&self) -> String {
        format!(
            "host={} port={} user=postgres password={} dbname={}",
            server().socket_dir().display(),
            server().port(),
            server().password(),
            self.name
        )
    }

    /// Counts the program's backends that satisfy `condition`.
    fn backends(&self, condition: &str) -> usize {
        let count = self.sql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND application_name = 'fraiseql-stream' AND {condition}",
            self.name
        ));
        count.trim().parse().expect("psql prints a count")
    }

    /// Waits until the program's backend has the wait event `event`.
    pub(crate) fn wait_for_backend_in(&self, event: &str) {
        let condition = format!("wait_event = '{event}'");
        assert!(wait_until(TIMEOUT, || self.backends(&condition) == 1), "no backend waits for {event}");
    }

    pub(crate) fn has_backend(&self) -> bool {
        self.backends("true") > 0
    }

    /// Fails unless the program's backend has ended by `deadline`.
    pub(crate) fn assert_no_backend(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(wait_until(left, || !self.has_backend()), "the backend is still there");
    }

    /// Returns a command that runs the program on this database, without telemetry.
    pub(crate) fn ndjson(&self, args: &[&str]) -> Command {
        ndjson(&self.url, args)
    }

    /// Runs the program, which must succeed, and returns its output.
    pub(crate) fn lines(&self, args: &[&str]) -> String {
        let output = self.ndjson(args).output().expect("the program runs");
        assert_eq!(text(&output.stderr), "");
        assert!(output.status.success(), "{}", output.status);
        text(&output.stdout)
    }

    /// Runs the program, which must fail, and returns its error: one line, without the password.
    pub(crate) fn failure(&self, args: &[&str]) -> String {
        error_line(&self.ndjson(args).output().expect("the program runs"))
    }
}

pub(crate) fn ndjson(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command.args(args).env("DATABASE_URL", url);
    command
}

/// Returns the same command with SIGHUP set to `default`, or to `ignore` as under `nohup`, whatever this process has set.
pub(crate) fn with_sighup(action: &str, program: &Command) -> Command {
    let mut command = Command::new("env");
    command.arg(format!("--{action}-signal=HUP")).arg(program.get_program()).args(program.get_args());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Checks that the program failed with exit code 1 and one line on standard error, and returns that line.
pub(crate) fn error_line(output: &Output) -> String {
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert_eq!(line.matches('\n').count(), 1, "{line}");
    assert!(line.starts_with("ndjson: "), "{line}");
    assert!(!line.contains(server().password()), "{line}");
    line.trim_end().to_owned()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the output is UTF-8")
}

/// Builds the example once, in the same profile as this test, and returns its path.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // The variables that cargo sets for a test would make it rebuild some dependencies, and again for the next test.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| text.starts_with(prefix)) {
                cargo.env_remove(name);
            }
        }
        cargo
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["build", "--quiet", "--all-features", "--example", "ndjson"])
            .arg("--message-format=json-render-diagnostics");
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let built = cargo.stderr(Stdio::inherit()).output().expect("cargo runs");
        assert!(built.status.success(), "the example does not build");
        let messages = text(&built.stdout);
        let mut executables = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            message["executable"].as_str().map(PathBuf::from)
        });
        executables.next_back().expect("cargo reports the executable")
    })
}

/// The running program; killed on drop, or after `KILL_TIMEOUT`.
pub(crate) struct Running(Child, #[expect(dead_code, reason = "dropping it stops the timer")] Sender<()>);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command.spawn().expect("the program runs");
        let (sender, ended) = channel();
        let pid = child.id();
        thread::spawn(move || {
            if ended.recv_timeout(KILL_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
                send_signal("KILL", pid);
            }
        });
        Self(child, sender)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn stdout(&mut self) -> BufReader<impl Read + use<>> {
        BufReader::new(self.0.stdout.take().expect("stdout is piped"))
    }

    pub(crate) fn stderr(&mut self) -> BufReader<impl Read + use<>> {
        BufReader::new(self.0.stderr.take().expect("stderr is piped"))
    }

    pub(crate) fn signal(&self, name: &str) {
        assert!(send_signal(name, self.0.id()));
    }

    /// Fails if the program exits within this time.
    pub(crate) fn assert_runs_for(&mut self, time: Duration) {
        let ended = || self.0.try_wait().expect("it is a child of this process").is_some();
        assert!(!wait_until(time, ended), "the program has exited");
    }

    /// Waits for the program to exit; fails if it still runs after `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        let ended = wait_until(limit, || {
            status = self.0.try_wait().expect("it is a child of this process");
            status.is_some()
        });
        assert!(ended, "the program still runs after {limit:?}");
        status.expect("the program has exited")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads the next line, without its line break.
pub(crate) fn next_line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).expect("the stream is readable");
    line.trim_end().to_owned()
}

/// Parses the lines written by `--stats`, and checks the invariants of each.
pub(crate) fn stats(errors: &str) -> Vec<Value> {
    let lines = errors.lines().filter(|line| line.starts_with('{'));
    let stats: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect("the line is JSON")).collect();
    stats.iter().for_each(check);
    stats
}

fn check(stats: &Value) {
    let seconds = |part: &Value| part.as_f64().expect("the field is a number of seconds");
    let elapsed = seconds(&stats["elapsed_seconds"]);
    let time = &stats["time_seconds"];
    let parts = ["source_wait", "scheduled", "decode", "consumer", "paused"];
    let sum: f64 = parts.iter().map(|part| seconds(&time[part])).sum();
    assert!((sum - elapsed).abs() <= 0.01 * elapsed, "{stats}");
    let producer = ["source", "room"].map(|state| seconds(&stats["producer_time_seconds"][state]));
    assert!(producer.iter().sum::<f64>() <= 1.01 * elapsed + 0.001, "{stats}");
    assert!(seconds(&stats["backlog_seconds"]) <= elapsed, "{stats}");
    for count in ["rows", "bytes", "buffered_rows", "buffered_bytes"] {
        assert!(stats[count].is_u64(), "{stats}");
    }
    let verdicts = ["consumer_bound", "source_bound", "runtime_bound", "mixed", "balanced"];
    let verdict = stats["verdict"].as_str().expect("the verdict is a string");
    assert!(verdicts.contains(&verdict), "{stats}");
    assert!(stats["entity"].is_string(), "{stats}");
}
