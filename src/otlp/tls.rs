//! The certificates and keys whose files are given by the variables.

use reqwest::{Certificate, Identity};

use super::env::Variables;
use super::error::InitError;

/// The PEM files of a signal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tls {
    authorities: Option<PemFile>,
    certificate: Option<PemFile>,
    key: Option<PemFile>,
}

/// A variable, and the path that is its value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PemFile {
    variable: String,
    path: String,
}

/// The contents of the files, which were found to be PEM.
#[derive(Default)]
pub(super) struct Pem {
    /// The only certificates that the server's may be signed by, instead of those of the system.
    pub(super) authorities: Option<Vec<u8>>,
    /// The client's certificate and its key.
    pub(super) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Tls {
    pub(super) fn read(env: &Variables<'_>, signal: &str) -> Self {
        let file =
            |what: &str| env.own_or_general(signal, what).map(|(variable, path)| PemFile { variable, path });
        Self {
            authorities: file("CERTIFICATE"),
            certificate: file("CLIENT_CERTIFICATE"),
            key: file("CLIENT_KEY"),
        }
    }

    /// Returns the variables that are set.
    pub(super) fn variables(&self) -> impl Iterator<Item = &str> {
        let files = [&self.authorities, &self.certificate, &self.key];
        files.into_iter().flatten().map(|file| file.variable.as_str())
    }

    /// Reads the files. Exporting without one of them would be less secure than what was asked for, so each has to be
    /// usable.
    pub(super) fn load(&self) -> Result<Pem, InitError> {
        let authorities = self.authorities.as_ref().map(PemFile::certificates).transpose()?;
        let identity = match (&self.certificate, &self.key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(identity(certificate, key)?),
            (Some(only), None) => return Err(only.lacks("a CLIENT_KEY")),
            (None, Some(only)) => return Err(only.lacks("a CLIENT_CERTIFICATE")),
        };
        Ok(Pem { authorities, identity })
    }
}

fn identity(certificate: &PemFile, key: &PemFile) -> Result<(Vec<u8>, Vec<u8>), InitError> {
    let (certificates, key_pem) = (certificate.certificates()?, key.contents()?);
    if Identity::from_pem(&[key_pem.as_slice(), b"\n", &certificates].concat()).is_err() {
        return Err(key.refuse("it holds no PEM private key"));
    }
    Ok((certificates, key_pem))
}

impl PemFile {
    fn contents(&self) -> Result<Vec<u8>, InitError> {
        std::fs::read(&self.path).map_err(|error| self.refuse(&format!("it cannot be read: {error}")))
    }

    fn certificates(&self) -> Result<Vec<u8>, InitError> {
        let contents = self.contents()?;
        let found = Certificate::from_pem_bundle(&contents).map(|certificates| certificates.len());
        if found.unwrap_or_default() == 0 {
            return Err(self.refuse("it holds no PEM certificate"));
        }
        Ok(contents)
    }

    fn lacks(&self, other: &str) -> InitError {
        self.refuse(&format!("it is set without {other}"))
    }

    fn refuse(&self, why: &str) -> InitError {
        InitError::configuration(format!("{}={:?} is unusable: {why}", self.variable, self.path))
    }
}
