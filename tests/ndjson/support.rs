//! A server for all tests, a database for each, and the program.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use backends::{Postgres, send_signal, wait_until};
use serde_json::Value;

/// For what takes milliseconds, on a machine that is busy with all the other tests.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// How long the program may take to stop, and its query to be gone from the server.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(1);

/// For a program that hangs.
const TOO_LONG: Duration = Duration::from_secs(60);

/// A database of the test's own.
pub(crate) struct Database {
    name: &'static str,
    pub(crate) url: String,
}

pub(crate) fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start().expect("a server"))
}

impl Database {
    pub(crate) fn new(name: &'static str, script: &str) -> Self {
        let url = server().create_database(name).expect("a new database");
        let database = Self { name, url };
        database.sql(script);
        database
    }

    pub(crate) fn sql(&self, script: &str) -> String {
        self.try_sql(script).expect("good SQL")
    }

    pub(crate) fn try_sql(&self, script: &str) -> Result<String, backends::Error> {
        server().psql(self.name, script)
    }

    /// The URL by the Unix socket, where the kernel buffers little.
    pub(crate) fn socket_url(&self) -> String {
        format!(
            "host={} port={} user=postgres password={} dbname={}",
            server().socket_dir().display(),
            server().port(),
            server().password(),
            self.name
        )
    }

    /// How many backends serve the program here that are in such a state.
    fn backends(&self, condition: &str) -> usize {
        let count = self.sql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND application_name = 'fraiseql-stream' AND {condition}",
            self.name
        ));
        count.trim().parse().expect("a count")
    }

    /// Waits until the program's backend waits for such an event.
    pub(crate) fn until_backend_waits(&self, event: &str) {
        let condition = format!("wait_event = '{event}'");
        assert!(wait_until(SOON, || self.backends(&condition) == 1), "no backend in {event}");
    }

    pub(crate) fn has_backend(&self) -> bool {
        self.backends("true") > 0
    }

    /// Fails unless the program's backend is gone by `deadline`.
    pub(crate) fn assert_no_backend(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(wait_until(left, || !self.has_backend()), "the backend is still there");
    }

    /// The program on this database, without telemetry.
    pub(crate) fn ndjson(&self, args: &[&str]) -> Command {
        ndjson(&self.url, args)
    }

    /// What it writes when all is well.
    pub(crate) fn lines(&self, args: &[&str]) -> String {
        let output = self.ndjson(args).output().expect("it runs");
        assert_eq!(text(&output.stderr), "");
        assert!(output.status.success(), "{}", output.status);
        text(&output.stdout)
    }

    /// What it says when it fails: one line, without the password.
    pub(crate) fn failure(&self, args: &[&str]) -> String {
        complaint(&self.ndjson(args).output().expect("it runs"))
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

/// The same program with SIGHUP set to `default`, or to `ignore` as by `nohup`, whatever holds for this process.
pub(crate) fn with_hangup(effect: &str, program: &Command) -> Command {
    let mut command = Command::new("env");
    command.arg(format!("--{effect}-signal=HUP")).arg(program.get_program()).args(program.get_args());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Checks that it is a failure as it should be, and returns its line.
pub(crate) fn complaint(output: &Output) -> String {
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert_eq!(line.matches('\n').count(), 1, "{line}");
    assert!(line.starts_with("ndjson: "), "{line}");
    assert!(!line.contains(server().password()), "{line}");
    line.trim_end().to_owned()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// The example, built once as this test was: with or without optimisation.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo sets for a test would make it build some dependencies anew, and again for the next test.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| text.starts_with(prefix)) {
                cargo.env_remove(name);
            }
        }
        cargo
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["build", "--quiet", "--example", "ndjson"])
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
        executables.next_back().expect("cargo tells what it built")
    })
}

/// The program while it runs; killed when the test fails, or waits for it for too long.
pub(crate) struct Running(Child, #[expect(dead_code, reason = "its drop tells")] Sender<()>);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command.spawn().expect("it runs");
        let (sender, ended) = channel();
        let pid = child.id();
        thread::spawn(move || {
            if ended.recv_timeout(TOO_LONG) == Err(RecvTimeoutError::Timeout) {
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

    /// Fails if it ends within this time.
    pub(crate) fn stays(&mut self, time: Duration) {
        let ended = || self.0.try_wait().expect("it is our child").is_some();
        assert!(!wait_until(time, ended), "it has ended");
    }

    /// Waits for its end, which must come within `limit`.
    pub(crate) fn end(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        let ended = wait_until(limit, || {
            status = self.0.try_wait().expect("it is our child");
            status.is_some()
        });
        assert!(ended, "it still runs after {limit:?}");
        status.expect("it has ended")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The next line, without its end.
pub(crate) fn next_line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).expect("a line");
    line.trim_end().to_owned()
}

/// The lines of `--stats`, checked for what each must have.
pub(crate) fn stats(errors: &str) -> Vec<Value> {
    let lines = errors.lines().filter(|line| line.starts_with('{'));
    let stats: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect("JSON")).collect();
    stats.iter().for_each(check);
    stats
}

fn check(stats: &Value) {
    let seconds = |part: &Value| part.as_f64().expect("seconds");
    let elapsed = seconds(&stats["elapsed_seconds"]);
    let time = &stats["time"];
    let parts = ["source_wait", "scheduled", "decode", "consumer", "paused"];
    let sum: f64 = parts.iter().map(|part| seconds(&time[part])).sum();
    assert!((sum - elapsed).abs() <= 0.01 * elapsed, "{stats}");
    let producer = ["source", "room"].map(|state| seconds(&stats["producer_time"][state]));
    assert!(producer.iter().sum::<f64>() <= 1.01 * elapsed + 0.001, "{stats}");
    assert!(seconds(&stats["backlog_seconds"]) <= elapsed, "{stats}");
    for count in ["rows", "bytes", "buffered_rows", "buffered_bytes"] {
        assert!(stats[count].is_u64(), "{stats}");
    }
    let verdicts = ["consumer_bound", "source_bound", "runtime_bound", "mixed", "balanced"];
    let verdict = stats["verdict"].as_str().expect("a verdict");
    assert!(verdicts.contains(&verdict), "{stats}");
    assert!(stats["entity"].is_string(), "{stats}");
}
