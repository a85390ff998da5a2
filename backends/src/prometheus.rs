//! A private Prometheus server.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Context as _, Error};
use crate::go::{Module, installed};
use crate::http;
use crate::process::{Dir, Plan, Process, free_ports};

const MODULE: Module = Module {
    name: "prometheus",
    files: &[
        ("go.mod", include_str!("../prometheus/go.mod")),
        ("go.sum", include_str!("../prometheus/go.sum")),
    ],
    packages: &[
        "github.com/prometheus/prometheus/cmd/prometheus",
        "github.com/prometheus/prometheus/cmd/promtool",
    ],
    // Without the discovery of services in clouds, which is two thirds of the build.
    tags: "remove_all_sd",
    build_time: "4 minutes",
};

/// Returns the path of the Prometheus server: `PROMETHEUS` if set, else `prometheus` on `PATH`, else one that is built once
/// with Go.
///
/// # Errors
/// If `PROMETHEUS` is unusable, or Prometheus is not installed and cannot be built.
pub fn prometheus_program() -> Result<PathBuf, Error> {
    program("PROMETHEUS", "prometheus")
}

/// Returns the path of promtool: `PROMTOOL` if set, else `promtool` on `PATH`, else one that is built once with Go.
///
/// # Errors
/// If `PROMTOOL` is unusable, or promtool is not installed and cannot be built.
pub fn promtool_program() -> Result<PathBuf, Error> {
    program("PROMTOOL", "promtool")
}

fn program(variable: &str, name: &str) -> Result<PathBuf, Error> {
    if let Some(program) = installed(variable, &[name])? {
        return Ok(program);
    }
    MODULE.folder().map(|folder| folder.join(name)).map_err(|error| {
        Error::new(format!(
            "no {name} found: {error}; alternatively, set {variable} to the path of the one from \
             https://github.com/prometheus/prometheus/releases"
        ))
    })
}

/// A private Prometheus server, with its OTLP receiver enabled. It is stopped and removed on drop.
#[derive(Debug)]
pub struct Prometheus {
    process: Process,
    port: u16,
}

impl Prometheus {
    /// Starts a server on a free port and waits until it is ready. Its configuration is `prometheus.yml` of `files`, which
    /// are pairs of a name and the contents; `options` are further command-line options.
    ///
    /// # Errors
    /// If Prometheus is not installed and cannot be built, or the server does not start.
    pub fn start(files: &[(&str, &str)], options: &[&str]) -> Result<Self, Error> {
        let mut attempts = 5;
        loop {
            attempts -= 1;
            let server = Self::launch(files, options)?;
            match server.wait_until_ready() {
                Ok(()) => return Ok(server),
                // Another program has taken the port in the meantime: retry with another one.
                Err(_) if attempts > 0 && server.log().contains("address already in use") => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn launch(files: &[(&str, &str)], options: &[&str]) -> Result<Self, Error> {
        let program = prometheus_program()?;
        let dir = Dir::new("prometheus", None)?;
        for (name, contents) in files {
            dir.put(name, contents.as_bytes(), None)?;
        }
        let [port] = free_ports()?;
        let own = [
            format!("--config.file={}", dir.path().join("prometheus.yml").display()),
            format!("--storage.tsdb.path={}", dir.path().join("data").display()),
            format!("--web.listen-address=127.0.0.1:{port}"),
            "--web.enable-otlp-receiver".to_owned(),
        ];
        let options = own.iter().map(String::as_str).chain(options.iter().copied()).map(OsStr::new);
        let command: Vec<&OsStr> = std::iter::once(program.as_os_str()).chain(options).collect();
        let plan =
            Plan { account: None, signals: ["TERM", "KILL"], cleanup: "", env: &[], command: &command };
        Ok(Self { process: Process::start(dir, &plan)?, port })
    }

    fn wait_until_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(60);
        // Another program may answer on the port: the server must log that it is ready.
        while !self.log().contains("Server is ready to receive web requests") {
            if self.process.has_exited() || Instant::now() > deadline {
                return Err(Error::new(format!("Prometheus did not start: {}", self.process.log_tail())));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Returns the port of the HTTP API.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the endpoint to which metrics can be sent by OTLP/HTTP.
    pub fn otlp_metrics_endpoint(&self) -> String {
        format!("http://127.0.0.1:{}/api/v1/otlp/v1/metrics", self.port)
    }

    /// Evaluates a PromQL expression and returns its series, as `{"metric": {...}, "value": [time, "value"]}` each.
    ///
    /// # Errors
    /// If the server does not answer or rejects the expression.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>, Error> {
        let data = self.api(&format!("query?query={}", percent_encoded(expression)));
        let data = data.map_err(|error| Error::new(format!("{expression}: {error}")))?;
        let series = data["result"].as_array().cloned();
        series.ok_or_else(|| Error::new(format!("{expression} returns no list: {data}")))
    }

    /// Returns the `data` of the answer to a GET request for this path of the HTTP API, such as `rules`.
    ///
    /// # Errors
    /// If the server does not answer or rejects the request.
    pub fn api(&self, path: &str) -> Result<Value, Error> {
        let (_, body) =
            http::get(self.port, &format!("/api/v1/{path}")).context("Prometheus does not answer")?;
        let mut answer: Value = serde_json::from_str(&body).unwrap_or_default();
        if answer["status"] != "success" {
            return Err(Error::new(format!("Prometheus rejects the request: {body}")));
        }
        Ok(answer["data"].take())
    }

    /// Returns the server's log.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        let _ = write!(encoded, "%{byte:02X}");
        encoded
    })
}
