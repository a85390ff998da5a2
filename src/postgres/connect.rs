//! From a connection string to a connected client, with the address that answered.

use std::fmt;
use std::io;
use std::net::SocketAddr;
#[cfg(unix)]
use std::path::PathBuf;
use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::net::lookup_host;
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode};
use tokio_postgres::tls::NoTlsStream;
use tokio_postgres::{Client, Config, NoTls, Socket};

use crate::error::Error;

/// For a host that swallows packets; the kernel alone would try for two minutes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) type Wire = tokio_postgres::Connection<Socket, NoTlsStream>;

/// The address that a connection was made to, and where its cancel requests must go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Tcp {
        host: String,
        addr: SocketAddr,
    },
    #[cfg(unix)]
    Unix {
        dir: PathBuf,
        port: u16,
    },
}

impl Peer {
    /// `server.address` of the semantic conventions.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Tcp { host, .. } => host.clone(),
            #[cfg(unix)]
            Self::Unix { .. } => self.to_string(),
        }
    }

    /// `server.port`.
    pub(crate) fn port(&self) -> u16 {
        match self {
            Self::Tcp { addr, .. } => addr.port(),
            #[cfg(unix)]
            Self::Unix { port, .. } => *port,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, addr } if *host == addr.ip().to_string() => write!(f, "{addr}"),
            Self::Tcp { host, addr } => write!(f, "{host}:{} ({})", addr.port(), addr.ip()),
            #[cfg(unix)]
            Self::Unix { dir, port } => write!(f, "{}/.s.PGSQL.{port}", dir.display()),
        }
    }
}

/// Parses a connection string. Errors do not quote the string, which may contain a password.
pub(crate) fn parse(connection: &str) -> Result<Config, Error> {
    let config: Config =
        connection.parse().map_err(|error| Error::config(parse_error(connection, &error)))?;
    // In a URL, a password with an @ ends at the first one, and its rest would be shown as host or database.
    let is_url = ["postgres://", "postgresql://"].iter().any(|scheme| connection.starts_with(scheme));
    let host = |host: &Host| matches!(host, Host::Tcp(name) if name.contains('@'));
    let database = config.get_dbname().is_some_and(|name| name.contains('@'));
    if is_url && (database || config.get_hosts().iter().any(host)) {
        return Err(Error::config(
            "invalid connection string: its host or database contains \"@\"; write \"@\" in a password as %40",
        ));
    }
    check(&config)?;
    Ok(config)
}

/// Rejects settings that this crate does not support.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    if config.get_ssl_mode() == SslMode::Require {
        return Err(Error::config(no_tls("require")));
    }
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(Error::config(
            "invalid configuration: it names no host; set one, as in postgres://user@host/database or host=...",
        ));
    }
    Ok(())
}

fn parse_error(connection: &str, error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let strict = ["verify-ca", "verify-full"];
    // As in `sslmode = 'verify-full'`.
    let bare: String = connection.chars().filter(|c| !c.is_whitespace() && *c != '\'').collect();
    let asked = |mode: &&&str| bare.contains(&format!("sslmode={mode}"));
    match strict.iter().find(asked) {
        Some(mode) if cause.contains("sslmode") => no_tls(mode),
        // The name could be the rest of a password with a space in it.
        _ if cause.contains("unknown option") => "invalid connection string: unknown option (not shown, since it may be part of a password that is not quoted); use the options of tokio_postgres::Config, and quote a value that contains a space".to_owned(),
        _ => format!("invalid connection string: {cause}; write postgres://user:password@host/database, or key=value pairs"),
    }
}

fn no_tls(mode: &str) -> String {
    format!(
        "sslmode={mode} is not supported: this version has no TLS, and never falls back to plaintext; use sslmode=disable on a network that you trust"
    )
}

/// Connects to the first address that accepts the connection.
pub(crate) async fn connect(config: &Config) -> Result<(Client, Wire, Peer), Error> {
    let mut last = Error::config("invalid configuration: it names no host");
    for (host, port) in candidates(config)? {
        for peer in resolve(&host, port).await.unwrap_or_else(|error| {
            last = error;
            Vec::new()
        }) {
            match connect_one(config, &peer).await {
                Ok((client, wire)) => return Ok((client, wire, peer)),
                Err(error) => last = error,
            }
        }
    }
    Err(last)
}

/// A host, and its address if `hostaddr` gives one.
type Named = (Host, Option<std::net::IpAddr>);

fn candidates(config: &Config) -> Result<Vec<(Named, u16)>, Error> {
    let (hosts, addrs, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addrs.len());
    if !hosts.is_empty() && !addrs.is_empty() && hosts.len() != addrs.len() {
        return Err(Error::config(format!(
            "invalid configuration: {} hosts but {} hostaddrs; give one hostaddr for each host",
            hosts.len(),
            addrs.len()
        )));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(Error::config(format!(
            "invalid configuration: {count} hosts but {} ports; give one port, or one for each host",
            ports.len()
        )));
    }
    let mut all: Vec<_> = (0..count)
        .filter_map(|i| {
            let addr = addrs.get(i).copied();
            let host = hosts.get(i).cloned().or_else(|| addr.map(|addr| Host::Tcp(addr.to_string())))?;
            let port = ports.get(i).or_else(|| ports.first()).copied().unwrap_or(5432);
            Some(((host, addr), port))
        })
        .collect();
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        all.shuffle(&mut rand::rng());
    }
    Ok(all)
}

