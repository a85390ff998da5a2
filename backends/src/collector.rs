//! A private OpenTelemetry collector.

pub(crate) mod telemetry;

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::error::{Context as _, Error};
use crate::go::{self, Module};
use crate::http;
use crate::process::{Dir, Plan, Process, free_ports};
use telemetry::{Log, Metric, Span};

const CONFIG: &str = include_str!("../otelcol/config.yaml");

const MODULE: Module = Module {
    name: "otelcol",
    files: &[
        ("go.mod", include_str!("../otelcol/go.mod")),
        ("go.sum", include_str!("../otelcol/go.sum")),
        ("main.go", include_str!("../otelcol/main.go")),
    ],
    takes: "2 minutes",
};

/// The collector's program: `OTELCOL`, else `otelcol-contrib` or `otelcol` of PATH, else built from the module here.
///
/// # Errors
/// When none is installed and it cannot be built.
pub fn collector_program() -> Result<PathBuf, Error> {
    if let Some(program) = env::var_os("OTELCOL").map(PathBuf::from) {
        let program = program.canonicalize();
        return program.context("OTELCOL is of no use");
    }
    if let Some(program) = go::on_path(&["otelcol-contrib", "otelcol"]) {
        return Ok(program);
    }
    MODULE.program().map_err(|error| {
        Error::new(format!(
            "no OpenTelemetry collector: {error}; or set OTELCOL to the otelcol-contrib of \
             https://github.com/open-telemetry/opentelemetry-collector-releases/releases"
        ))
    })
}

/// A private OpenTelemetry collector: takes OTLP, keeps all of it for a test to look at, gone on drop.
#[derive(Debug)]
pub struct Collector {
    process: Process,
    ports: Ports,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    grpc: u16,
    http: u16,
    prometheus: u16,
    health: u16,
}

impl Collector {
    /// Starts one on free ports; returns when it takes telemetry, in half a second once the program is there.
    ///
    /// # Errors
    /// When there is no program and it cannot be built, or the collector does not start.
    pub fn start() -> Result<Self, Error> {
        let mut attempts = 5;
        loop {
            attempts -= 1;
            let [grpc, http, prometheus, health] = free_ports()?;
            let collector = Self::launch(Ports { grpc, http, prometheus, health })?;
            match collector.wait_until_ready() {
                Ok(()) => return Ok(collector),
                // Another program was given a port in between: take others.
                Err(_) if attempts > 0 && collector.debug_log().contains("address already in use") => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill), at the same endpoints, with nothing received yet.
    ///
    /// # Errors
    /// When it does not start, for one because another program has taken a port in the meantime.
    pub fn restart(&mut self) -> Result<(), Error> {
        if !self.process.has_exited() {
            self.stop()?;
        }
        *self = Self::launch(self.ports)?;
        self.wait_until_ready()
    }

    fn launch(ports: Ports) -> Result<Self, Error> {
        let program = collector_program()?;
        let dir = Dir::new("otel", None)?;
        dir.put("config.yaml", CONFIG.as_bytes(), None)?;
        let folder = dir.path().display().to_string();
        let config = dir.path().join("config.yaml");
        let [grpc, http, prometheus, health] =
            [ports.grpc, ports.http, ports.prometheus, ports.health].map(|port| format!("127.0.0.1:{port}"));
        let env = [
            ("FOLDER", folder.as_str()),
            ("OTLP_GRPC", &grpc),
            ("OTLP_HTTP", &http),
            ("PROMETHEUS", &prometheus),
            ("HEALTH", &health),
        ];
        let command = [program.as_os_str(), OsStr::new("--config"), config.as_os_str()];
        let plan =
            Plan { account: None, signals: ["TERM", "KILL"], cleanup: "", env: &env, command: &command };
        Ok(Self { process: Process::start(dir, &plan)?, ports })
    }

    fn wait_until_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            // A stranger on the port cannot be taken for it: then the collector itself could not start, and says so.
            if http::get(self.ports.health, "/").is_ok_and(|(status, _)| status == 200) && self.is_listening()
            {
                return Ok(());
            }
            if self.process.has_exited() || Instant::now() > deadline {
                return Err(Error::new(format!("the collector did not start: {}", self.process.log_tail())));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_listening(&self) -> bool {
        !self.process.has_exited() && self.debug_log().contains("Everything is ready")
    }

    /// Where it takes OTLP by gRPC.
    pub fn grpc_endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.grpc)
    }

    /// Where it takes OTLP by HTTP; the signals' paths (`/v1/traces` ...) are not in it.
    pub fn http_endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.http)
    }

    /// The port of [`http_endpoint`](Self::http_endpoint).
    pub fn http_port(&self) -> u16 {
        self.ports.http
    }

    /// What a Prometheus server would be shown now.
    ///
    /// # Errors
    /// When the collector does not answer.
    pub fn prometheus_text(&self) -> Result<String, Error> {
        http::get(self.ports.prometheus, "/metrics")
            .map(|(_, body)| body)
            .context("cannot scrape the collector")
    }

    /// All spans received up to now, in the order in which they came.
    pub fn spans(&self) -> Vec<Span> {
        telemetry::spans(&self.received("traces"))
    }

    /// All log records received up to now, in the order in which they came.
    pub fn logs(&self) -> Vec<Log> {
        telemetry::logs(&self.received("logs"))
    }

    /// All metrics received up to now, in the order in which they came: once for each export.
    pub fn metrics(&self) -> Vec<Metric> {
        telemetry::metrics(&self.received("metrics"))
    }

    /// The metric of this name, as it was last exported.
    pub fn metric(&self, name: &str) -> Option<Metric> {
        self.metrics().into_iter().rfind(|metric| metric.name == name)
    }

    fn received(&self, signal: &str) -> String {
        fs::read_to_string(self.process.dir().join(format!("{signal}.jsonl"))).unwrap_or_default()
    }

    /// What the collector has logged: all that it received is in it, in words.
    pub fn debug_log(&self) -> String {
        self.process.log()
    }

    /// Stops it; it writes out what it has first. What it received can still be read.
    ///
    /// # Errors
    /// When it does not stop.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.end("TERM", &[])
    }

    /// Kills it where it stands. What it wrote before can still be read.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&self) -> Result<(), Error> {
        self.process.end("KILL", &[])
    }
}
