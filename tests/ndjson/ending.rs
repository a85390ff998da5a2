//! Ending before all rows are written: a signal or a closed output stops the program, and its query is cancelled.

use std::fs::File;
use std::io::{BufRead as _, pipe};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use backends::{Postgres, send_signal, wait_until};

use crate::support::{Database, Running, STOP_TIMEOUT, TIMEOUT, ndjson, next_line, stats, text, with_sighup};

/// An endless fast view; one that never sends a row; and one that sends a row (two rows since Postgres 17) and then
/// nothing more.
const VIEWS: &str = "
    CREATE VIEW flowing AS SELECT to_jsonb(repeat('x', 1000)) AS data, generate_series(1, 100000000);
    CREATE VIEW silent AS SELECT to_jsonb(1) AS data FROM pg_sleep(600);
    CREATE VIEW one AS SELECT to_jsonb(repeat('x', 20000)) AS data FROM generate_series(1, 2) UNION ALL SELECT data FROM silent;";

const SIGNALS: [(&str, i32); 2] = [("INT", 130), ("TERM", 143)];

/// Sends the signal; the program and its backend must both end within `STOP_TIMEOUT`.
fn assert_stops(mut running: Running, signal: (&str, i32), database: &Database) {
    let start = Instant::now();
    running.signal(signal.0);
    let status = running.wait(STOP_TIMEOUT);
    assert_eq!(status.code(), Some(signal.1));
    database.assert_no_backend(start + STOP_TIMEOUT);
}

#[test]
fn signal_stops_the_program_while_rows_flow() {
    let database = Database::new("ending_flowing", VIEWS);
    for signal in SIGNALS {
        let mut running = Running::start(database.ndjson(&["flowing"]).stdout(Stdio::piped()));
        let mut lines = running.stdout();
        next_line(&mut lines);
        let reader = std::thread::spawn(move || lines.lines().map_while(Result::ok).last());
        assert_stops(running, signal, &database);
        let last = reader.join().unwrap().unwrap();
        assert_eq!(last.len(), 1002, "the last line is complete");
    }
}

#[test]
fn signal_stops_the_program_while_the_server_is_silent() {
    let database = Database::new("ending_silent", VIEWS);
    for signal in SIGNALS {
        let running = Running::start(database.ndjson(&["silent"]).stdout(Stdio::null()));
        database.wait_for_backend_in("PgSleep");
        assert_stops(running, signal, &database);
    }
}

#[test]
fn signal_stops_the_program_while_the_reader_stalls() {
    let database = Database::new("ending_stalled", VIEWS);
    for url in [database.url.clone(), database.socket_url()] {
        for signal in SIGNALS {
            let mut running = Running::start(ndjson(&url, &["flowing"]).stdout(Stdio::piped()));
            let _lines = running.stdout();
            database.wait_for_backend_in("ClientWrite");
            assert_stops(running, signal, &database);
        }
    }
}

#[test]
fn signal_stops_the_program_while_the_reader_of_both_outputs_stalls() {
    let database = Database::new("ending_both", VIEWS);
    let (_reader, writer) = pipe().unwrap();
    let mut command = database.ndjson(&["flowing", "--stats"]);
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let running = Running::start(&mut command);
    drop(command);
    database.wait_for_backend_in("ClientWrite");
    // By then, a line for standard error is blocked as well.
    std::thread::sleep(Duration::from_millis(1200));
    assert_stops(running, SIGNALS[0], &database);
}

#[test]
fn signal_stops_the_program_during_a_long_pause() {
    let database = Database::new("ending_pause", VIEWS);
    let mut command = database.ndjson(&["flowing", "--pause-ms", "600000"]);
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let mut lines = running.stdout();
    next_line(&mut lines);
    assert_stops(running, SIGNALS[0], &database);
}