async fn resolve((host, addr): &Named, port: u16) -> Result<Vec<Peer>, Error> {
    match (host, addr) {
        #[cfg(unix)]
        (Host::Unix(dir), _) => Ok(vec![Peer::Unix { dir: dir.clone(), port }]),
        (Host::Tcp(host), Some(ip)) => Ok(vec![Peer::Tcp { host: host.clone(), addr: (*ip, port).into() }]),
        (Host::Tcp(host), None) => {
            let found = tokio::time::timeout(CONNECT_TIMEOUT, lookup_host((host.as_str(), port))).await;
            let found =
                found.unwrap_or_else(|_| Err(timed_out("the name was not resolved", CONNECT_TIMEOUT, "")));
            let found = found.map_err(|error| Error::unreachable(format_args!("{host}:{port}"), error))?;
            Ok(found.map(|addr| Peer::Tcp { host: host.clone(), addr }).collect())
        }
    }
}

pub(crate) async fn connect_one(config: &Config, peer: &Peer) -> Result<(Client, Wire), Error> {
    let limit = config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
    let narrowed = narrow(config, peer);
    match tokio::time::timeout(limit, narrowed.connect(NoTls)).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(error)) => Err(Error::connect(peer, error)),
        Err(_) => Err(Error::unreachable(peer, timed_out("no answer", limit, " (connect_timeout)"))),
    }
}

fn timed_out(what: &str, limit: Duration, setting: &str) -> io::Error {
    let text = format!("{what} within {} s{setting}", limit.as_secs_f64());
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// Returns the same settings for one address.
fn narrow(config: &Config, peer: &Peer) -> Config {
    let mut one = Config::new();
    match peer {
        Peer::Tcp { host, addr } => one.host(host).hostaddr(addr.ip()).port(addr.port()),
        #[cfg(unix)]
        Peer::Unix { dir, port } => one.host_path(dir).port(*port),
    };
    config.get_user().map(|user| one.user(user));
    config.get_password().map(|password| one.password(password));
    config.get_dbname().map(|name| one.dbname(name));
    config.get_options().map(|options| one.options(options));
    one.application_name(config.get_application_name().unwrap_or("fraiseql-stream"));
    config.get_tcp_user_timeout().map(|timeout| one.tcp_user_timeout(*timeout));
    config.get_keepalives_interval().map(|interval| one.keepalives_interval(interval));
    config.get_keepalives_retries().map(|retries| one.keepalives_retries(retries));
    one.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .channel_binding(config.get_channel_binding())
        .target_session_attrs(config.get_target_session_attrs())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle());
    one
}

/// Returns a warning if rows cross a network unencrypted and `sslmode=disable` was not set.
pub(crate) fn plaintext_warning(config: &Config, peer: &Peer) -> Option<String> {
    let remote = matches!(peer, Peer::Tcp { addr, .. } if !addr.ip().is_loopback());
    (remote && config.get_ssl_mode() != SslMode::Disable).then(|| {
        format!("connection to {peer} is not encrypted: this version has no TLS, so queries and rows are sent in plaintext; set sslmode=disable to accept this")
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn refusal(connection: &str) -> String {
        parse(connection).unwrap_err().to_string()
    }

    #[test]
    fn stricter_modes_than_prefer_are_refused_by_name() {
        for mode in ["require", "verify-ca", "verify-full"] {
            for form in [
                format!("postgres://u@h/d?sslmode={mode}"),
                format!("host=h user=u sslmode={mode}"),
                format!("host=h user=u sslmode = '{mode}'"),
            ] {
                assert!(refusal(&form).starts_with(&format!("sslmode={mode} is not supported")), "{form}");
            }
        }
        assert!(parse("postgres://u@h/d?sslmode=disable").is_ok());
    }

    #[test]
    fn plaintext_over_a_network_is_warned_of_unless_it_is_asked_for() {
        let warning = |mode: &str, addr: &str| {
            let config = parse(&format!("postgres://u@h/d{mode}")).unwrap();
            plaintext_warning(&config, &Peer::Tcp { host: "h".to_owned(), addr: addr.parse().unwrap() })
        };
        assert!(warning("", "192.0.2.1:5432").unwrap().contains("h:5432 (192.0.2.1) is not encrypted"));
        assert!(warning("?sslmode=prefer", "[2001:db8::1]:5432").is_some());
        assert_eq!(warning("?sslmode=disable", "192.0.2.1:5432"), None);
        assert_eq!(warning("", "127.0.0.1:5432"), None);
    }

    #[test]
    fn a_password_never_shows_in_a_refusal() {
        for form in [
            "host=h user=u password=se cret",
            "host=h user=u password=secret port=x",
            "postgres://u:secret@h:port/d",
            "postgres://u:p4@secret@127.0.0.1:1/d",
            "postgres://u:p4@b/secret@127.0.0.1:1/d",
            "postgres://u:p?4@secret@127.0.0.1:1/d",
            "postgres://u:p?4@b/secret@h/d",
            "mysql://u:secret@h/d",
            "postgres://u:secret@h/d?nonsense=secret",
            "u:secret@h",
        ] {
            assert!(!refusal(form).contains("cret"), "{form}: {}", refusal(form));
        }
    }

    #[test]
    fn hosts_and_ports_must_match() {
        let config = parse("host=a,b,c port=1,2 user=u").unwrap();
        assert!(candidates(&config).unwrap_err().to_string().contains("3 hosts but 2 ports"));
    }

    #[test]
    fn random_load_balancing_shuffles_the_hosts() {
        let orders = |mode: &str| {
            let config = parse(&format!("host=a,b,c user=u load_balance_hosts={mode}")).unwrap();
            let order = || candidates(&config).unwrap().into_iter().map(|((host, _), _)| format!("{host:?}"));
            (0..1_000).map(|_| order().collect::<Vec<_>>()).collect::<HashSet<_>>()
        };
        assert_eq!(orders("disable").len(), 1);
        assert_eq!(orders("random").len(), 6);
    }
}
