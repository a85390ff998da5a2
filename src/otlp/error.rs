//! The errors of set-up and shutdown.

use std::error::Error;
use std::fmt::{self, Write as _};

use opentelemetry_otlp::ExporterBuildError;

use super::signal::Signal;
use crate::channel::OneLine;

/// An error met while setting up telemetry.
///
/// The text is one line and includes the cause, so [`source`](Error::source) returns `None`; the underlying error is
/// available from [`get_ref`](Self::get_ref).
///
/// # Examples
///
/// ```no_run
/// match fraiseql_stream::otlp::init() {
///     Ok(telemetry) => drop(telemetry),
///     Err(error) => eprintln!("continuing without telemetry: {error}"),
/// }
/// ```
pub struct InitError(Box<Inner<InitErrorKind>>);

/// The part of the set-up that failed.
///
/// # Examples
///
/// ```no_run
/// use fraiseql_stream::otlp::{self, InitErrorKind};
///
/// if otlp::init().is_err_and(|error| error.kind() == InitErrorKind::Configuration) {
///     std::process::exit(78); // EX_CONFIG
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InitErrorKind {
    /// A variable asks for what cannot be done: for a configuration file, for a certificate that cannot be read, or for an
    /// endpoint that the exporter refuses.
    Configuration,
    /// The HTTP client or the gRPC runtime could not be created, for example because no thread could be started.
    Transport,
    /// An exporter could not be created for another reason.
    Exporter,
}

/// Telemetry that could not be delivered at shutdown.
///
/// The text is one line and states the cause, so [`source`](Error::source) returns `None`; the underlying error is
/// available from [`get_ref`](Self::get_ref).
///
/// # Examples
///
/// ```no_run
/// # async fn example(telemetry: fraiseql_stream::otlp::Guard) {
/// if let Err(error) = telemetry.shutdown().await {
///     eprintln!("{error}"); // the last traces and metrics were not delivered to http://localhost:4318: ...
/// }
/// # }
/// ```
pub struct ShutdownError(Box<Inner<ShutdownErrorKind>>);

/// The reason why telemetry was lost at shutdown.
///
/// # Examples
///
/// ```no_run
/// use fraiseql_stream::otlp::ShutdownErrorKind;
///
/// # async fn example(telemetry: fraiseql_stream::otlp::Guard) {
/// let ended = telemetry.shutdown().await;
/// if ended.is_err_and(|error| error.kind() == ShutdownErrorKind::Timeout) {
///     eprintln!("the collector is too slow");
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ShutdownErrorKind {
    /// The collector did not answer within the guard's timeout.
    Timeout,
    /// The collector could not be reached, or refused the data.
    Export,
    /// The thread that flushes telemetry could not be started, or panicked.
    Thread,
}

struct Inner<K> {
    kind: K,
    /// Includes the text of the source.
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl InitError {
    /// Returns the part of the set-up that failed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// if let Err(error) = fraiseql_stream::otlp::init() {
    ///     eprintln!("{:?}: {error}", error.kind());
    /// }
    /// ```
    pub fn kind(&self) -> InitErrorKind {
        self.0.kind
    }

    /// Returns the underlying error, if there is one. Its text is part of this error's text.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// if let Err(error) = fraiseql_stream::otlp::init() {
    ///     let is_io = error.get_ref().is_some_and(|cause| cause.is::<std::io::Error>());
    ///     eprintln!("{error} (I/O: {is_io})");
    /// }
    /// ```
    pub fn get_ref(&self) -> Option<&(dyn Error + Send + Sync + 'static)> {
        self.0.source.as_deref()
    }

    /// A variable asks for what cannot be done.
    pub(super) fn configuration(message: String) -> Self {
        Self(Box::new(Inner { kind: InitErrorKind::Configuration, message, source: None }))
    }

    /// The exporter of a signal cannot be created.
    pub(super) fn exporter(signal: &Signal, source: ExporterBuildError) -> Self {
        // The endpoint may hold a user and a password.
        let redacted = |text: String| text.replace(&signal.endpoint, &signal.place);
        let (kind, source) = match source {
            ExporterBuildError::InvalidConfiguration(text) => {
                (InitErrorKind::Configuration, ExporterBuildError::InvalidConfiguration(redacted(text)))
            }
            ExporterBuildError::InternalFailure(text) => {
                (InitErrorKind::Exporter, ExporterBuildError::InternalFailure(redacted(text)))
            }
        };
        Self::caused(kind, &format!("cannot create the exporter for {}", signal.place), source)
    }

    /// What carries OTLP cannot be created.
    pub(super) fn transport(what: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::caused(InitErrorKind::Transport, &format!("cannot create {what}"), source)
    }

    fn caused(kind: InitErrorKind, what: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let source = source.into();
        Self(Box::new(Inner { kind, message: with_causes(what, &*source), source: Some(source) }))
    }
}

impl ShutdownError {
    /// Returns the reason why telemetry was lost.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(telemetry: fraiseql_stream::otlp::Guard) {
    /// if let Err(error) = telemetry.shutdown().await {
    ///     eprintln!("{:?}: {error}", error.kind());
    /// }
    /// # }
    /// ```
    pub fn kind(&self) -> ShutdownErrorKind {
        self.0.kind
    }

