//! The account that runs the server. Postgres refuses to run as root, so root uses another account.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::error::{Context as _, Error};

/// An account other than that of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Account {
    /// Returns the account to run a server as: `None` unless this process runs as root.
    pub(crate) fn unprivileged() -> Result<Option<Self>, Error> {
        if own_uid()? != 0 {
            return Ok(None);
        }
        let accounts = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        ["postgres", "nobody"].iter().find_map(|name| Self::named(&accounts, name)).map(Some).ok_or_else(|| {
            Error::new("Postgres refuses to run as root, and there is no account `postgres` or `nobody`; run as another user")
        })
    }

    fn named(accounts: &str, name: &str) -> Option<Self> {
        let mut fields =
            accounts.lines().map(|line| line.split(':')).find(|line| line.clone().next() == Some(name))?;
        Some(Self { uid: fields.nth(2)?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    }
}

/// Makes `command` run as `account`, if there is one.
pub(crate) fn run_as(command: &mut Command, account: Option<Account>) -> &mut Command {
    if let Some(Account { uid, gid }) = account {
        command.uid(uid).gid(gid);
    }
    command
}

/// Returns the uid of this process, by the program `id`, since std has no call for it.
pub(crate) fn own_uid() -> Result<u32, Error> {
    let output = Command::new("id").arg("-u").output().context("cannot run `id -u`")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| Error::new(format!("`id -u` printed {text:?} (expected a number)")))
}

/// Returns whether an account that is neither the owner nor in the group can reach `folder` and has the access bits
/// `rights` (0o5 or 0o7) on it.
pub(crate) fn open_to_others(folder: &Path, rights: u32) -> bool {
    let allows = |path: &Path, rights| {
        fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & rights == rights)
    };
    allows(folder, rights)
        && folder.ancestors().skip(1).all(|parent| parent.as_os_str().is_empty() || allows(parent, 0o1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_is_read_from_the_password_file() {
        let accounts = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104:,,,:/var/lib/postgresql:/bin/bash\n";
        let account = Account::named(accounts, "postgres").unwrap();
        assert_eq!((account.uid, account.gid), (101, 104));
        assert!(Account::named(accounts, "nobody").is_none());
    }
}
