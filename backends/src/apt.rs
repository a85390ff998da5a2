//! Packages of the distribution.

use std::ffi::{OsStr, OsString};
use std::process::Command;

use crate::account;
use crate::cache;
use crate::error::Error;
use crate::process::announce;

/// Installs a package with the `apt-get` on `path`, as root or by `sudo` without a password.
pub(crate) fn install(package: &str, path: &OsStr) -> Result<(), Error> {
    let root = account::own_uid()? == 0;
    let apt = |args: &[&str]| {
        let mut words: Vec<OsString> = args.iter().map(OsString::from).collect();
        if !root {
            words.splice(0..0, ["sudo", "-n"].map(OsString::from));
        }
        cache::run(Command::new(&words[0]).args(&words[1..]).env("PATH", path))
    };
    apt(&["apt-get", "--version"])?;
    announce(&format!("installing {package}: apt-get install -y --no-install-recommends {package}"));
    apt(&["apt-get", "update", "-q"])?;
    apt(&[
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-y",
        "-q",
        "--no-install-recommends",
        package,
    ])?;
    Ok(())
}