    /// Returns the underlying error, if there is one. For [`Export`](ShutdownErrorKind::Export), it is the SDK's error for
    /// the first signal that failed, and may be less precise than the text.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(telemetry: fraiseql_stream::otlp::Guard) {
    /// if let Err(error) = telemetry.shutdown().await {
    ///     eprintln!("{error} ({:?})", error.get_ref());
    /// }
    /// # }
    /// ```
    pub fn get_ref(&self) -> Option<&(dyn Error + Send + Sync + 'static)> {
        self.0.source.as_deref()
    }

    pub(super) fn new(
        kind: ShutdownErrorKind,
        message: impl Into<String>,
        source: Option<impl Into<Box<dyn Error + Send + Sync>>>,
    ) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: source.map(Into::into) }))
    }

    pub(super) fn no_thread(source: std::io::Error) -> Self {
        let message = with_causes("cannot start a thread to flush telemetry", &source);
        Self::new(ShutdownErrorKind::Thread, message, Some(source))
    }

    pub(super) fn panicked() -> Self {
        let message = "the thread that flushes telemetry panicked";
        Self::new(ShutdownErrorKind::Thread, message, None::<Box<dyn Error + Send + Sync>>)
    }
}

/// Appends the text of an error and of all its sources.
fn with_causes(what: &str, error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    causes.fold(what.to_owned(), |text, cause| {
        let cause = cause.to_string();
        // Some errors repeat the text of their source.
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

impl<K: fmt::Debug> Inner<K> {
    fn debug(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{name}({:?}, \"", self.kind)?;
        self.display(f)?;
        f.write_str("\")")
    }

    fn display(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        OneLine(f).write_str(&self.message)
    }
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display(f)
    }
}

impl fmt::Debug for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("InitError", f)
    }
}

impl Error for InitError {}

impl fmt::Display for ShutdownError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display(f)
    }
}

impl fmt::Debug for ShutdownError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("ShutdownError", f)
    }
}

impl Error for ShutdownError {}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// An error that leaves its cause to `source`.
    #[derive(Debug)]
    struct Outer(io::Error);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("builder error")
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn text_is_one_line_with_all_causes_and_source_repeats_none() {
        let error = InitError::transport("the HTTP client", Outer(io::Error::other("no\ncertificate")));
        assert_eq!(error.to_string(), r"cannot create the HTTP client: builder error: no\ncertificate");
        assert_eq!(format!("{error:?}"), format!("InitError(Transport, \"{error}\")"));
        assert!(error.source().is_none());
        assert!(error.get_ref().is_some_and(<dyn Error + Send + Sync>::is::<Outer>));
    }

    #[test]
    fn missing_thread_is_reported_with_its_cause() {
        let error = ShutdownError::no_thread(io::Error::other("no memory"));
        assert_eq!(error.to_string(), "cannot start a thread to flush telemetry: no memory");
        assert_eq!(error.kind(), ShutdownErrorKind::Thread);
        assert!(error.source().is_none());
        assert!(error.get_ref().is_some_and(<dyn Error + Send + Sync>::is::<io::Error>));
    }
}
