//! The private Postgres server: it works, and it never outlives its owner.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use backends::{Postgres, wait_until};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Set for a child process that holds a server; the value selects how the process ends.
const ENDING: &str = "BACKENDS_TEST_ENDING";

fn is_alive(pid: u32) -> bool {
    // A zombie has exited and only waits to be reaped by its parent.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Sends a startup message and returns the type of the answer and the authentication method it asks for.
fn greeting(socket: &mut (impl Read + Write)) -> (u8, u32) {
    // Length, protocol 3.0, parameters.
    socket.write_all(b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0").expect("the server reads");
    let mut answer = [0; 9];
    socket.read_exact(&mut answer).expect("the server answers");
    let [kind, _, _, _, _, method @ ..] = answer;
    (kind, u32::from_be_bytes(method))
}

#[test]
fn server_accepts_connections_over_tcp_and_socket_and_requires_scram() {
    let server = Postgres::start().unwrap();
    assert_eq!(greeting(&mut TcpStream::connect(("127.0.0.1", server.port())).unwrap()), (b'R', 10));
    let socket = server.socket_dir().join(format!(".s.PGSQL.{}", server.port()));
    assert_eq!(greeting(&mut UnixStream::connect(socket).unwrap()), (b'R', 10));
    let url = server.url();
    assert_eq!(
        url,
        format!("postgres://postgres:{}@127.0.0.1:{}/postgres", server.password(), server.port())
    );
    assert!(!format!("{server:?}").contains(server.password()));
}

#[test]
fn server_has_its_custom_settings_files_and_databases() {
    let server = Postgres::builder().set("max_connections", "33").file("word", "hello").start().unwrap();
    assert_eq!(server.psql("postgres", "SHOW max_connections").unwrap(), "33\n");
    assert_eq!(server.psql("postgres", "SELECT pg_read_file('../word')").unwrap(), "hello\n");
    assert_eq!(server.psql("postgres", "SHOW server_encoding; SHOW fsync").unwrap(), "UTF8\noff\n");
    let version = server.psql("postgres", "SHOW server_version_num").unwrap();
    assert_eq!(version.trim().parse::<u32>().unwrap() / 10_000, server.version());
    assert_eq!(server.create_database("shop").unwrap(), server.url_for("shop"));
    assert_eq!(server.psql("shop", "SELECT current_database()").unwrap(), "shop\n");
    let error = server.psql("shop", "SELECT 1/0").unwrap_err().to_string();
    assert!(error.contains("division by zero"), "{error}");
}

#[test]
fn several_servers_run_at_once() {
    let (one, two) = (Postgres::start().unwrap(), Postgres::start().unwrap());
    assert_ne!(one.port(), two.port());
    drop(one);
    assert_eq!(two.psql("postgres", "SELECT 1").unwrap(), "1\n");
}

#[test]
fn dropped_server_and_its_folder_are_removed_within_a_second() {
    let server = Postgres::start().unwrap();
    let (pid, folder) = (server.postmaster_pid(), server.socket_dir().to_owned());
    assert!(is_alive(pid) && folder.join("data").exists());
    // A connected client must not delay the shutdown.
    let mut client = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    greeting(&mut client);
    let start = Instant::now();
    drop(server);
    let took = start.elapsed();
    assert!(!is_alive(pid));
    assert!(!folder.exists());
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn log_of_a_stopped_or_killed_server_can_still_be_read() {
    let server = Postgres::start().unwrap();
    server.stop().unwrap();
    assert!(server.log().contains("database system is shut down"), "{}", server.log());

    let server = Postgres::start().unwrap();
    let segments = || std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let (pid, folder) = (server.postmaster_pid(), server.socket_dir().to_owned());
    let lock_file = std::fs::read_to_string(folder.join("data/postmaster.pid")).unwrap();
    let segment =
        lock_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)).unwrap().to_owned();
    let has_segment = || segments().lines().any(|line| line.split_whitespace().nth(1) == Some(&segment));
    assert!(has_segment());
    server.kill().unwrap();
    assert!(!is_alive(pid));
    assert!(!server.log().contains("is shut down"), "{}", server.log());
    drop(server);
    assert!(!folder.exists());
    assert!(!has_segment(), "the killed server left its segment {segment}");
}

#[test]
fn server_that_cannot_start_reports_why_and_leaves_no_folder() {
    // This file distinguishes the folder from those of other tests.
    let marker = format!("marker-{}", std::process::id());
    let builder = Postgres::builder().set("no_such_setting", "1").file(&marker, "");
    let error = builder.start().unwrap_err().to_string();
    assert!(error.contains("unrecognized configuration parameter \"no_such_setting\""), "{error}");
    assert!(!error.contains('\n'), "{error}");
    let left = |base: &Path| {
        let folders = std::fs::read_dir(base).into_iter().flatten().flatten();
        folders.map(|entry| entry.path()).filter(|folder| folder.join(&marker).exists()).collect::<Vec<_>>()
    };
    let left: Vec<PathBuf> =
        [std::env::temp_dir(), "/tmp".into()].iter().flat_map(|base| left(base)).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Statics are never dropped.
static HELD: OnceLock<Postgres> = OnceLock::new();

/// Not a test by itself: the tests below run it as a child process.
#[test]
fn child_that_holds_a_server() {
    let Ok(ending) = std::env::var(ENDING) else {
        return;
    };
    let server = HELD.get_or_init(|| Postgres::start().unwrap());
    writeln!(std::io::stderr(), "holding {} {}", server.postmaster_pid(), server.socket_dir().display())
        .unwrap();
    match ending.as_str() {
        "exit" => std::process::exit(0),
        "abort" => std::process::abort(),
        "psql" => drop(server.psql("postgres", "SELECT pg_sleep(600)")),
        _ => std::thread::sleep(Duration::from_secs(600)),
    }
}

/// Starts a child that holds a server, and returns it with the server's pid and folder.
fn child(ending: &str) -> (Child, u32, PathBuf) {
    let mut command = Command::new(std::env::current_exe().expect("the test has an executable"));
    command.args(["--exact", "child_that_holds_a_server", "--nocapture"]).env(ENDING, ending);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the child runs");
    let lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
    let line = lines
        .map_while(Result::ok)
        .find(|line| line.starts_with("holding "))
        .expect("the child has a server");
    let words: Vec<&str> = line.split(' ').collect();
    (child, words[1].parse().expect("the child prints a pid"), words[2].into())
}

fn assert_gone(pid: u32, folder: &Path) {
    assert!(wait_until(TIMEOUT, || !is_alive(pid)), "server {pid} is still running");
    assert!(wait_until(TIMEOUT, || !folder.exists()), "{} still exists", folder.display());
}

#[test]
fn server_is_removed_when_its_owner_exits_without_drop_or_aborts() {
    for ending in ["exit", "abort"] {
        let (mut child, pid, folder) = child(ending);
        child.wait().unwrap();
        assert_gone(pid, &folder);
    }
}

#[test]
fn server_is_removed_when_its_owner_is_killed() {
    // The second owner has a child, a `psql` with a running query, which survives for a moment. It must not have
    // inherited the pipe that keeps the server alive.
    for ending in ["sleep", "psql"] {
        let (mut child, pid, folder) = child(ending);
        assert!(is_alive(pid) && folder.exists());
        assert_ne!(std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(), 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_gone(pid, &folder);
    }
}

#[test]
fn server_has_its_own_process_group_and_inherits_no_files() {
    let server = Postgres::start().unwrap();
    let group = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(") ").next().unwrap().split(' ').nth(2).unwrap().to_owned()
    };
    let pid = server.postmaster_pid().to_string();
    assert_ne!(group(&pid), group("self"));
    let file = |number: u32| std::fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
    assert_eq!(file(0), Path::new("/dev/null"));
    assert_eq!(file(1), server.socket_dir().join("log"));
    assert_eq!(file(2), server.socket_dir().join("log"));
}
