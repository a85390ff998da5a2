//! A server process that cannot outlive its owner, and its folder.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::account::{self, Account};
use crate::error::{Context as _, Error};
use crate::wait_until;

/// Runs the server and reads a pipe whose other end only this process holds. However this process ends, the pipe closes,
/// and the supervisor stops the server and removes the folder. A line `SIGNAL PID...` on the pipe sends that signal.
///
/// No signal is sent once the file `exited` exists, since the pid may then belong to another process.
const SUPERVISOR: &str = r#"
dir=$1 soft=$2 hard=$3 cleanup=$4
shift 4
exec 3<&0 </dev/null
"$@" 3<&- >>"$dir/log" 2>&1 &
server=$!
echo "$server" >"$dir/pid"
{
    while read -r signal pids; do kill -s "$signal" $pids; done <&3
    tries=0
    while [ ! -e "$dir/exited" ] && kill -s "$soft" "$server"; do
        tries=$((tries + 1))
        [ "$tries" -eq 100 ] && soft=$hard
        [ "$tries" -eq 150 ] && soft=KILL
        sleep 0.05
    done
} &
wait "$server"
echo "$?" >"$dir/exited"
wait
eval "$cleanup"
# The children of a killed server may still be writing.
for _ in 1 2 3 4 5 6 7 8 9 10; do rm -rf "$dir" && break; sleep 0.1; done
"#;

/// What to start, and how to stop it.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) account: Option<Account>,
    /// The signal that asks the server to stop, and the one that follows after 5 s.
    pub(crate) signals: [&'static str; 2],
    /// Shell commands that run after the server has exited and before `$dir` is removed.
    pub(crate) cleanup: &'static str,
    pub(crate) env: &'a [(&'a str, &'a str)],
    /// The program and its arguments.
    pub(crate) command: &'a [&'a OsStr],
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Process {
    supervisor: Mutex<Child>,
    pipe: Mutex<Option<ChildStdin>>,
    dir: Dir,
}

impl Process {
    pub(crate) fn start(dir: Dir, plan: &Plan<'_>) -> Result<Self, Error> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", SUPERVISOR, "supervisor"]).arg(dir.path()).args(plan.signals).arg(plan.cleanup);
        command.args(plan.command);
        // The environment of this process must not affect the server (PGDATA, PGPORT, OTEL_...).
        command.env_clear().env("PATH", path()).env("LC_ALL", "C").env("TZ", "UTC");
        command.envs(plan.env.iter().copied());
        // A separate process group: Ctrl-C must reach this process only, which may still use the server to shut down.
        command.process_group(0).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut supervisor =
            account::run_as(&mut command, plan.account).spawn().context("cannot run /bin/sh")?;
        let pipe = supervisor.stdin.take();
        Ok(Self { supervisor: Mutex::new(supervisor), pipe: Mutex::new(pipe), dir })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the server's pid, or `None` if it is not known yet.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.read("pid").trim().parse().ok()
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.dir().join("exited").exists()
    }

    /// Returns all output of the server.
    pub(crate) fn log(&self) -> String {
        self.read("log")
    }

    /// Returns the last lines of the log, for an error message.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    fn read(&self, name: &str) -> String {
        fs::read(self.dir().join(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Sends a signal to `pids` through the supervisor, which runs as the server's account.
    pub(crate) fn signal(&self, name: &str, pids: &[u32]) -> Result<(), Error> {
        let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        match pipe.as_mut() {
            Some(pipe) if !self.has_exited() => {
                writeln!(pipe, "{name} {}", pids.join(" ")).context("cannot signal the server")
            }
            _ => Ok(()),
        }
    }

    /// Sends the signal to the server and `others`, and waits until the server has exited. The folder stays until drop.
    pub(crate) fn end(&self, signal: &str, others: &[u32]) -> Result<(), Error> {
        let pid = self.pid().ok_or_else(|| Error::new("the server has not started yet"))?;
        self.signal(signal, &[&[pid], others].concat())?;
        if wait_until(Duration::from_secs(10), || self.has_exited()) {
            return Ok(());
        }
        Err(Error::new(format!(
            "the server (pid {pid}) did not stop within 10 s of SIG{signal}: {}",
            self.log_tail()
        )))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.pipe.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        // The supervisor exits within 8 s, after SIGKILL at the latest, and usually within 100 ms.
        let _ = self.supervisor.get_mut().unwrap_or_else(PoisonError::into_inner).wait();
    }
}

/// Returns `PATH` followed by the standard folders, which the supervisor needs for `rm` and `sleep`.
fn path() -> String {
    format!("{}:/usr/local/bin:/usr/bin:/bin", std::env::var("PATH").unwrap_or_default())
}

/// The folder of one server; removed on drop.
#[derive(Debug)]
pub(crate) struct Dir(PathBuf);

impl Dir {
    /// Creates the folder where `account` can use and remove it, with a path short enough for a Unix socket (107 bytes).
    pub(crate) fn new(kind: &str, account: Option<Account>) -> Result<Self, Error> {
        let is_suitable = |base: &PathBuf| {
            base.as_os_str().len() < 70 && (account.is_none() || account::open_to_others(base, 0o7))
        };
        let bases = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
        let base = bases
            .into_iter()
            .find(is_suitable)
            .ok_or_else(|| Error::new("no suitable folder for temporary files (TMPDIR, /tmp, /var/tmp); set TMPDIR to a short path that every user can write to"))?;
        let path = base.join(format!("fraiseql-{kind}-{:.12}", random_hex()?));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .context(format!("cannot create {}", path.display()))?;
        let dir = Self(path);
        dir.give_to(dir.path(), account, 0o755)?;
        Ok(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file that only `account` can read.
    pub(crate) fn put(&self, name: &str, contents: &[u8], account: Option<Account>) -> Result<(), Error> {
        let path = self.0.join(name);
        fs::write(&path, contents).context(format!("cannot write {}", path.display()))?;
        self.give_to(&path, account, 0o600)
    }

    fn give_to(&self, path: &Path, account: Option<Account>, mode: u32) -> Result<(), Error> {
        let result =
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).and_then(|()| match account {
                Some(Account { uid, gid }) => std::os::unix::fs::chown(path, Some(uid), Some(gid)),
                None => Ok(()),
            });
        result.context(format!("cannot change the owner of the files in {}", self.0.display()))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // Usually the supervisor has already removed it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Returns 32 random hexadecimal digits.
pub(crate) fn random_hex() -> Result<String, Error> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// Returns ports of 127.0.0.1 that are currently free. All are bound at the same time, so they differ.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N], Error> {
    let mut held = Vec::with_capacity(N);
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?;
        *port = listener.local_addr().context("no free port on 127.0.0.1")?.port();
        held.push(listener);
    }
    Ok(ports)
}

/// Writes a progress message to standard error, but not by `eprintln!`, whose output the test harness captures.
pub(crate) fn announce(message: &str) {
    let _ = writeln!(io::stderr(), "{message}");
}
