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

/// Creates the database cluster, then replaces itself by the server.
const LAUNCH: &str = r#"
bin=$1 dir=$2
shift 2
"$bin/initdb" -D "$dir/data" -U postgres -A scram-sha-256 --pwfile="$dir/password" \
    -E UTF8 --locale=C --no-sync --no-instructions || exit 1
rm "$dir/password"
exec "$bin/postgres" -D "$dir/data" "$@"
"#;

/// Removes the System V shared memory segment that a killed server leaves behind, since the system has few of them. Its
/// id is in postmaster.pid.
const CLEANUP: &str = r#"
set -- $(sed -n 7p "$dir/data/postmaster.pid" 2>/dev/null)
[ $# -eq 2 ] && ipcrm -m "$2"
"#;

/// Settings that trade durability for speed, since the data does not outlive the process.
const SETTINGS: [(&str, &str); 5] = [
    ("listen_addresses", "127.0.0.1"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    // Shared memory in the data folder rather than in /dev/shm, so that a killed server leaves nothing behind.
    ("dynamic_shared_memory_type", "mmap"),
];

/// A private Postgres server with a random password that listens on loopback and on a Unix socket only. The server and
/// its data are removed on drop.
pub struct Postgres {
    process: Process,
    bin: PathBuf,
    major: u32,
    port: u16,
    password: String,
}

/// A builder for a [`Postgres`] with custom settings and files.
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

    /// Adds a file that only the server can read, next to its data folder. Settings refer to it as `../name`:
    /// `file("server.key", key).set("ssl_key_file", "../server.key")`.
    #[must_use]
    pub fn file(mut self, name: &str, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), contents.into()));
        self
    }

    /// Starts the server and waits until it accepts connections, which takes less than a second if Postgres is installed.
    ///
    /// # Errors
    /// If Postgres is neither installed nor can be downloaded, or the server does not start.
    pub fn start(&self) -> Result<Postgres, Error> {
        let account = Account::unprivileged()?;
        let binaries = Binaries::find(account)?;
        let mut attempts = 5;
        loop {
            attempts -= 1;
            let server = self.launch(&binaries, account)?;
            match server.wait_until_ready() {
                Ok(()) => return Ok(server),
                // Another program has taken the port in the meantime: retry with another one.
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
        // SIGINT requests a fast shutdown, which terminates the clients' sessions, and SIGQUIT an immediate one.
        let plan = Plan { account, signals: ["INT", "QUIT"], cleanup: CLEANUP, env: &[], command: &command };
        let process = Process::start(dir, &plan)?;
        Ok(Postgres { process, bin: binaries.bin.clone(), major: binaries.major, port, password })
    }
}

impl Postgres {
    /// Starts a server with the default settings.
    ///
    /// # Errors
    /// Same as for [`Builder::start`].
    pub fn start() -> Result<Self, Error> {
        Self::builder().start()
    }

    /// Returns a builder for a server with custom settings.
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
                    "Postgres in {} did not start: {}",
                    self.bin.display(),
                    self.process.log_tail()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns a line, counted from 1, of postmaster.pid, which contains the server's status.
    fn lock_file_line(&self, number: usize) -> Option<String> {
        let text = fs::read_to_string(self.process.dir().join("data/postmaster.pid")).ok()?;
        text.lines().nth(number - 1).map(|line| line.trim().to_owned())
    }

    /// Returns the URL of the database `postgres` for the superuser `postgres` over TCP, including the password.
    pub fn url(&self) -> String {
        self.url_for("postgres")
    }

    /// Returns the URL of another database, whose name must consist of letters, digits and `_`.
    pub fn url_for(&self, database: &str) -> String {
        format!("postgres://postgres:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Returns the port on 127.0.0.1, which is also part of the Unix socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the password of the superuser `postgres`, for authentication by SCRAM-SHA-256.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// Returns the folder of the Unix socket, to be used as `host` in a connection string.
    pub fn socket_dir(&self) -> &Path {
        self.process.dir()
    }

    /// Returns the pid of the postmaster.
    ///
    /// # Panics
    /// If the server has been stopped.
    pub fn postmaster_pid(&self) -> u32 {
        self.lock_file_line(1).and_then(|line| line.parse().ok()).expect("the server is running")
    }

    /// Returns the major version, such as 18.
    pub fn version(&self) -> u32 {
        self.major
    }

    /// Returns the server's log.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Creates a database, whose name must consist of letters, digits and `_`, and returns its URL.
    ///
    /// # Errors
    /// If the server rejects the name, or already has such a database.
    pub fn create_database(&self, name: &str) -> Result<String, Error> {
        self.psql("postgres", &format!("CREATE DATABASE \"{name}\""))?;
        Ok(self.url_for(name))
    }

    /// Runs a script in `database` by the server's own `psql` and returns its unaligned output. Stops at the first error.
    ///
    /// # Errors
    /// If there is no `psql` in the server's folder, or a statement fails.
    pub fn psql(&self, database: &str, script: &str) -> Result<String, Error> {
        let program = self.bin.join("psql");
        let mut command = Command::new(&program);
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d"]).arg(self.url_for(database));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context(format!("cannot run {}", program.display()))?;
        let mut input = child.stdin.take();
        let output = std::thread::scope(|scope| {
            // The script is written while the output is read, so that neither pipe can fill up and block the other.
            scope.spawn(move || input.as_mut().map(|input| input.write_all(script.as_bytes())));
            child.wait_with_output()
        });
        let output = output.context("cannot read the output of psql")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::new(format!("psql: {}", String::from_utf8_lossy(&output.stderr))))
    }

    /// Stops the server as an administrator does: sessions are terminated, with an error. Returns when the server is down.
    ///
    /// # Errors
    /// If the server does not stop.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.end("INT", &[])
    }

    /// Kills the server and its sessions, as if the machine had crashed. Returns when the postmaster has exited.
    ///
    /// # Errors
    /// If the postmaster does not exit.
    pub fn kill(&self) -> Result<(), Error> {
        // Not every Linux has this file. Without it, the sessions exit when they notice that the postmaster is gone.
        let pid = self.postmaster_pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        self.process.end("KILL", &children)
    }
}

/// Does not show the password.
impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("version", &self.major)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}