#[test]
fn signal_stops_the_program_while_the_table_is_locked() {
    let database = Database::new("ending_locked", "CREATE TABLE docs (data jsonb)");
    std::thread::scope(|scope| {
        scope.spawn(|| database.try_sql("BEGIN; LOCK TABLE docs; SELECT pg_sleep(60)"));
        let locked = || {
            !database.sql("SELECT 1 FROM pg_locks WHERE relation = 'docs'::regclass AND granted").is_empty()
        };
        assert!(wait_until(TIMEOUT, locked));
        let running = Running::start(&mut database.ndjson(&["docs"]));
        database.wait_for_backend_in("relation");
        assert_stops(running, SIGNALS[0], &database);
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'");
    });
}

#[test]
fn signal_stops_the_program_while_it_connects() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://u:p@{}/d", listener.local_addr().unwrap());
    for (signal, code) in SIGNALS {
        let mut running = Running::start(&mut ndjson(&url, &["docs"]));
        let _silent = listener.accept().unwrap();
        running.signal(signal);
        assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(code));
    }
}

#[test]
fn signal_stops_the_program_while_a_host_name_resolves() {
    // The C library reads this file before it resolves a name. The file is a pipe, so it waits for the end of it.
    let file = std::env::temp_dir().join(format!("ndjson-test-hosts-{}", std::process::id()));
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    for (signal, code) in SIGNALS {
        let mut command = ndjson("postgres://u:p@db.example/d", &["docs"]);
        let mut running = Running::start(command.env("RESOLV_HOST_CONF", &file));
        let _writer = open_once_read(&file);
        running.signal(signal);
        assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(code));
    }
    std::fs::remove_file(&file).unwrap();
}

/// Opens a pipe for writing, which succeeds once the program reads from it.
fn open_once_read(pipe: &Path) -> File {
    let (sender, opened) = channel();
    let pipe = pipe.to_owned();
    std::thread::spawn(move || sender.send(File::options().write(true).open(pipe)));
    opened.recv_timeout(TIMEOUT).expect("the program resolves the name").expect("the pipe opens")
}

#[test]
fn closed_terminal_stops_the_program_and_its_query() {
    let database = Database::new("ending_terminal", VIEWS);
    let running = Running::start(&mut with_sighup("default", &database.ndjson(&["silent"])));
    database.wait_for_backend_in("PgSleep");
    assert_stops(running, ("HUP", 129), &database);
}

#[test]
fn program_under_nohup_survives_a_closed_terminal() {
    let database = Database::new("ending_nohup", VIEWS);
    let mut running = Running::start(&mut with_sighup("ignore", &database.ndjson(&["silent"])));
    database.wait_for_backend_in("PgSleep");
    running.signal("HUP");
    running.assert_runs_for(Duration::from_millis(300));
    assert_stops(running, SIGNALS[1], &database);
}

/// A server whose postmaster is suspended, so that it accepts no cancel request, and the program with a query on it.
struct SuspendedServer {
    server: Postgres,
    running: Running,
}

impl SuspendedServer {
    fn start(command: impl FnOnce(&str) -> Command) -> Self {
        let server = Postgres::start().expect("the server starts");
        server.psql("postgres", VIEWS).expect("the SQL is valid");
        let running = Running::start(&mut command(&server.url()));
        let suspended = Self { server, running };
        assert!(wait_until(TIMEOUT, || suspended.queries() == "1\n"));
        assert!(send_signal("STOP", suspended.server.postmaster_pid()));
        suspended
    }

    fn queries(&self) -> String {
        let count = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        self.server.psql("postgres", count).expect("the SQL is valid")
    }

    fn resume(&self) {
        assert!(send_signal("CONT", self.server.postmaster_pid()));
    }
}

impl Drop for SuspendedServer {
    fn drop(&mut self) {
        self.resume();
    }
}

#[test]
fn second_hangup_does_not_keep_the_query_from_being_cancelled() {
    // When a terminal is closed, the kernel and the shell may both send SIGHUP.
    let mut suspended = SuspendedServer::start(|url| with_sighup("default", &ndjson(url, &["silent"])));
    suspended.running.signal("HUP");
    suspended.running.assert_runs_for(Duration::from_millis(300));
    suspended.running.signal("HUP");
    suspended.running.assert_runs_for(Duration::from_millis(300));
    suspended.resume();
    assert_eq!(suspended.running.wait(STOP_TIMEOUT).code(), Some(129));
    assert_eq!(suspended.queries(), "0\n");
}

