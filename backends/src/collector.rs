//! A private OpenTelemetry collector.

pub(crate) mod telemetry;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context as _, Error};
use crate::go::{Module, installed};
use crate::http;
use crate::process::{Dir, Plan, Process, free_ports};
use telemetry::{Log, Metric, Span};

const CONFIG: &str = include_str!("../otelcol/config.yaml");
/// What differs in a collector that encrypts.
const TLS: &str = include_str!("../otelcol/tls.yaml");

const MODULE: Module = Module {
    name: "otelcol",
    files: &[
        ("go.mod", include_str!("../otelcol/go.mod")),
        ("go.sum", include_str!("../otelcol/go.sum")),
        ("main.go", include_str!("../otelcol/main.go")),
    ],
    packages: &[],
    tags: "",
    build_time: "2 minutes",
};

/// Returns the path of the collector's program: `OTELCOL` if set, else `otelcol-contrib` or `otelcol` on `PATH`, else one
/// that is built once with Go.
///
/// # Errors
/// If `OTELCOL` is unusable, or no collector is installed and none can be built.
pub fn collector_program() -> Result<PathBuf, Error> {
    if let Some(program) = installed("OTELCOL", &["otelcol-contrib", "otelcol"])? {
        return Ok(program);
    }
    MODULE.program().map_err(|error| {
        Error::new(format!(
            "no OpenTelemetry collector found: {error}; alternatively, set OTELCOL to the path of an otelcol-contrib from \
             https://github.com/open-telemetry/opentelemetry-collector-releases/releases"
        ))
    })
}

/// A private OpenTelemetry collector that receives OTLP and keeps everything for tests to inspect. It is stopped and
/// removed on drop.
#[derive(Debug)]
pub struct Collector {
    process: Process,
    ports: Ports,
    certificates: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    grpc: u16,
    http: u16,
    prometheus: u16,
    health: u16,
}

impl Collector {
    /// Starts a collector on free ports and waits until it accepts telemetry, which takes half a second if the program is
    /// installed or cached.
    ///
    /// # Errors
    /// If no collector is installed and none can be built, or the collector does not start.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(None)
    }

    /// Starts a collector that receives OTLP by TLS only, and only from clients with a certificate. The folder holds PEM
    /// files: `server.pem` and `server.key` for the collector, and `authority.pem`, by which the client's certificate must
    /// be signed.
    ///
    /// # Errors
    /// Those of [`start`](Self::start).
    pub fn start_encrypted(certificates: &Path) -> Result<Self, Error> {
        Self::start_with(Some(certificates))
    }

    fn start_with(certificates: Option<&Path>) -> Result<Self, Error> {
        let mut attempts = 5;
        loop {
            attempts -= 1;
            let [grpc, http, prometheus, health] = free_ports()?;
            let ports = Ports { grpc, http, prometheus, health };
            let collector = Self::launch(ports, certificates)?;
            match collector.wait_until_ready() {
                Ok(()) => return Ok(collector),
                // Another program has taken a port in the meantime: retry with other ports.
                Err(_) if attempts > 0 && collector.debug_log().contains("address already in use") => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Starts the collector again at the same endpoints after [`stop`](Self::stop) or [`kill`](Self::kill). What it
    /// received before is discarded.
    ///
    /// # Errors
    /// If the collector does not start, for example because another program has taken a port in the meantime.
    pub fn restart(&mut self) -> Result<(), Error> {
        if !self.process.has_exited() {
            self.stop()?;
        }
        *self = Self::launch(self.ports, self.certificates.as_deref())?;
        self.wait_until_ready()
    }

    fn launch(ports: Ports, certificates: Option<&Path>) -> Result<Self, Error> {
        let program = collector_program()?;
        let dir = Dir::new("otel", None)?;
        dir.put("config.yaml", CONFIG.as_bytes(), None)?;
        dir.put("tls.yaml", TLS.as_bytes(), None)?;
        let folder = dir.path().display().to_string();
        let [config, tls] = ["config.yaml", "tls.yaml"].map(|name| dir.path().join(name));
        let pem_folder = certificates.map(|folder| folder.display().to_string()).unwrap_or_default();
        let [grpc, http, prometheus, health] =
            [ports.grpc, ports.http, ports.prometheus, ports.health].map(|port| format!("127.0.0.1:{port}"));
        let env = [
            ("FOLDER", folder.as_str()),
            ("OTLP_GRPC", &grpc),
            ("OTLP_HTTP", &http),
            ("PROMETHEUS", &prometheus),
            ("HEALTH", &health),
            ("CERTIFICATES", &pem_folder),
        ];
        let mut command = vec![program.as_os_str(), OsStr::new("--config"), config.as_os_str()];
        if certificates.is_some() {
            command.extend([OsStr::new("--config"), tls.as_os_str()]);
        }
        let plan =
            Plan { account: None, signals: ["TERM", "KILL"], cleanup: "", env: &env, command: &command };
        let certificates = certificates.map(Path::to_owned);
        Ok(Self { process: Process::start(dir, &plan)?, ports, certificates })
    }

    fn wait_until_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            // Another program that answers on the port is not enough: the collector must log that it is ready.
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

    /// Returns the OTLP/gRPC endpoint.
    pub fn grpc_endpoint(&self) -> String {
        self.endpoint(self.ports.grpc)
    }

    /// Returns the OTLP/HTTP endpoint, without the path of a signal such as `/v1/traces`.
    pub fn http_endpoint(&self) -> String {
        self.endpoint(self.ports.http)
    }

    fn endpoint(&self, port: u16) -> String {
        let scheme = if self.certificates.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{port}")
    }

    /// Returns the port of [`http_endpoint`](Self::http_endpoint).
    pub fn http_port(&self) -> u16 {
        self.ports.http
    }

    /// Returns the port at which the metrics are exposed to a Prometheus server.
    pub fn prometheus_port(&self) -> u16 {
        self.ports.prometheus
    }

    /// Returns the metrics as a Prometheus server would scrape them now.
    ///
    /// # Errors
    /// If the collector does not answer.
    pub fn prometheus_text(&self) -> Result<String, Error> {
        http::get(self.ports.prometheus, "/metrics")
            .map(|(_, body)| body)
            .context("cannot scrape the collector")
    }

    /// Returns all spans received so far, in order of arrival.
    pub fn spans(&self) -> Vec<Span> {
        telemetry::spans(&self.received("traces"))
    }

    /// Returns all log records received so far, in order of arrival.
    pub fn logs(&self) -> Vec<Log> {
        telemetry::logs(&self.received("logs"))
    }

    /// Returns all metrics received so far, in order of arrival, once per export.
    pub fn metrics(&self) -> Vec<Metric> {
        telemetry::metrics(&self.received("metrics"))
    }

    /// Returns the metric of this name as it was last exported.
    pub fn metric(&self, name: &str) -> Option<Metric> {
        self.metrics().into_iter().rfind(|metric| metric.name == name)
    }

    fn received(&self, signal: &str) -> String {
        fs::read_to_string(self.process.dir().join(format!("{signal}.jsonl"))).unwrap_or_default()
    }

    /// Returns the collector's log, which contains everything it received as text.
    pub fn debug_log(&self) -> String {
        self.process.log()
    }

    /// Stops the collector, which writes out everything it has first. What it received can still be read.
    ///
    /// # Errors
    /// If the collector does not stop.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.end("TERM", &[])
    }

    /// Kills the collector. What it had already written can still be read.
    ///
    /// # Errors
    /// If the collector does not exit.
    pub fn kill(&self) -> Result<(), Error> {
        self.process.end("KILL", &[])
    }
}
