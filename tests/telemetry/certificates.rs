//! TLS: the certificates and keys given by variables, with a collector that demands a client certificate.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use backends::Collector;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};

use crate::received::Received;
use crate::scenario::{Outcome, Scenario};
use crate::servers::{database, table};

const PROTOCOLS: [&str; 2] = ["http/protobuf", "grpc"];

/// A folder of certificates and keys, removed on drop: one authority, which signed those of the collector and of the
/// client.
struct Certificates(PathBuf);

impl Certificates {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("certificates-{}-{number}", std::process::id()));
        fs::create_dir(&folder).expect("a folder");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key"));
        let authority = authority.expect("a certificate");
        write_pem(&folder.join("authority.pem"), "CERTIFICATE", authority.der());
        for (name, host) in [("server", "127.0.0.1"), ("client", "shop")] {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new([host.to_owned()]).expect("a valid name");
            let certificate = params.signed_by(&key, &authority).expect("a certificate");
            write_pem(&folder.join(name).with_extension("pem"), "CERTIFICATE", certificate.der());
            write_pem(&folder.join(name).with_extension("key"), "PRIVATE KEY", &key.serialize_der());
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        // What is left over lies in the folder for temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn write_pem(path: &Path, label: &str, contents: &[u8]) {
    let text = BASE64_STANDARD.encode(contents);
    fs::write(path, format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")).expect("a file");
}

fn scenario(collector: &Collector, protocol: &str) -> Scenario {
    let orders = database(&table("orders", 100));
    Scenario::new("environment::one_stream", &orders).to(collector, protocol)
}

fn assert_exported(outcome: &Outcome, received: &Received, case: &str) {
    assert_eq!((outcome.stderr.as_str(), &outcome.reported["shutdown"]), ("", &Value::Null), "{case}");
    assert_eq!(received.queries("orders").len(), 1, "{case}");
    assert!(!received.metrics.is_empty() && !received.logs.is_empty(), "{case}");
}

#[test]
fn client_certificate_is_presented_by_both_protocols() {
    let files = Certificates::new();
    for protocol in PROTOCOLS {
        let collector = Collector::start_encrypted(&files.0).unwrap();
        let outcome = scenario(&collector, protocol)
            .set("OTEL_EXPORTER_OTLP_CERTIFICATE", &files.path("authority.pem"))
            .set("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &files.path("client.pem"))
            .set("OTEL_EXPORTER_OTLP_CLIENT_KEY", &files.path("client.key"))
            .run();
        assert_exported(&outcome, &Received::by(&collector), protocol);
    }
}

#[test]
fn each_signal_can_have_its_own_certificates() {
    let (files, other) = (Certificates::new(), Certificates::new());
    for protocol in PROTOCOLS {
        let collector = Collector::start_encrypted(&files.0).unwrap();
        let mut scenario = scenario(&collector, protocol);
        for (variable, file) in [
            ("CERTIFICATE", "authority.pem"),
            ("CLIENT_CERTIFICATE", "client.pem"),
            ("CLIENT_KEY", "client.key"),
        ] {
            scenario = scenario.set(&format!("OTEL_EXPORTER_OTLP_{variable}"), &other.path(file));
            for signal in ["TRACES", "METRICS", "LOGS"] {
                scenario =
                    scenario.set(&format!("OTEL_EXPORTER_OTLP_{signal}_{variable}"), &files.path(file));
            }
        }
        assert_exported(&scenario.run(), &Received::by(&collector), protocol);
    }
}

#[test]
fn export_without_the_certificates_fails_and_the_reason_is_logged() {
    let files = Certificates::new();
    for protocol in PROTOCOLS {
        // By gRPC, the connection may break before the collector's reason arrives.
        let missing = if protocol == "grpc" { "transport error" } else { "CertificateRequired" };
        for (trusts, reason) in [(false, "UnknownIssuer"), (true, missing)] {
            let collector = Collector::start_encrypted(&files.0).unwrap();
            let mut scenario = scenario(&collector, protocol);
            if trusts {
                scenario = scenario.set("OTEL_EXPORTER_OTLP_CERTIFICATE", &files.path("authority.pem"));
            }
            let outcome = scenario.run();
            let error = outcome.reported["shutdown"].as_str().unwrap_or_default();
            assert!(error.contains("https://127.0.0.1:") && error.contains(reason), "{protocol}: {error}");
            assert_eq!(outcome.warnings().len(), 1, "{protocol}: {}", outcome.stderr);
            assert!(outcome.stderr.contains(reason), "{protocol}: {}", outcome.stderr);
            assert!(Received::by(&collector).is_empty(), "{protocol}, {reason}");
        }
    }
}

/// Sets telemetry up with these variables, and returns the text of the error.
fn refused(set: &[(&str, &str)]) -> String {
    let mut scenario = Scenario::new("service::failing_set_up", &database(""));
    for (variable, value) in set {
        scenario = scenario.set(variable, value);
    }
    let error = scenario.run().reported;
    assert_eq!(error["kind"], json!("Configuration"), "{error}");
    error["text"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn unusable_file_fails_the_set_up() {
    let files = Certificates::new();
    let (missing, empty, key) =
        (files.path("missing.pem"), files.path("empty.pem"), files.path("client.key"));
    fs::write(Path::new(&empty), "").unwrap();
    let [authority, client, client_key] =
        ["CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"].map(|what| format!("OTEL_EXPORTER_OTLP_{what}"));
    for protocol in PROTOCOLS {
        let https = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:9"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ];
        for (set, expected) in [
            (
                &[(&*authority, &*missing)][..],
                format!("{authority}={missing:?} is unusable: it cannot be read: "),
            ),
            (
                &[(&authority, &empty)],
                format!("{authority}={empty:?} is unusable: it holds no PEM certificate"),
            ),
            (&[(&authority, &key)], format!("{authority}={key:?} is unusable: it holds no PEM certificate")),
            (
                &[(&client_key, &key)],
                format!("{client_key}={key:?} is unusable: it is set without a CLIENT_CERT"),
            ),
            (
                &[(&client, &files.path("client.pem")), (&client_key, &empty)],
                format!("{client_key}={empty:?} is unusable: it holds no PEM private key"),
            ),
        ] {
            let text = refused(&[&https[..], set].concat());
            assert!(text.starts_with(&expected), "{protocol}: {text}");
        }
    }
}

#[test]
fn certificate_for_an_endpoint_without_encryption_causes_one_warning() {
    let collector = Collector::start().unwrap();
    let scenario = scenario(&collector, PROTOCOLS[0]);
    let outcome = scenario.set("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem").run();
    assert_eq!(outcome.warnings().len(), 1, "{}", outcome.stderr);
    let expected = "OTEL_EXPORTER_OTLP_CERTIFICATE has no effect: the endpoint is not encrypted";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
    assert_eq!(Received::by(&collector).queries("orders").len(), 1);
}
