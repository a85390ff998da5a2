//! A private Postgres server.

mod binaries;

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::account::Account;
use crate::error::{Context as _, Error};
use crate::process::{Dir, Plan, Process, free_ports, random_hex};
use binaries::Binaries;

/// Makes the database and becomes the server.
const LAUNCH: &str = r#"
bin=$1 dir=$2
shift 2
"$bin/initdb" -D "$dir/data" -U postgres -A scram-sha-256 --pwfile="$dir/password" \
    -E UTF8 --locale=C --no-sync --no-instructions || exit 1
rm "$dir/password"
exec "$bin/postgres" -D "$dir/data" "$@"
"#;

/// A killed server leaves its System V segment, whose id stands in postmaster.pid, and the system has few of them.
const CLEANUP: &str = r#"
set -- $(sed -n 7p "$dir/data/postmaster.pid" 2>/dev/null)
[ $# -eq 2 ] && ipcrm -m "$2"
"#;

/// Speed instead of durability, since the data is not to outlive the process.
const SETTINGS: [(&str, &str); 5] = [
    ("listen_addresses", "127.0.0.1"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    // In the data folder rather than /dev/shm, so that a killed server leaves nothing behind.
    ("dynamic_shared_memory_type", "mmap"),
];

/// A private Postgres server: loopback and Unix socket only, its own password, gone with its data on drop.
pub struct Postgres {
    process: Process,
    bin: PathBuf,
    major: u32,
    port: u16,
    password: String,
}

/// Settings for a [`Postgres`] to come.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    settings: Vec<(String, String)>,
    files: Vec<(String, Vec<u8>)>,
}

impl Builder {
    /// Sets a server setting, as in `postgresql.conf`: `set("max_connections", "500")`.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Puts a file that only the server can read beside its data folder; a setting names it as `../name`:
    /// `file("server.key", key).set("ssl_key_file", "../server.key")`.
    #[must_use]
    pub fn file(mut self, name: &str, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), contents.into()));
        self
    }

    /// Starts the server; returns when it takes connections, in less than a second if Postgres is installed.
    ///
    /// # Errors
    /// When there is no Postgres and none can be fetched, or the server does not start.
    pub fn start(&self) -> Result<Postgres, Error> {
        let account = Account::unprivileged()?;
        let binaries = Binaries::find(account)?;
        let mut attempts = 5;
        loop {
            attempts -= 1;
            let server = self.launch(&binaries, account)?;
            match server.wait_until_ready() {
                Ok(()) => return Ok(server),
                // Another program was given the port in between: take another one.
                Err(_) if attempts > 0 && server.log().contains("Address already in use") => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn launch(&self, binaries: &Binaries, account: Option<Account>) -> Result<Postgres, Error> {
        let dir = Dir::new("pg", account)?;
        let password = random_hex()?;
        dir.put("password", password.as_bytes(), account)?;
        for (name, contents) in &self.files {
            dir.put(name, contents, account)?;
        }
        let [port] = free_ports()?;
        let mut settings =
            vec![format!("port={port}"), format!("unix_socket_directories={}", dir.path().display())];
        settings.extend(SETTINGS.iter().map(|(name, value)| format!("{name}={value}")));
        settings.extend(self.settings.iter().map(|(name, value)| format!("{name}={value}")));
        let path = dir.path().to_owned();
        let mut command = ["/bin/sh", "-c", LAUNCH, "launch"].map(OsStr::new).to_vec();
        command.extend([binaries.bin.as_os_str(), path.as_os_str()]);
        command.extend(settings.iter().flat_map(|setting| [OsStr::new("-c"), OsStr::new(setting)]));
        // SIGINT is the fast shutdown, which ends the clients' sessions; SIGQUIT the immediate one.
        let plan = Plan { account, signals: ["INT", "QUIT"], cleanup: CLEANUP, env: &[], command: &command };
        let process = Process::start(dir, &plan)?;
        Ok(Postgres { process, bin: binaries.bin.clone(), major: binaries.major, port, password })
    }
}

impl Postgres {
    /// Starts a server with the usual settings.
    ///
    /// # Errors
    /// As for [`Builder::start`].
    pub fn start() -> Result<Self, Error> {
        Self::builder().start()
    }

    /// A server with settings of its own.
    pub fn builder() -> Builder {
        Builder::default()
    }

    fn wait_until_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if self.lock_file_line(8).is_some_and(|line| line == "ready") {
                return Ok(());
            }
            if self.process.has_exited() || Instant::now() > deadline {
                return Err(Error::new(format!(
                    "the Postgres of {} did not start: {}",
                    self.bin.display(),
                    self.process.log_tail()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A line, counted from 1, of the file in which a server says how it is.
    fn lock_file_line(&self, number: usize) -> Option<String> {
        let text = fs::read_to_string(self.process.dir().join("data/postmaster.pid")).ok()?;
        text.lines().nth(number - 1).map(|line| line.trim().to_owned())
    }

    /// The URL of the database `postgres`, with the superuser `postgres` and the password, by TCP.
    pub fn url(&self) -> String {
        self.url_for("postgres")
    }

    /// The URL of another database, whose name is plain (letters, digits, `_`).
    pub fn url_for(&self, database: &str) -> String {
        format!("postgres://postgres:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// The port on 127.0.0.1, and in the name of the Unix socket.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The password of the superuser `postgres`; asked for by SCRAM-SHA-256.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// The folder of the Unix socket: `host` in a connection string.
    pub fn socket_dir(&self) -> &Path {
        self.process.dir()
    }

    /// The pid of the postmaster.
    ///
    /// # Panics
    /// When the server was stopped.
    pub fn postmaster_pid(&self) -> u32 {
        self.lock_file_line(1).and_then(|line| line.parse().ok()).expect("the server is running")
    }

    /// The major version, such as 18.
    pub fn version(&self) -> u32 {
        self.major
    }

    /// All that the server has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Makes a database with a plain name and returns its URL.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn create_database(&self, name: &str) -> Result<String, Error> {
        self.psql("postgres", &format!("CREATE DATABASE \"{name}\""))?;
        Ok(self.url_for(name))
    }

    /// Runs a script in `database` by the server's own `psql`, up to the first error; returns what it prints, unaligned.
    ///
    /// # Errors
    /// When there is no `psql` beside the server, or a statement fails.
    pub fn psql(&self, database: &str, script: &str) -> Result<String, Error> {
        let program = self.bin.join("psql");
        let mut command = Command::new(&program);
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d"]).arg(self.url_for(database));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context(format!("cannot run {}", program.display()))?;
        let mut input = child.stdin.take();
        let output = std::thread::scope(|scope| {
            // Written beside the reading: neither pipe can fill up and stop the other.
            scope.spawn(move || input.as_mut().map(|input| input.write_all(script.as_bytes())));
            child.wait_with_output()
        });
        let output = output.context("psql was lost")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::new(format!("psql: {}", String::from_utf8_lossy(&output.stderr))))
    }

    /// Stops the server as an administrator does: sessions are ended, and told so. Returns when it is down.
    ///
    /// # Errors
    /// When it does not stop.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.end("INT", &[])
    }

    /// Kills the server and its sessions, as the loss of the machine would. Returns when the postmaster is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&self) -> Result<(), Error> {
        // Not every Linux has this file; without it, the sessions end by themselves when they miss the postmaster.
        let pid = self.postmaster_pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        self.process.end("KILL", &children)
    }
}

/// Without the password.
impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("version", &self.major)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}
