//! How it ends before its rows do: told to by a signal, or because nobody reads any more. No query is left behind.

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

use crate::support::{AT_ONCE, Database, Running, SOON, ndjson, next_line, stats, text, with_hangup};

/// Without end and fast; silent at once; silent after the first row, or after two where Postgres sends both (from 17 on).
const VIEWS: &str = "
    CREATE VIEW flowing AS SELECT to_jsonb(repeat('x', 1000)) AS data, generate_series(1, 100000000);
    CREATE VIEW silent AS SELECT to_jsonb(1) AS data FROM pg_sleep(600);
    CREATE VIEW one AS SELECT to_jsonb(repeat('x', 20000)) AS data FROM generate_series(1, 2) UNION ALL SELECT data FROM silent;";

const SIGNALS: [(&str, i32); 2] = [("INT", 130), ("TERM", 143)];

/// Sends the signal: the program and its backend must both be gone at once.
fn assert_stops(mut running: Running, signal: (&str, i32), database: &Database) {
    let start = Instant::now();
    running.signal(signal.0);
    let status = running.end(AT_ONCE);
    assert_eq!(status.code(), Some(signal.1));
    database.assert_no_backend(start + AT_ONCE);
}

#[test]
fn a_signal_ends_it_while_rows_flow() {
    let database = Database::new("ending_flowing", VIEWS);
    for signal in SIGNALS {
        let mut running = Running::start(database.ndjson(&["flowing"]).stdout(Stdio::piped()));
        let mut lines = running.stdout();
        next_line(&mut lines);
        let reader = std::thread::spawn(move || lines.lines().map_while(Result::ok).last());
        assert_stops(running, signal, &database);
        let last = reader.join().unwrap().unwrap();
        assert_eq!(last.len(), 1002, "the last line is whole");
    }
}

#[test]
fn a_signal_ends_it_while_the_server_is_silent() {
    let database = Database::new("ending_silent", VIEWS);
    for signal in SIGNALS {
        let running = Running::start(database.ndjson(&["silent"]).stdout(Stdio::null()));
        database.until_backend_waits("PgSleep");
        assert_stops(running, signal, &database);
    }
}

#[test]
fn a_signal_ends_it_while_the_reader_stalls() {
    let database = Database::new("ending_stalled", VIEWS);
    for url in [database.url.clone(), database.socket_url()] {
        for signal in SIGNALS {
            let mut running = Running::start(ndjson(&url, &["flowing"]).stdout(Stdio::piped()));
            let _lines = running.stdout();
            database.until_backend_waits("ClientWrite");
            assert_stops(running, signal, &database);
        }
    }
}

#[test]
fn a_signal_ends_it_while_the_reader_of_both_outputs_stalls() {
    let database = Database::new("ending_both", VIEWS);
    let (_reader, writer) = pipe().unwrap();
    let mut command = database.ndjson(&["flowing", "--stats"]);
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let running = Running::start(&mut command);
    drop(command);
    database.until_backend_waits("ClientWrite");
    // Now a line for standard error is stuck as well.
    std::thread::sleep(Duration::from_millis(1200));
    assert_stops(running, SIGNALS[0], &database);
}

#[test]
fn a_signal_ends_it_in_a_long_pause() {
    let database = Database::new("ending_pause", VIEWS);
    let mut command = database.ndjson(&["flowing", "--pause-ms", "600000"]);
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let mut lines = running.stdout();
    next_line(&mut lines);
    assert_stops(running, SIGNALS[0], &database);
}

#[test]
fn a_signal_ends_it_while_the_relation_is_locked() {
    let database = Database::new("ending_locked", "CREATE TABLE docs (data jsonb)");
    std::thread::scope(|scope| {
        scope.spawn(|| database.try_sql("BEGIN; LOCK TABLE docs; SELECT pg_sleep(60)"));
        let locked = || {
            !database.sql("SELECT 1 FROM pg_locks WHERE relation = 'docs'::regclass AND granted").is_empty()
        };
        assert!(wait_until(SOON, locked));
        let running = Running::start(&mut database.ndjson(&["docs"]));
        database.until_backend_waits("relation");
        assert_stops(running, SIGNALS[0], &database);
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'");
    });
}

#[test]
fn a_signal_ends_it_while_it_connects() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://u:p@{}/d", listener.local_addr().unwrap());
    for (signal, code) in SIGNALS {
        let mut running = Running::start(&mut ndjson(&url, &["docs"]));
        let _silent = listener.accept().unwrap();
        running.signal(signal);
        assert_eq!(running.end(AT_ONCE).code(), Some(code));
    }
}

#[test]
fn a_signal_ends_it_while_a_host_name_is_resolved() {
    // The C library reads this file before it resolves a name; here it waits for the file's end.
    let file = std::env::temp_dir().join(format!("ndjson-test-hosts-{}", std::process::id()));
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    for (signal, code) in SIGNALS {
        let mut command = ndjson("postgres://u:p@db.example/d", &["docs"]);
        let mut running = Running::start(command.env("RESOLV_HOST_CONF", &file));
        let _end = opened_for_reading(&file);
        running.signal(signal);
        assert_eq!(running.end(AT_ONCE).code(), Some(code));
    }
    std::fs::remove_file(&file).unwrap();
}

/// The end of a pipe to write to, once somebody reads from it.
fn opened_for_reading(pipe: &Path) -> File {
    let (sender, opened) = channel();
    let pipe = pipe.to_owned();
    std::thread::spawn(move || sender.send(File::options().write(true).open(pipe)));
    opened.recv_timeout(SOON).expect("the name is being resolved").expect("a pipe")
}