#[test]
fn second_signal_stops_the_program_without_waiting_for_server_or_collector() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let mut suspended = SuspendedServer::start(|url| {
        let mut command = ndjson(url, &["silent"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        command
    });
    suspended.running.signal("INT");
    suspended.running.assert_runs_for(Duration::from_millis(300));
    suspended.running.signal("TERM");
    assert_eq!(suspended.running.wait(STOP_TIMEOUT).code(), Some(130));
}

#[test]
fn final_statistics_are_written_after_a_signal() {
    let database = Database::new("ending_stats", VIEWS);
    let mut command = database.ndjson(&["one", "--stats"]);
    let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut lines = running.stdout();
    next_line(&mut lines);
    running.signal("TERM");
    let errors: Vec<String> = running.stderr().lines().map_while(Result::ok).collect();
    let stats = stats(&errors.join("\n"));
    let last = stats.last().unwrap();
    assert!([1, 2].contains(&last["rows"].as_u64().unwrap()) && last["ended"] == true, "{last}");
    assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(143));
}

#[test]
fn closed_output_stops_the_program_with_code_0_while_rows_flow() {
    let database = Database::new("ending_head", VIEWS);
    let mut command = Command::new("sh");
    command.args(["-c", "\"$0\" flowing | head -1"]).arg(database.ndjson(&[]).get_program());
    let output = command.env("DATABASE_URL", &database.url).output().unwrap();
    let closed = Instant::now();
    assert_eq!(output.stdout.len(), 1003);
    assert_eq!(text(&output.stderr), "");
    database.assert_no_backend(closed + STOP_TIMEOUT);

    let mut command = database.ndjson(&["flowing"]);
    let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    next_line(&mut running.stdout());
    assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(0));
    assert_eq!(next_line(&mut running.stderr()), "");
}

#[test]
fn closed_output_stops_the_program_with_code_0_while_the_server_is_silent() {
    let database = Database::new("ending_head_silent", VIEWS);
    let mut running = Running::start(database.ndjson(&["one"]).stdout(Stdio::piped()));
    next_line(&mut running.stdout());
    let closed = Instant::now();
    assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(0));
    database.assert_no_backend(closed + STOP_TIMEOUT);
}

#[test]
fn unread_output_that_is_closed_stops_the_program_with_code_0() {
    let database = Database::new("ending_unread", VIEWS);
    for args in [&["silent"][..], &["flowing", "--pause-ms", "600000"]] {
        let mut running = Running::start(database.ndjson(args).stdout(Stdio::piped()));
        let reader = running.stdout();
        assert!(wait_until(TIMEOUT, || database.has_backend()));
        let closed = Instant::now();
        drop(reader);
        assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(0));
        database.assert_no_backend(closed + STOP_TIMEOUT);
    }
}

#[test]
fn closed_socket_stops_the_program_with_code_0() {
    let database = Database::new("ending_socket", VIEWS);
    let (reader, writer) = UnixStream::pair().unwrap();
    let mut command = database.ndjson(&["silent"]);
    let mut running = Running::start(command.stdout(OwnedFd::from(writer)));
    drop(command);
    database.wait_for_backend_in("PgSleep");
    let closed = Instant::now();
    drop(reader);
    assert_eq!(running.wait(STOP_TIMEOUT).code(), Some(0));
    database.assert_no_backend(closed + STOP_TIMEOUT);
}

#[test]
fn output_to_a_file_is_never_taken_for_closed() {
    let database = Database::new("ending_file", VIEWS);
    let file = std::env::temp_dir().join(format!("ndjson-test-{}", std::process::id()));
    let mut command = database.ndjson(&["one"]);
    let running = Running::start(command.stdout(File::create(&file).unwrap()));
    assert!(wait_until(TIMEOUT, || { std::fs::metadata(&file).is_ok_and(|meta| meta.len() >= 20_003) }));
    std::fs::remove_file(&file).unwrap();
    assert_stops(running, SIGNALS[0], &database);
}
