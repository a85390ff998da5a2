//! A run of the demo.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use backends::wait_until;

/// Held during a run: two runs at once would affect each other's verdicts.
static LOCK: Mutex<()> = Mutex::new(());

/// A run that has not started yet.
pub(crate) struct Demo {
    command: Command,
    dir: PathBuf,
}

/// A run that has started. The process is killed on drop.
pub(crate) struct Running {
    child: Child,
    stdout: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    is_reading: Arc<AtomicBool>,
    dir: PathBuf,
    _lock: MutexGuard<'static, ()>,
}

/// The result of a run.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Builds the demo as its users do, and returns the path of the executable.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // Cargo would rebuild the dependencies that read the variables it has set for this test, such as ring.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                cargo.env_remove(&*name);
            }
        }
        cargo.args(["build", "--release", "--features", "otlp", "--example", "demo"]);
        cargo.args(["--message-format", "json-render-diagnostics"]);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(Stdio::inherit());
        let output = cargo.output().expect("cargo runs");
        assert!(output.status.success(), "the demo does not build");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|message: &serde_json::Value| message["target"]["name"] == "demo")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .expect("cargo reports the executable")
    })
}

impl Demo {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new(program());
        // The environment of this test must not affect the demo.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("OTEL_") || ["DATABASE_URL", "NO_COLOR"].contains(&&*name) {
                command.env_remove(&*name);
            }
        }
        // Any leftovers of its server are in this folder.
        let dir = PathBuf::from(format!("/tmp/fraiseql-demo-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).expect("the temporary folder is created");
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777))
            .expect("the folder is our own");
        command.env("TMPDIR", &dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, dir }
    }

    pub(crate) fn rows(self, rows: u32) -> Self {
        self.arg(&format!("--rows={rows}"))
    }

    pub(crate) fn arg(mut self, arg: &str) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn start(mut self) -> Running {
        let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = self.command.spawn().expect("the demo starts");
        let (stdout, is_reading) = (Arc::<Mutex<String>>::default(), Arc::new(AtomicBool::new(true)));
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let (seen, continues) = (Arc::clone(&stdout), Arc::clone(&is_reading));
        // The pipe closes when the thread ends.
        let reader = std::thread::spawn(move || {
            while continues.load(Ordering::Relaxed)
                && let Some(Ok(line)) = lines.next()
            {
                *lock(&seen) += &(line + "\n");
            }
        });
        Running { child, stdout, reader: Some(reader), is_reading, dir: self.dir, _lock: guard }
    }
}

impl Running {
    /// Waits until the demo has printed `text`.
    pub(crate) fn wait_for(&self, text: &str) {
        let is_printed = || lock(&self.stdout).contains(text);
        assert!(wait_until(Duration::from_secs(60), is_printed), "no {text:?} in {}", lock(&self.stdout));
    }

    pub(crate) fn signal(&self, name: &str) {
        assert!(backends::send_signal(name, self.child.id()));
    }

    /// Closes the pipe after the next line.
    pub(crate) fn stop_reading(&self) {
        self.is_reading.store(false, Ordering::Relaxed);
    }

    /// Waits until the demo exits; kills it and fails after `timeout`.
    pub(crate) fn end(&mut self, timeout: Duration) -> End {
        let ended = wait_until(timeout, || matches!(self.child.try_wait(), Ok(Some(_))));
        if !ended {
            let _ = self.child.kill();
        }
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().expect("stderr is piped, and `end` is called once");
        pipe.read_to_string(&mut stderr).expect("stderr is UTF-8");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader thread does not panic");
        }
        let end = End {
            code: self.child.wait().ok().and_then(|status| status.code()),
            stdout: lock(&self.stdout).clone(),
            stderr,
        };
        assert!(ended, "the demo did not exit within {timeout:?}: {end:#?}");
        end
    }

    /// Returns the remaining files and processes of the demo's server.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let files = std::fs::read_dir(&self.dir).expect("the folder is readable").flatten();
        let files = files.map(|file| file.path().display().to_string());
        let dir = self.dir.display().to_string();
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = processes
            .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
            .map(|command| String::from_utf8_lossy(&command).replace('\0', " "))
            .filter(|command| command.contains(&dir));
        files.chain(processes).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
