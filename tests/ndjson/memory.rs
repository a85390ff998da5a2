//! Memory use.

use std::io::{BufRead as _, Read as _};
use std::process::Stdio;
use std::time::Duration;

use backends::wait_until;

use crate::support::{Database, Running, TIMEOUT, stats};

#[test]
fn rows_of_a_mebibyte_stay_within_sixty_megabytes() {
    let database = Database::new(
        "memory_large",
        "CREATE VIEW docs AS SELECT to_jsonb(repeat('x', 1048574)) AS data FROM generate_series(1, 600)",
    );
    let args = ["docs", "--pause-ms", "5", "--max-memory", "10000000", "--stats"];
    let mut command = database.ndjson(&args);
    let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let (mut output, mut errors) = (running.stdout(), running.stderr());
    let reader = std::thread::spawn(move || {
        let mut row = Vec::new();
        let mut sizes = Vec::new();
        while output.read_until(b'\n', &mut row).expect("standard output is readable") > 0 {
            sizes.push(row.len());
            row.clear();
        }
        sizes
    });
    let stderr = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let file = format!("/proc/{}/status", running.pid());
    let mut peak = 0;
    // The value never decreases, and reads as 0 once the process has ended.
    wait_until(Duration::from_secs(120), || {
        let now = peak_memory(&file);
        peak = peak.max(now);
        now == 0
    });
    assert!(running.wait(TIMEOUT).success());
    assert_eq!(reader.join().unwrap(), vec![(1 << 20) + 1; 600]);
    let stats = stats(&stderr.join().unwrap().unwrap());
    let last = stats.last().unwrap();
    assert!(last["peak_bytes"].as_u64() <= Some(10_000_000), "{last}");
    assert!((10_000..60_000).contains(&peak), "{peak} kB");
}

/// Returns the peak resident memory of a process in kilobytes, or 0 if it has ended.
fn peak_memory(file: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
