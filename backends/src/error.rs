use std::fmt;
use std::io;

/// The reason why a server could not be started or used, as one line that says what to do about it.
#[derive(Clone)]
pub struct Error(String);

impl Error {
    pub(crate) fn new(message: impl AsRef<str>) -> Self {
        // The output of programs contains line breaks, but an error is one line.
        let lines: Vec<&str> =
            message.as_ref().lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        Self(lines.join(" | "))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Same as `Display`, so that `unwrap` in a test prints the message.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

/// Adds to an I/O error what failed.
pub(crate) trait Context<T> {
    fn context(self, what: impl fmt::Display) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl fmt::Display) -> Result<T, Error> {
        self.map_err(|cause| Error::new(format!("{what}: {cause}")))
    }
}
