//! How it ends before its rows do: told to by a signal, or because nobody reads any more. No query is left behind.

use std::fs::File;
use std::io::{BufRead as _, pipe};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use backends::wait_until;

use crate::support::{AT_ONCE, Database, Running, SOON, ndjson, next_line, stats, text};

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