#[test]
fn a_closed_terminal_ends_it_and_its_query() {
    let database = Database::new("ending_terminal", VIEWS);
    let running = Running::start(&mut with_hangup("default", &database.ndjson(&["silent"])));
    database.until_backend_waits("PgSleep");
    assert_stops(running, ("HUP", 129), &database);
}

#[test]
fn under_nohup_it_outlives_its_terminal() {
    let database = Database::new("ending_nohup", VIEWS);
    let mut running = Running::start(&mut with_hangup("ignore", &database.ndjson(&["silent"])));
    database.until_backend_waits("PgSleep");
    running.signal("HUP");
    running.stays(Duration::from_millis(300));
    assert_stops(running, SIGNALS[1], &database);
}

/// A server that cannot cancel anything for now, and the program in a query on it.
struct Stuck {
    server: Postgres,
    running: Running,
}

impl Stuck {
    fn start(command: impl FnOnce(&str) -> Command) -> Self {
        let server = Postgres::start().expect("a server");
        server.psql("postgres", VIEWS).expect("good SQL");
        let running = Running::start(&mut command(&server.url()));
        let stuck = Self { server, running };
        assert!(wait_until(SOON, || stuck.queries() == "1\n"));
        assert!(send_signal("STOP", stuck.server.postmaster_pid()));
        stuck
    }

    fn queries(&self) -> String {
        let count = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        self.server.psql("postgres", count).expect("good SQL")
    }

    fn go_on(&self) {
        assert!(send_signal("CONT", self.server.postmaster_pid()));
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        self.go_on();
    }
}

#[test]
fn a_terminal_that_hangs_up_twice_still_has_the_query_cancelled() {
    // The kernel and the shell both send the signal.
    let mut stuck = Stuck::start(|url| with_hangup("default", &ndjson(url, &["silent"])));
    stuck.running.signal("HUP");
    stuck.running.stays(Duration::from_millis(300));
    stuck.running.signal("HUP");
    stuck.running.stays(Duration::from_millis(300));
    stuck.go_on();
    assert_eq!(stuck.running.end(AT_ONCE).code(), Some(129));
    assert_eq!(stuck.queries(), "0\n");
}

#[test]
fn a_second_signal_waits_neither_for_the_server_nor_for_the_collector() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let mut stuck = Stuck::start(|url| {
        let mut command = ndjson(url, &["silent"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        command
    });
    stuck.running.signal("INT");
    stuck.running.stays(Duration::from_millis(300));
    stuck.running.signal("TERM");
    assert_eq!(stuck.running.end(AT_ONCE).code(), Some(130));
}

#[test]
fn a_signal_has_the_last_stats_told() {
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
    assert_eq!(running.end(AT_ONCE).code(), Some(143));
}

#[test]
fn a_reader_who_leaves_while_rows_flow_ends_it_well() {
    let database = Database::new("ending_head", VIEWS);
    let mut command = Command::new("sh");
    command.args(["-c", "\"$0\" flowing | head -1"]).arg(database.ndjson(&[]).get_program());
    let output = command.env("DATABASE_URL", &database.url).output().unwrap();
    let left = Instant::now();
    assert_eq!(output.stdout.len(), 1003);
    assert_eq!(text(&output.stderr), "");
    database.assert_no_backend(left + AT_ONCE);

    let mut command = database.ndjson(&["flowing"]);
    let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    next_line(&mut running.stdout());
    assert_eq!(running.end(AT_ONCE).code(), Some(0));
    assert_eq!(next_line(&mut running.stderr()), "");
}

#[test]
fn a_reader_who_leaves_while_the_server_is_silent_ends_it_well() {
    let database = Database::new("ending_head_silent", VIEWS);
    let mut running = Running::start(database.ndjson(&["one"]).stdout(Stdio::piped()));
    next_line(&mut running.stdout());
    let left = Instant::now();
    assert_eq!(running.end(AT_ONCE).code(), Some(0));
    database.assert_no_backend(left + AT_ONCE);
}

#[test]
fn a_reader_who_leaves_in_a_long_pause_or_never_reads_ends_it_well() {
    let database = Database::new("ending_unread", VIEWS);
    for args in [&["silent"][..], &["flowing", "--pause-ms", "600000"]] {
        let mut running = Running::start(database.ndjson(args).stdout(Stdio::piped()));
        let reader = running.stdout();
        assert!(wait_until(SOON, || database.has_backend()));
        let left = Instant::now();
        drop(reader);
        assert_eq!(running.end(AT_ONCE).code(), Some(0));
        database.assert_no_backend(left + AT_ONCE);
    }
}

#[test]
fn a_reader_who_hangs_up_a_socket_ends_it_well() {
    let database = Database::new("ending_socket", VIEWS);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = database.ndjson(&["silent"]);
    let mut running = Running::start(command.stdout(OwnedFd::from(theirs)));
    drop(command);
    database.until_backend_waits("PgSleep");
    let left = Instant::now();
    drop(ours);
    assert_eq!(running.end(AT_ONCE).code(), Some(0));
    database.assert_no_backend(left + AT_ONCE);
}

#[test]
fn a_file_has_no_reader_who_could_leave() {
    let database = Database::new("ending_file", VIEWS);
    let file = std::env::temp_dir().join(format!("ndjson-test-{}", std::process::id()));
    let mut command = database.ndjson(&["one"]);
    let running = Running::start(command.stdout(File::create(&file).unwrap()));
    assert!(wait_until(SOON, || { std::fs::metadata(&file).is_ok_and(|meta| meta.len() >= 20_003) }));
    std::fs::remove_file(&file).unwrap();
    assert_stops(running, SIGNALS[0], &database);
}
