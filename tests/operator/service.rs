//! A running service, as a process of its own.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

use crate::streams::{DATABASE, STREAMS};

/// The process of `streams::service`.
#[derive(Debug)]
pub(crate) struct Service {
    child: Child,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
}

impl Service {
    /// Starts the service `job`, which runs the streams `which` and exports its metrics twice a second to `endpoint`.
    pub(crate) fn start(job: &str, which: &str, database: &str, endpoint: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.args(["--exact", "streams::service", "--ignored", "--nocapture", "--quiet"]);
        let set_here = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("OTEL_");
        for name in std::env::vars_os().map(|(name, _)| name).filter(set_here) {
            command.env_remove(name);
        }
        command.env(DATABASE, database).env(STREAMS, which).envs([
            ("OTEL_SERVICE_NAME", job),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", endpoint),
            ("OTEL_METRIC_EXPORT_INTERVAL", "500"),
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_LOGS_EXPORTER", "none"),
        ]);
        // At the end of this process all servers are stopped at once, and the service cannot export its last metrics.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("this binary runs");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        Self { child, input, output }
    }

    /// Returns the library's own verdicts on the streams, by entity.
    pub(crate) fn verdicts(&mut self) -> BTreeMap<String, String> {
        writeln!(self.input.as_ref().expect("it has not ended"), "verdicts").expect("the service reads");
        let mut answers = self.output.by_ref().map(|line| line.expect("UTF-8"));
        let answer = answers.find(|line| line.starts_with('{')).expect("the service answers");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        serde_json::from_value(answer["verdicts"].clone()).expect("names")
    }

    /// Ends the service, which exports its last metrics first.
    pub(crate) fn end(mut self) {
        drop(self.input.take());
        let status = self.child.wait().expect("the service can be waited for");
        assert!(status.success(), "{status}");
    }
}
