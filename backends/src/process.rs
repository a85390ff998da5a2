//! A server that cannot outlive us, and the folder that goes with it.

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

/// Holds the server, and reads a pipe that only we hold: when we are gone, in whatever way, the pipe closes, and it
/// stops the server and removes the folder. A line `SIGNAL PID...` on the pipe sends that signal.
///
/// Nothing is signalled after `exited` is there, since the pid may be another program's by then.
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
# A killed server's children may still be writing.
for _ in 1 2 3 4 5 6 7 8 9 10; do rm -rf "$dir" && break; sleep 0.1; done
"#;

/// What to start, and how it is stopped.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) account: Option<Account>,
    /// The signal that asks it to stop, and the one that follows 5 s later.
    pub(crate) signals: [&'static str; 2],
    /// Shell commands that run once it is gone, while `$dir` is still there.
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
        // Nothing of ours may change what the server does (PGDATA, PGPORT, OTEL_...).
        command.env_clear().env("PATH", path()).env("LC_ALL", "C").env("TZ", "UTC");
        command.envs(plan.env.iter().copied());
        // A group of its own: Ctrl-C must reach us alone, so that we can still talk to the server while we wind up.
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

    /// The server's own pid; `None` in the moment before it is known.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.read("pid").trim().parse().ok()
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.dir().join("exited").exists()
    }

    /// All that the server has said.
    pub(crate) fn log(&self) -> String {
        self.read("log")
    }

    /// The last lines of the log, for an error.
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

    /// Has a signal sent to `pids` by the supervisor, which runs as the server's account.
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

    /// Sends the signal to the server and `others`, and waits until it is gone. The folder stays until drop.
    pub(crate) fn end(&self, signal: &str, others: &[u32]) -> Result<(), Error> {
        let pid = self.pid().ok_or_else(|| Error::new("the server has no pid yet"))?;
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
        // It ends within 8 s, with SIGKILL at the worst; usually in a tenth of one.
        let _ = self.supervisor.get_mut().unwrap_or_else(PoisonError::into_inner).wait();
    }
}

/// Our own PATH, and the standard places after it, for the supervisor's `rm` and `sleep`.
fn path() -> String {
    format!("{}:/usr/local/bin:/usr/bin:/bin", std::env::var("PATH").unwrap_or_default())
}

/// A folder for one server; removed on drop.
#[derive(Debug)]
pub(crate) struct Dir(PathBuf);

impl Dir {
    /// Makes it where `account` can come to and remove it, with a path short enough for a Unix socket in it (107 bytes).
    pub(crate) fn new(kind: &str, account: Option<Account>) -> Result<Self, Error> {
        let suits = |base: &PathBuf| {
            base.as_os_str().len() < 70 && (account.is_none() || account::open_to_others(base, 0o7))
        };
        let bases = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
        let base = bases
            .into_iter()
            .find(suits)
            .ok_or_else(|| Error::new("no folder for temporary files: /tmp and /var/tmp are closed"))?;
        let path = base.join(format!("fraiseql-{kind}-{:.12}", random_hex()?));
        fs::DirBuilder::new().mode(0o700).create(&path).context(format!("cannot make {}", path.display()))?;
        let dir = Self(path);
        dir.give_to(dir.path(), account, 0o755)?;
        Ok(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Puts a file that only `account` can read.
    pub(crate) fn put(&self, name: &str, contents: &[u8], account: Option<Account>) -> Result<(), Error> {
        let path = self.0.join(name);
        fs::write(&path, contents).context(format!("cannot write {}", path.display()))?;
        self.give_to(&path, account, 0o600)
    }

    fn give_to(&self, path: &Path, account: Option<Account>, mode: u32) -> Result<(), Error> {
        let given =
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).and_then(|()| match account {
                Some(Account { uid, gid }) => std::os::unix::fs::chown(path, Some(uid), Some(gid)),
                None => Ok(()),
            });
        given.context(format!("cannot hand over {}", self.0.display()))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // Usually the supervisor has done it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// 32 random hexadecimal digits.
pub(crate) fn random_hex() -> Result<String, Error> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// Ports of 127.0.0.1 that are free now. All are held until all are known, so they differ.
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

/// Tells the user why it takes a while. Not by `eprintln!`, which a test's harness would hold back.
pub(crate) fn announce(message: &str) {
    let _ = writeln!(io::stderr(), "{message}");
}
