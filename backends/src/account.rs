//! Who runs the server. Postgres refuses to run as root, so root lends it another account.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::error::{Context as _, Error};

/// An account other than our own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Account {
    /// The account to run a server as: `None` is our own, which will do unless we are root.
    pub(crate) fn unprivileged() -> Result<Option<Self>, Error> {
        if own_uid()? != 0 {
            return Ok(None);
        }
        let accounts = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        ["postgres", "nobody"].iter().find_map(|name| Self::named(&accounts, name)).map(Some).ok_or_else(|| {
            Error::new("Postgres refuses to run as root, and there is no account `postgres` or `nobody`: run as another user")
        })
    }

    fn named(accounts: &str, name: &str) -> Option<Self> {
        let mut fields =
            accounts.lines().map(|line| line.split(':')).find(|line| line.clone().next() == Some(name))?;
        Some(Self { uid: fields.nth(2)?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    }
}

/// Lets `command` run as `account`.
pub(crate) fn run_as(command: &mut Command, account: Option<Account>) -> &mut Command {
    if let Some(Account { uid, gid }) = account {
        command.uid(uid).gid(gid);
    }
    command
}

/// Our own uid: std has no call for it, every Unix has the program.
pub(crate) fn own_uid() -> Result<u32, Error> {
    let output = Command::new("id").arg("-u").output().context("cannot run `id -u`")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| Error::new(format!("`id -u` said {text:?}")))
}

/// Can an account that is neither the owner nor in the group come to `folder` and use it with these rights (0o5, 0o7)?
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
    fn an_account_is_read_from_the_password_file() {
        let accounts = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104:,,,:/var/lib/postgresql:/bin/bash\n";
        let account = Account::named(accounts, "postgres").unwrap();
        assert_eq!((account.uid, account.gid), (101, 104));
        assert!(Account::named(accounts, "nobody").is_none());
    }
}
