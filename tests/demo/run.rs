//! One run of the demo.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use backends::wait_until;

/// One at a time: the verdicts of two would be about each other.
static TURN: Mutex<()> = Mutex::new(());

/// A run to come.
pub(crate) struct Demo {
    command: Command,
    dir: PathBuf,
}

/// A run that has begun.
pub(crate) struct Running {
    child: Child,
    stdout: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    reads: Arc<AtomicBool>,
    dir: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Builds the demo, as its users do, and says where it is.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo has set for us, it would take for a change and build anew what looks at it (ring does).
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                cargo.env_remove(&*name);
            }
        }
        cargo.args(["build", "--release", "--example", "demo"]);
        cargo.args(["--message-format", "json-render-diagnostics"]);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(Stdio::inherit());
        let output = cargo.output().expect("cargo runs");
        assert!(output.status.success(), "the demo does not build");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|message: &serde_json::Value| message["target"]["name"] == "demo")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .expect("cargo says where it put the demo")
    })
}

impl Demo {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new(program());
        // Nothing of ours may change what the demo does.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("OTEL_") || ["DATABASE_URL", "NO_COLOR"].contains(&&*name) {
                command.env_remove(&*name);
            }
        }
        // What its server leaves behind can only be here.
        let dir = PathBuf::from(format!("/tmp/fraiseql-demo-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).expect("a folder for temporary files");
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).expect("it is ours");
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
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = self.command.spawn().expect("the demo starts");
        let (stdout, reads) = (Arc::<Mutex<String>>::default(), Arc::new(AtomicBool::new(true)));
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let (seen, go_on) = (Arc::clone(&stdout), Arc::clone(&reads));
        // The pipe closes with the thread.
        let reader = std::thread::spawn(move || {
            while go_on.load(Ordering::Relaxed)
                && let Some(Ok(line)) = lines.next()
            {
                *lock(&seen) += &(line + "\n");
            }
        });
        Running { child, stdout, reader: Some(reader), reads, dir: self.dir, _turn: turn }
    }
}

impl Running {
    /// Waits until it has said something.
    pub(crate) fn wait_for(&self, text: &str) {
        let said = || lock(&self.stdout).contains(text);
        assert!(wait_until(Duration::from_secs(60), said), "no {text:?} in {}", lock(&self.stdout));
    }

    pub(crate) fn signal(&self, name: &str) {
        assert!(backends::send_signal(name, self.child.id()));
    }

    /// Closes the pipe behind the next line.
    pub(crate) fn stop_reading(&self) {
        self.reads.store(false, Ordering::Relaxed);
    }

    /// Waits until it has ended; kills it if it does not.
    pub(crate) fn end(&mut self, timeout: Duration) -> End {
        let ended = wait_until(timeout, || matches!(self.child.try_wait(), Ok(Some(_))));
        if !ended {
            let _ = self.child.kill();
        }
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().expect("it is piped, and this is called once");
        pipe.read_to_string(&mut stderr).expect("it is text");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the output is text");
        }
        let end = End {
            code: self.child.wait().ok().and_then(|status| status.code()),
            stdout: lock(&self.stdout).clone(),
            stderr,
        };
        assert!(ended, "it did not end within {timeout:?}: {end:#?}");
        end
    }

    /// Files and processes of its server that are still there.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let files = std::fs::read_dir(&self.dir).expect("the folder is ours").flatten();
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
